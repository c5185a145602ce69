"""A program: the bytes of a graph and of its plan, packed weights and biases together."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels import blob as b
from kernels.calls import ACTIVATIONS
from kernels.checks import check
from kernels.network.graph import OPERATIONS, POOLS, Graph, Pair, Step, X, Y, apart
from kernels.network.lanes import PARTS, fits, laned
from kernels.network.plan import DENSE, Plan, lineable, plan
from kernels.packed import Packed

VERSION = 3
_MAGIC = b"SNGRAPH\n"
_HEAD = np.dtype("S8,<i4,<i4,<i8,<u4,<i4,<i4,<i4,<i8,2<i8")
_HEAD.names = (
    *("magic", "version", "tensors", "bytes", "crc", "steps", "images", "parts", "arena"),
    "padding",
)
_TENSOR = np.dtype("<i4,<i4,<i4,<i4,<i4,<i4,<i8,<i8,<i8")
_TENSOR.names = (
    *("kind", "channels", "height", "width", "pitch", "border", "offset", "channel", "image"),
)
_STEP = np.dtype("<i4,<i4,<i4,<i4,<i4,<i4,2<i4,2<i4,2<i4,2<i4,<i4,<i4,<i8,<i8,<i8,<i8")
_STEP.names = (
    *("operation", "activation", "in", "other", "out", "at", "kernel", "stride", "padding"),
    *("dilation", "kind", "run", "weight", "bias", "offsets", "inside"),
)
_SEAL = 24
_MOST = 2**20  # tensors, and steps


def write(graph: Graph, parts: int = 0) -> Tensor:
    """The program of a graph.

    Args:
        graph: what it computes.
        parts: 0; or 1, 2, 4 or 8: images lie beside each other, 16 / parts at a time, so that
            every tap is aligned: faster for as many small images or more, slower for fewer.

    Returns:
        (n,) uint8, for `torch.ops.sparse_nas.sparse_chain(x, program, out_tail)`.

    Raises:
        ValueError: steps that do not fit each other or the tensors, arguments out of range, or a
            graph that does not fit so many parts (`kernels.network.lanes.fits`).
    """
    graph.check()
    if parts:
        _rule(parts in PARTS and fits(graph, parts), "parts", "such that all steps fit", parts)
        graph = laned(graph, parts)
        graph.check()
    graph = apart(graph, [lineable(graph, step) for step in graph.steps])
    return torch.from_numpy(_bytes(graph, plan(graph)))


def validate(program: Tensor) -> None:
    """Checks a program that came from elsewhere: it must be what its own graph is written as.

    Raises:
        ValueError: names what is malformed, the rule and the value.
    """
    raw = program.numpy()
    graph = read(program)
    graph.check()
    if graph.parts:
        _rule(fits(graph, graph.parts), "parts", "such that all steps fit", graph.parts)
        met = laned(graph, graph.parts)
        same = len(met.steps) == len(graph.steps) and met.dense <= graph.dense | {X, Y}
        _rule(same, "lanes", "copied where they meet dense tensors", "others")
    sums = apart(graph, [lineable(graph, step) for step in graph.steps])
    _rule(len(sums.steps) == len(graph.steps), "sums", "in convolutions on lines", "elsewhere")
    again = _bytes(graph, plan(graph))
    same = len(again) == len(raw) and bool((again == raw).all())
    _rule(same, "plan", "that of its graph", "another")


def read(program: Tensor) -> Graph:
    """The graph of a program; its packed weights were checked and have no meta.

    Raises:
        ValueError: names what is malformed, the rule and the value.
    """
    raw = program.numpy()
    head = _checked_head(raw)
    tensors, steps = _records(raw, head)
    shapes = [(int(t["channels"]), int(t["height"]), int(t["width"])) for t in tensors]
    _rule(all(min(s) >= 0 and max(s) < 2**24 for s in shapes), "shapes", "from 0", shapes)
    parts = int(head["parts"])
    _rule(parts in (0, *PARTS), "parts", f"0 or one of {PARTS}", parts)
    plain = [i for i, t in enumerate(tensors) if t["kind"] == DENSE]
    dense = {i for i in plain if parts or shapes[i][1:] != (1, 1)}
    return Graph(shapes, dense, [_step(raw, s, len(shapes)) for s in steps], parts)


def _rule(holds: bool, thing: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"program: {thing} must be {rule}, got {value}")


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


class _Payload:
    """What steps point at, equal parts once."""

    def __init__(self, start: int) -> None:
        self.end, self.places = start, dict[bytes, int]()

    def add(self, part: npt.NDArray[Any] | None) -> int:
        """The byte offset of a part; -1 for none."""
        if part is None:
            return -1
        content = part.tobytes()
        if content not in self.places:
            self.places[content] = self.end
            self.end += _aligned(max(1, len(content)))
        return self.places[content]


def _bytes(graph: Graph, how: Plan) -> b.Bytes:
    tensors, steps = np.zeros(len(graph.shapes), _TENSOR), np.zeros(len(graph.steps), _STEP)
    for record, shape, place in zip(tensors, graph.shapes, how.places, strict=True):
        record["channels"], record["height"], record["width"] = shape
        for name in ("kind", "pitch", "border", "offset", "channel", "image"):
            record[name] = getattr(place, name)
    start = _HEAD.itemsize + tensors.nbytes
    payload = _Payload(_aligned(start + steps.nbytes))
    for number, (record, step) in enumerate(zip(steps, graph.steps, strict=True)):
        _write_step(record, step, how, number, payload)
    raw = np.zeros(payload.end, np.uint8)
    head = np.zeros(1, _HEAD)
    head["magic"], head["version"], head["bytes"] = _MAGIC, VERSION, len(raw)
    head["tensors"], head["steps"] = len(tensors), len(steps)
    head["images"], head["arena"], head["parts"] = how.images, how.arena, graph.parts
    whole = np.concatenate([part.view(np.uint8) for part in (head, tensors, steps)])
    raw[: len(whole)] = whole
    for content, start in payload.places.items():
        raw[start : start + len(content)] = np.frombuffer(content, np.uint8)
    return b.seal(raw, _SEAL)


def _write_step(record: Any, step: Step, how: Plan, number: int, payload: _Payload) -> None:
    record["operation"], record["kind"] = OPERATIONS[step.operation], POOLS[step.kind]
    record["activation"], record["run"] = ACTIVATIONS[step.activation], how.runs[number]
    record["in"], record["out"], record["at"] = step.source, step.out, step.at
    record["other"] = -1 if step.other is None else step.other
    for name in ("kernel", "stride", "padding", "dilation"):
        record[name] = getattr(step, name)
    record["weight"] = payload.add(None if step.packed is None else step.packed.data.numpy())
    record["bias"] = payload.add(_bias(step))
    for name, tables in (("offsets", how.offsets), ("inside", how.inside)):
        record[name] = payload.add(tables.get(number))


def _bias(step: Step) -> b.Bytes | None:
    if step.bias is None:
        return None
    rows = step.weight.rows
    if step.bias.dtype != torch.float32 or step.bias.shape != (rows,):
        raise ValueError(
            f"program: bias must be float32 ({rows},), got {step.bias.dtype} "
            f"{tuple(step.bias.shape)}"
        )
    return step.bias.detach().contiguous().numpy().view(np.uint8)


def _checked_head(raw: b.Bytes) -> Any:
    _rule(len(raw) >= _HEAD.itemsize, "bytes", f"at least {_HEAD.itemsize}", len(raw))
    head = raw[: _HEAD.itemsize].view(_HEAD)[0]
    _rule(bytes(head["magic"]) == _MAGIC, "magic", repr(_MAGIC), bytes(head["magic"]))
    _rule(head["version"] == VERSION, "format", str(VERSION), head["version"])
    _rule(head["bytes"] == len(raw), "bytes", f"its length {len(raw)}", head["bytes"])
    found = b.checksum(raw, _SEAL)
    _rule(head["crc"] == found, "checksum", f"{found:#010x}, that of its bytes", head["crc"])
    _rule(2 <= head["tensors"] < _MOST, "tensors", f"2 to {_MOST}", head["tensors"])
    _rule(1 <= head["steps"] < _MOST, "steps", f"1 to {_MOST}", head["steps"])
    return head


def _records(raw: b.Bytes, head: Any) -> tuple[Any, Any]:
    middle = _HEAD.itemsize + int(head["tensors"]) * _TENSOR.itemsize
    end = middle + int(head["steps"]) * _STEP.itemsize
    _rule(end <= len(raw), "records", f"within {len(raw)} bytes", end)
    return raw[_HEAD.itemsize : middle].view(_TENSOR), raw[middle:end].view(_STEP)


def _step(raw: b.Bytes, record: Any, tensors: int) -> Step:
    operation = _key(OPERATIONS, record["operation"], "operation")
    source, out, other = (int(record[name]) for name in ("in", "out", "other"))
    inside = 0 <= source < tensors and 0 <= out < tensors and -1 <= other < tensors
    _rule(inside, "tensors of a step", f"0 to {tensors - 1}", (source, out, other))
    packed, bias = None, None
    if operation in ("linear", "conv2d"):
        weight = _weight(raw, int(record["weight"]))
        packed = Packed(torch.from_numpy(weight), {})
        bias = _bias_at(raw, int(record["bias"]), b.shape_of(weight).rows)
    return Step(
        operation,
        source,
        out,
        at=int(record["at"]),
        other=None if other < 0 else other,
        packed=packed,
        bias=bias,
        activation=_key(ACTIVATIONS, record["activation"], "activation"),
        kind=_key(POOLS, record["kind"], "pooling"),
        kernel=_pair(record["kernel"]),
        stride=_pair(record["stride"]),
        padding=_pair(record["padding"]),
        dilation=_pair(record["dilation"]),
    )


def _key(names: dict[str, int], code: Any, thing: str) -> str:
    found = [name for name, value in names.items() if value == code]
    _rule(len(found) == 1, thing, f"one of {list(names.values())}", code)
    return found[0]


def _pair(values: Any) -> Pair:
    return int(values[0]), int(values[1])


def _weight(raw: b.Bytes, start: int) -> b.Bytes:
    inside = 0 <= start <= len(raw) - b.HEADER.itemsize and start % 64 == 0
    _rule(inside, "weight offset", f"inside {len(raw)} bytes", start)
    size = int(b.head(raw[start:])["bytes"])
    _rule(0 < size <= len(raw) - start, "weight size", f"up to {len(raw) - start}", size)
    check(raw[start : start + size])
    return raw[start : start + size]


def _bias_at(raw: b.Bytes, start: int, rows: int) -> Tensor | None:
    last = len(raw) - 4 * rows
    inside = start == -1 or (0 <= start <= last and start % 64 == 0)
    _rule(inside, "bias offset", f"-1, or a multiple of 64 up to {last}", start)
    return None if start < 0 else torch.from_numpy(raw[start : start + 4 * rows].view("<f4"))


def tails(program: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(channels, height, width) of x and of y of a checked program."""
    graph = read(program)
    return graph.shapes[X], graph.shapes[Y]


def step_count(program: Tensor) -> int:
    """The number of steps of a checked program."""
    return int(program.numpy()[: _HEAD.itemsize].view(_HEAD)[0]["steps"])


def weighted_steps(program: Tensor) -> list[int]:
    """The numbers of the steps of a checked program that have a weight, in their order."""
    raw = program.numpy()
    _, steps = _records(raw, raw[: _HEAD.itemsize].view(_HEAD)[0])
    return [int(number) for number in np.flatnonzero(steps["weight"] >= 0)]
