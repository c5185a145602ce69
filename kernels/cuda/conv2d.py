"""`torch.ops.sparse_nas.sparse_conv2d` on a GPU: which kernel takes it."""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.calls import activation_code, check_residual, geometry
from kernels.cuda import blob, linear
from kernels.reference import activate
from kernels.window import Window


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """See `kernels.sparse_conv2d.op`; the weight was packed on a GPU, x has its dtype.

    Gives a tensor whose channels lie last in memory.

    Raises:
        ValueError: the weight is malformed or does not fit, or an argument has another dtype,
            shape or device.
    """
    code = activation_code("sparse_conv2d", activation)
    blocks = blob.read(weight)
    pairs = tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)
    out = geometry(x.shape, out_channels, *pairs, groups).out
    _check(x, blocks, out_channels, pairs[0], groups)
    linear.check("sparse_conv2d", x, blocks, bias)
    if not out[0]:
        return _empty(x, out)
    kernel = chosen(blocks, x, out, pairs[1], pairs[2])
    last = x.contiguous(memory_format=torch.channels_last)
    added = None
    if residual is not None:
        check_residual("sparse_conv2d", residual, x, out)
        added = residual.contiguous(memory_format=torch.channels_last)
    if kernel == "linear":
        flat = None if added is None else pixels(added)
        return images(linear.product(blocks, pixels(last), bias, activation, flat), out)
    if kernel == "implicit":
        return _implicit(blocks, last, bias, pairs[1:], out, code, added)
    if added is None:
        return _by_pytorch(kernel, blocks, last, bias, pairs[1:], activation)
    y = _by_pytorch(kernel, blocks, last, bias, pairs[1:], "none")
    return activate(y.add_(added), activation)


def _by_pytorch(
    kernel: str, blocks: blob.Blocks, x: Tensor, bias: Tensor | None, pairs: Any, activation: str
) -> Tensor:
    same = None if bias is None else bias.to(x.dtype)
    if kernel == "channel":
        held = None if same is None else same[blocks.order]
        y = F.conv2d(x, blocks.form.weight(blocks.values), held, *pairs)
        flat = linear.spread(pixels(activate(y, activation)), blocks, bias, activation)
        return images(flat, (len(y), blocks.rows, *y.shape[2:]))
    assert blocks.whole is not None
    stride, padding, dilation = pairs
    held = blocks.form.weight(blocks.whole)
    y = F.conv2d(x, held, same, stride, padding, dilation, blocks.form.groups)
    return activate(y, activation).contiguous(memory_format=torch.channels_last)


def chosen(
    blocks: blob.Blocks,
    x: Tensor,
    out: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> str:
    """The way for x and `out` (N, C, H, W): `linear`, `implicit`, PyTorch's `dense`, `channel`."""
    plain = (blocks.form.kernel, blocks.form.groups) == ((1, 1), 1)
    if plain and set(stride) == {1} and set(padding) == {0}:
        return "linear"
    if blocks.is_channel:
        return "channel"
    count = prod(out) // out[1]
    pays = blocks.in_blocks and (blocks.whole is None or blocks.pays(count))
    return "implicit" if pays else "dense"


def name(
    blocks: blob.Blocks,
    x: Tensor,
    out: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> str:
    """What `chosen` says, of `linear` the kernel of its product."""
    way = chosen(blocks, x, out, stride, padding)
    return linear.chosen(blocks, linear.aligned(pixels(x))) if way == "linear" else way


def pixels(x: Tensor) -> Tensor:
    """Images (N, C, H, W) as pixels (N * H * W, C): no copy where channels lie last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images(y: Tensor, out: tuple[int, ...]) -> Tensor:
    """Pixels (N * H * W, C) as (N, C, H, W), channels last."""
    return y.view(out[0], *out[2:], out[1]).permute(0, 3, 1, 2)


def _implicit(
    blocks: blob.Blocks,
    x: Tensor,
    bias: Tensor | None,
    pairs: Any,
    out: Any,
    code: int,
    added: Tensor | None,
) -> Tensor:
    from kernels.cuda import implicit, many  # not at the top: Triton comes where it is needed

    wide, window = None if bias is None else bias.float(), Window(blocks.form.kernel, *pairs)
    walked = (many.packed(blocks), aligned(x), wide, window, out, code)
    added = None if added is None else aligned(added)
    with torch.cuda.device(x.device):
        return implicit.conv2d(*walked, rounding=linear.precision(), residual=added)


def aligned(x: Tensor) -> Tensor:
    """Gives images with channels last and from a multiple of 16 bytes on, for the copy engine."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x.clone() if x.data_ptr() % 16 else x


def _empty(x: Tensor, out: tuple[int, ...]) -> Tensor:
    return torch.empty(out, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _check(
    x: Tensor, blocks: blob.Blocks, out_channels: int, kernel: tuple[int, ...], groups: int
) -> None:
    form = blocks.form
    packed = (form.operation, blocks.rows, form.kernel, form.groups)
    channels = blocks.channels // form.taps * form.groups
    if packed != (blob.CONV2D, out_channels, kernel, groups) or channels != x.shape[1]:
        shape = (blocks.rows, blocks.channels // form.taps, *form.kernel)
        raise ValueError(
            f"sparse_conv2d: the weight was packed as {shape} with groups={form.groups}; it does "
            f"not fit in={x.shape[1]}, out_channels={out_channels}, kernel_size={kernel}, "
            f"groups={groups}"
        )
