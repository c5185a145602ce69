"""`torch.ops.sparse_nas.sparse_conv2d` on a GPU: which kernel takes it."""

from collections.abc import Hashable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.calls import activation_code, check_residual, geometry
from kernels.cuda import blob, linear, table
from kernels.cuda.blocks import CONV2D, Blocks
from kernels.cuda.driver import has_triton
from kernels.cuda.rounding import precision
from kernels.reference import activate
from kernels.window import Pair, Window


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
    activation_code("sparse_conv2d", activation)
    blocks = blob.read(weight)
    window = Window(*map(_pair, (kernel_size, stride, padding, dilation)))
    out = geometry(tuple(x.shape), out_channels, window.kernel, *window.pairs, groups).out
    _check(x, blocks, out_channels, window.kernel, groups)
    linear.check("sparse_conv2d", x, blocks, bias)
    if not out[0]:
        return empty(x, out)
    last, added = x.contiguous(memory_format=torch.channels_last), None
    if residual is not None:
        check_residual("sparse_conv2d", residual, x, out)
        added = residual.contiguous(memory_format=torch.channels_last)
    if is_product(blocks, window):
        flat = None if added is None else pixels(added)
        return images(linear.product(blocks, pixels(last), bias, activation, flat), out)
    way = chosen(blocks, last, out, window)
    if added is None or way == "implicit":
        return compute(way, blocks, last, bias, window, out, activation, added)
    y = compute(way, blocks, last, bias, window, out)
    return activate(y.add_(added), activation)


def _pair(given: Sequence[int]) -> Pair:
    height, width = given
    return height, width


def is_product(blocks: Blocks, window: Window) -> bool:
    """Whether it is but a product with each pixel: of `pixels`."""
    return window.of_pixels and blocks.form.groups == 1


def takers(blocks: Blocks) -> list[str]:
    """The ways that compute it where it is more than a product: ours, or PyTorch's."""
    names = ["implicit"] * (blocks.in_blocks and has_triton()) + ["channel"] * blocks.is_channel
    return names + ["dense"] * (blocks.whole is not None)


def compute(
    way: str,
    blocks: Blocks,
    x: Tensor,
    bias: Tensor | None,
    window: Window,
    out: tuple[int, int, int, int],
    activation: str = "none",
    added: Tensor | None = None,
) -> Tensor:
    """Gives y, channels last, of such an x by one of `takers`; only `implicit` adds something."""
    if way == "implicit":
        return _implicit(blocks, x, bias, window, out, activation_code(way, activation), added)
    same = None if bias is None else bias.to(x.dtype)
    if way == "channel":
        held = None if same is None else same[blocks.order]
        y = F.conv2d(x, blocks.form.weight(blocks.values), held, *window.pairs)
        flat = linear.spread(pixels(activate(y, activation)), blocks, bias, activation)
        return images(flat, (len(y), blocks.rows, *y.shape[2:]))
    assert blocks.whole is not None
    y = F.conv2d(x, blocks.form.weight(blocks.whole), same, *window.pairs, blocks.form.groups)
    return activate(y, activation).contiguous(memory_format=torch.channels_last)


def chosen(blocks: Blocks, x: Tensor, out: tuple[int, ...], window: Window) -> str:
    """The way for x and `out` (N, C, H, W) where it is more than a product: one of `takers`.

    The fastest where it was measured (`kernels.tune`), else the one of a rule of thumb.
    """
    ways = takers(blocks)
    case = lambda: table.conv2d_case(blocks, tuple(x.shape), window)  # noqa: E731
    measured = table.fastest(blocks, key(x, window), case)
    if measured in ways:
        return measured
    pays = len(ways) == 1 or blocks.pays(prod(out) // out[1], blocks.kept)
    return ways[0] if pays else ways[-1]


def key(x: Tensor, window: Window) -> Hashable:
    """What x (N, C, H, W) is looked up by in `kernels.cuda.table`."""
    return (table.bucket(len(x)), *x.shape[1:], window)


def name(blocks: Blocks, x: Tensor, out: tuple[int, ...], window: Window) -> str:
    """What `chosen` says, of a product the kernel of it."""
    if is_product(blocks, window):
        return linear.chosen(blocks, linear.aligned(pixels(x)))
    return chosen(blocks, x, out, window)


def shape_of(blocks: Blocks, x: Tensor, window: Window) -> tuple[int, int, int, int]:
    """The shape of the output (N, C, H, W).

    Raises:
        ValueError: see `kernels.calls.geometry`.
    """
    sizes = (blocks.rows, window.kernel, *window.pairs, blocks.form.groups)
    return geometry(tuple(x.shape), *sizes).out


def pixels(x: Tensor) -> Tensor:
    """Images (N, C, H, W) as pixels (N * H * W, C): no copy where channels lie last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images(y: Tensor, out: tuple[int, ...]) -> Tensor:
    """Pixels (N * H * W, C) as (N, C, H, W), channels last."""
    return y.view(out[0], *out[2:], out[1]).permute(0, 3, 1, 2)


def _implicit(
    blocks: Blocks,
    x: Tensor,
    bias: Tensor | None,
    window: Window,
    out: tuple[int, int, int, int],
    code: int,
    added: Tensor | None,
) -> Tensor:
    from kernels.cuda import implicit, many  # not at the top: Triton comes where it is needed

    wide = None if bias is None else bias.float()
    walked = (many.packed(blocks), aligned(x), wide, window, out, code)
    added = None if added is None else aligned(added)
    with torch.cuda.device(x.device):
        return implicit.conv2d(*walked, rounding=precision(), residual=added)


def aligned(x: Tensor) -> Tensor:
    """Gives images with channels last and from a multiple of 16 bytes on, for the copy engine."""
    x = x.contiguous(memory_format=torch.channels_last)
    return x.clone() if x.data_ptr() % 16 else x


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Images of this shape, channels last, of whatever memory held."""
    last = torch.channels_last
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=last)


def _check(
    x: Tensor, blocks: Blocks, out_channels: int, kernel: tuple[int, ...], groups: int
) -> None:
    form = blocks.form
    packed = (form.operation, blocks.rows, form.kernel, form.groups)
    channels = blocks.channels // form.taps * form.groups
    if packed != (CONV2D, out_channels, kernel, groups) or channels != x.shape[1]:
        shape = (blocks.rows, blocks.channels // form.taps, *form.kernel)
        raise ValueError(
            f"sparse_conv2d: the weight was packed as {shape} with groups={form.groups}; it does "
            f"not fit in={x.shape[1]}, out_channels={out_channels}, kernel_size={kernel}, "
            f"groups={groups}"
        )
