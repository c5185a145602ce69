"""A program: the bytes of a run of layers, packed weights, biases and arguments together."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels import blob as b
from kernels.calls import ACTIVATIONS
from kernels.checks import check
from kernels.packed import Packed

Pair = tuple[int, int]
VERSION = 1
_MAGIC = b"SNCHAIN\n"
_HEAD = np.dtype("S8,<i4,<i4,<i8,<u4,<u4,4<i8")
_HEAD.names = ("magic", "version", "links", "bytes", "crc", "reserved", "padding")
_LINK = np.dtype("<i4,<i4,2<i4,2<i4,2<i4,<i8,<i8,2<i8")
_LINK.names = (
    "operation",
    "activation",
    "stride",
    "padding",
    "dilation",
    "weight",
    "bias",
    "reserved",
)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a run.

    Attributes:
        packed: its weight.
        bias: (out,) float32, or None.
        activation: "none", "relu", "relu6", "silu" or "gelu".
        stride: of a convolution, as are padding and dilation; groups are in the weight.
    """

    packed: Packed
    bias: Tensor | None = None
    activation: str = "none"
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)


def chain(layers: Sequence[Layer]) -> Tensor:
    """The program of a run of layers, all linear or all convolutions.

    Args:
        layers: at least one; each takes what the one before it gives.

    Returns:
        (n,) uint8, for `torch.ops.sparse_nas.sparse_chain(x, program, out_tail)`.

    Raises:
        ValueError: layers that do not fit each other, or arguments out of range.
    """
    links = np.zeros(len(layers), _LINK)
    parts: list[b.Bytes] = []
    end = _aligned(_HEAD.itemsize + links.nbytes)
    for link, layer in zip(links, layers, strict=True):
        weight, bias = layer.packed.data.numpy(), _bias(layer)
        code = _activation(layer.activation)
        link["operation"], link["activation"] = b.shape_of(weight).operation, code
        link["stride"], link["padding"] = layer.stride, layer.padding
        link["dilation"], link["weight"] = layer.dilation, end
        link["bias"] = end + _aligned(len(weight)) if layer.bias is not None else -1
        for part in (weight, bias):
            parts.append(part)
            end += _aligned(len(part))
    program = _join(links, parts, end)
    _check(program)
    return torch.from_numpy(program)


def validate(program: Tensor) -> None:
    """Checks a program that came from elsewhere, its packed weights included.

    Raises:
        ValueError: names what is malformed, the rule and the value.
    """
    _check(program.numpy())


def shapes(program: Tensor) -> list[b.Shape]:
    """The shapes of a checked program's weights, in order."""
    raw = program.numpy()
    return [b.shape_of(_weight(raw, link)) for link in links_of(raw)]


def links_of(raw: b.Bytes) -> Any:
    """The layers' records in a checked program."""
    count = int(raw[: _HEAD.itemsize].view(_HEAD)[0]["links"])
    return raw[_HEAD.itemsize : _HEAD.itemsize + count * _LINK.itemsize].view(_LINK)


def layers_of(program: Tensor) -> list[Layer]:
    """The layers of a checked program; their packed weights have no meta."""
    raw, names = program.numpy(), list(ACTIVATIONS)
    layers = []
    for link in links_of(raw):
        packed = Packed(torch.from_numpy(_weight(raw, link)), {})
        pairs = [_pair(link[name]) for name in ("stride", "padding", "dilation")]
        layers.append(Layer(packed, _bias_of(raw, link), names[link["activation"]], *pairs))
    return layers


def _pair(values: Any) -> Pair:
    return int(values[0]), int(values[1])


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _activation(name: str) -> int:
    if name not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"chain: activation must be one of {known}, got {name!r}")
    return ACTIVATIONS[name]


def _bias(layer: Layer) -> b.Bytes:
    if layer.bias is None:
        return np.zeros(0, np.uint8)
    rows = b.shape_of(layer.packed.data.numpy()).rows
    if layer.bias.dtype != torch.float32 or layer.bias.shape != (rows,):
        raise ValueError(
            f"chain: bias must be float32 ({rows},), "
            f"got {layer.bias.dtype} {tuple(layer.bias.shape)}"
        )
    return layer.bias.detach().contiguous().numpy().view(np.uint8)


def _join(links: Any, parts: list[b.Bytes], end: int) -> b.Bytes:
    program = np.zeros(end, np.uint8)
    head = np.zeros(1, _HEAD)
    head["magic"], head["version"] = _MAGIC, VERSION
    head["links"], head["bytes"] = len(links), end
    program[: head.nbytes] = head.view(np.uint8)
    program[head.nbytes : head.nbytes + links.nbytes] = links.view(np.uint8)
    place = _aligned(head.nbytes + links.nbytes)
    for part in parts:
        program[place : place + len(part)] = part
        place += _aligned(len(part))
    return b.seal(program, 24)


def _rule(holds: bool, thing: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"program: {thing} must be {rule}, got {value}")


def _check(raw: b.Bytes) -> None:
    _rule(len(raw) >= _HEAD.itemsize, "bytes", f"at least {_HEAD.itemsize}", len(raw))
    head = raw[: _HEAD.itemsize].view(_HEAD)[0]
    _rule(bytes(head["magic"]) == _MAGIC, "magic", repr(_MAGIC), bytes(head["magic"]))
    _rule(head["version"] == VERSION, "format", str(VERSION), head["version"])
    _rule(head["bytes"] == len(raw), "bytes", f"its length {len(raw)}", head["bytes"])
    found = b.checksum(raw, 24)
    _rule(head["crc"] == found, "checksum", f"{found:#010x}, that of its bytes", head["crc"])
    room = (len(raw) - _HEAD.itemsize) // _LINK.itemsize
    _rule(1 <= head["links"] <= room, "layers", f"1 to {room}", head["links"])
    shapes = [_check_link(raw, link) for link in links_of(raw)]
    for before, after in pairwise(shapes):
        same = before.operation == after.operation
        _rule(same, "layers", "all linear or all convolutions", "both")
        wanted = after.channels * after.groups
        _rule(before.rows == wanted, "a layer's outputs", f"the next one's {wanted}", before.rows)


def _check_link(raw: b.Bytes, link: Any) -> b.Shape:
    weight = _weight(raw, link)
    check(weight)
    shape = b.shape_of(weight)
    operation = link["operation"]
    _rule(operation == shape.operation, "operation", str(shape.operation), operation)
    top = len(ACTIVATIONS) - 1
    _rule(0 <= link["activation"] <= top, "activation", f"0 to {top}", link["activation"])
    for name, low in (("stride", 1), ("padding", 0), ("dilation", 1)):
        values = link[name].tolist()
        _rule(min(values) >= low and max(values) < 2**20, name, f"at least {low}", values)
    bias, last = int(link["bias"]), len(raw) - 4 * shape.rows
    inside = bias == -1 or (0 <= bias <= last and bias % 64 == 0)
    _rule(inside, "bias offset", f"-1, or a multiple of 64 up to {last}", bias)
    return shape


def _weight(raw: b.Bytes, link: Any) -> b.Bytes:
    start = int(link["weight"])
    inside = 0 <= start <= len(raw) - b.HEADER.itemsize and start % 64 == 0
    _rule(inside, "weight offset", f"inside {len(raw)} bytes", start)
    size = int(b.head(raw[start:])["bytes"])
    _rule(0 < size <= len(raw) - start, "weight size", f"up to {len(raw) - start}", size)
    return raw[start : start + size]


def _bias_of(raw: b.Bytes, link: Any) -> Tensor | None:
    start = int(link["bias"])
    if start < 0:
        return None
    rows = b.shape_of(_weight(raw, link)).rows
    return torch.from_numpy(raw[start : start + 4 * rows].view("<f4"))
