"""Sparse convolution in Triton: a program takes a row of blocks and a box of output pixels.

The product is implicit: a block belongs to one kernel position, and what it multiplies is the box
of input pixels under that position, all of which the copy engine brings at once, zeros outside the
image included.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.cuda.blob import Blocks
from kernels.cuda.many import TYPES, after, early, finished, placed, weights
from kernels.cuda.rounding import precision

Pair = tuple[int, int]
Box = tuple[int, int, int]


@dataclass(frozen=True)
class Walk:
    """How a convolution walks, pairs are (height, width)."""

    stride: Pair
    padding: Pair
    dilation: Pair


@dataclass(frozen=True)
class Plan:
    """How the kernel is compiled.

    Attributes:
        box: images, rows and columns of output pixels of a program, powers of two.
        group: boxes that run side by side before the next rows of blocks.
        sorted: whether the longest rows of blocks begin first, so that none is left at the end.
        warps: of a program.
        stages: steps that are under way at once.
        step: columns of a block that are multiplied at once.
        bulk: whether tiles are brought by the copy engine, and a program may begin before the
            kernel before it has ended (compute capability 9.0 and newer).
    """

    box: Box
    group: int
    sorted: bool
    warps: int
    stages: int
    step: int
    bulk: bool


def plan(blocks: Blocks, x: Tensor, out: tuple[int, ...], walk: Walk) -> Plan:
    """What was fastest on an H200 for an output (N, C, H, W) and blocks of this height."""
    images, _, height, width = out
    few = images * height * width < 2**10
    warps = 8 if x.element_size() > 2 else 4
    best = box((images, height, width), 64 if few else 128)
    return Plan(best, 1, False, warps, 3, min(64, blocks.block[1]), _bulk(blocks, x, walk))


def _bulk(blocks: Blocks, x: Tensor, walk: Walk) -> bool:
    """Whether the copy engine can walk so: strides divide the image, and there is a block."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] < 9:
        return False
    if x.element_size() > 2 and precision() != "tf32":  # tiles would spill
        return False
    whole = x.shape[2] % walk.stride[0] == 0 and x.shape[3] % walk.stride[1] == 0
    return whole and len(blocks.columns) > 0


@lru_cache(maxsize=4096)
def box(sizes: Box, pixels: int) -> Box:
    """The box of so many pixels that fills images, rows and columns with the least waste."""
    sides = [1 << i for i in range(pixels.bit_length()) if 1 << i <= 256]
    boxes = [(deep, tall, wide) for deep in sides for tall in sides for wide in sides]
    return min((b for b in boxes if prod(b) == pixels), key=lambda b: (covered(sizes, b), b[0]))


def covered(sizes: Box, box: Box) -> int:
    """Pixels of all boxes that cover images, rows and columns."""
    return prod(-(-size // side) * side for size, side in zip(sizes, box, strict=True))


def conv2d(
    blocks: Blocks,
    x: Tensor,
    bias: Tensor | None,
    walk: Walk,
    out: tuple[int, int, int, int],
    activation: int,
    how: Plan | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Gives y of shape `out` (N, C, H, W) of x (N, C, H, W), both channels last; bias float32.

    A residual like y is added before the activation.
    """
    how = how or plan(blocks, x, out, walk)
    y = torch.empty(out, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    (images, channels, height, width), (block_rows, block_columns) = x.shape, blocks.block
    boxes = covered((out[0], *out[2:]), how.box) // prod(how.box)
    flat = blocks.values.view(-1, block_columns)
    given: tuple[Any, Any] = (x, flat)
    added: Any = y if residual is None else residual
    to: Any = y
    if how.bulk:
        given = (
            TensorDescriptor.from_tensor(_by_stride(x, walk.stride), _window(how)),
            TensorDescriptor.from_tensor(flat, [block_rows, how.step]),
        )
        tile = [*how.box, block_rows]
        added, to = (TensorDescriptor.from_tensor(_last(t), tile) for t in (added, y))
    _conv2d[(boxes * (blocks.rows // block_rows),)](
        *given, blocks.order, blocks.starts, blocks.columns,
        bias if bias is not None else blocks.starts, added, to,
        images, height, width, out[2], out[3], blocks.rows,
        HEIGHT=block_rows, WIDTH=block_columns, STEP=how.step, STEPS=block_columns // how.step,
        CHANNELS=channels, ACROSS=blocks.form.kernel[1],
        STRIDE_H=walk.stride[0], STRIDE_W=walk.stride[1], PAD_H=walk.padding[0],
        PAD_W=walk.padding[1], APART_H=walk.dilation[0], APART_W=walk.dilation[1],
        IMAGES=how.box[0], TALL=how.box[1], WIDE=how.box[2], GROUP=how.group, SORTED=how.sorted,
        BULK=how.bulk, BIAS=bias is not None, ADDED=residual is not None,
        ACTIVATION=activation, PRECISION=precision(),
        OUT=TYPES[x.dtype], num_warps=how.warps, num_stages=how.stages,
        **early(how.bulk),
    )  # fmt: skip
    return y


def _by_stride(x: Tensor, stride: Pair) -> Tensor:
    """Channels-last x so that steps of a stride are steps of one: (N, H/s, s, W/s, s * C)."""
    images, channels, height, width = x.shape
    down, across = height // stride[0], width // stride[1]
    return x.permute(0, 2, 3, 1).view(images, down, stride[0], across, stride[1] * channels)


def _last(x: Tensor) -> Tensor:
    """Channels-last x as (N, H, W, C); where a size is 1 its stride may have been anything."""
    last = x.permute(0, 2, 3, 1)
    return last.view(-1).view(last.shape)


def _window(how: Plan) -> list[int]:
    return [how.box[0], how.box[1], 1, how.box[2], how.step]


@triton.jit
def _pixels(image, row, column, height, width):
    """Where pixels lie, and whether they are inside their image."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return (image.to(tl.int64) * height + row) * width + column, inside


@triton.jit
def _under(
    x, corner, pixels, dy, dx, channel, height, width,
    CHANNELS: tl.constexpr, STEP: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    UP: tl.constexpr, LEFT: tl.constexpr, PIXELS: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """The pixels under a kernel position (pixels, STEP): dy, dx behind UP, LEFT whole strides."""
    if BULK:
        box = x.load([
            corner[0], corner[1] - UP + dy // STRIDE_H, dy % STRIDE_H,
            corner[2] - LEFT + dx // STRIDE_W, dx % STRIDE_W * CHANNELS + channel,
        ])  # fmt: skip
        return box.reshape([PIXELS, STEP])
    else:
        image, row, column, real = pixels
        row, column = (row - UP) * STRIDE_H + dy, (column - LEFT) * STRIDE_W + dx
        place, inside = _pixels(image, row, column, height, width)
        from_x = x + place[:, None] * CHANNELS + channel + tl.arange(0, STEP)[None, :]
        return tl.load(from_x, mask=(inside & real)[:, None], other=0.0)


@triton.jit
def _others(
    added, corner, row, here, real, PIXELS: tl.constexpr, HEIGHT: tl.constexpr, BULK: tl.constexpr
):
    """What is added to the sums (pixels, HEIGHT)."""
    if BULK:
        part = added.load([corner[0], corner[1], corner[2], row]).reshape([PIXELS, HEIGHT])
    else:
        part = tl.load(added + here, mask=real[:, None], other=0.0)
    return part.to(tl.float32)


@triton.jit
def _put(
    y, total, corner, row, here, real, IMAGES: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr, HEIGHT: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    if BULK:
        box = total.reshape([IMAGES, TALL, WIDE, HEIGHT])
        y.store([corner[0], corner[1], corner[2], row], box)
    else:
        tl.store(y + here, total, mask=real[:, None])


@triton.jit
def _conv2d(
    x, values, order, starts, columns, bias, added, y,
    images, height, width, out_height, out_width, rows,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    CHANNELS: tl.constexpr, ACROSS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, APART_H: tl.constexpr, APART_W: tl.constexpr,
    IMAGES: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
    SORTED: tl.constexpr, BULK: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = IMAGES * TALL * WIDE
    UP: tl.constexpr = (PAD_H + STRIDE_H - 1) // STRIDE_H  # strides, so that no rest is negative
    LEFT: tl.constexpr = (PAD_W + STRIDE_W - 1) // STRIDE_W
    down, across = tl.cdiv(out_height, TALL), tl.cdiv(out_width, WIDE)
    box, line = placed(tl.cdiv(images, IMAGES) * down * across, rows // HEIGHT, GROUP)
    if SORTED:
        line = tl.load(order + line)
    corner = (box // (down * across) * IMAGES, box // across % down * TALL, box % across * WIDE)
    pixel = tl.arange(0, PIXELS)
    image, out_row = corner[0] + pixel // (TALL * WIDE), corner[1] + pixel // WIDE % TALL
    place, inside = _pixels(image, out_row, corner[2] + pixel % WIDE, out_height, out_width)
    pixels = (image, out_row, corner[2] + pixel % WIDE, inside & (image < images))
    begin, end = tl.load(starts + line), tl.load(starts + line + 1)
    next_at = tl.load(columns + begin, mask=begin < end, other=0)
    after(BULK)
    total = tl.zeros([HEIGHT, PIXELS], tl.float32)
    for i in range(begin * STEPS, end * STEPS):
        at = next_at * WIDTH + i % STEPS * STEP
        # asked for a step ahead: what it brings waits for it
        next_at = tl.load(columns + tl.minimum((i + 1) // STEPS, end - 1))
        w = weights(values, i // STEPS, i % STEPS * STEP, HEIGHT, WIDTH, STEP, BULK, False)
        dy = at // CHANNELS // ACROSS * APART_H - PAD_H + UP * STRIDE_H
        dx = at // CHANNELS % ACROSS * APART_W - PAD_W + LEFT * STRIDE_W
        part = _under(x, corner, pixels, dy, dx, at % CHANNELS, height, width,
                      CHANNELS, STEP, STRIDE_H, STRIDE_W, UP, LEFT, PIXELS, BULK)  # fmt: skip
        total = tl.dot(w, part.T, total, input_precision=PRECISION)
    row, total = line * HEIGHT + tl.arange(0, HEIGHT), total.T
    here = place[:, None] * rows + row[None, :]
    if ADDED:
        total += _others(added, corner, line * HEIGHT, here, pixels[3], PIXELS, HEIGHT, BULK)
    total = finished(total, bias, row, BIAS, ACTIVATION, OUT)
    _put(y, total, corner, line * HEIGHT, here, pixels[3], IMAGES, TALL, WIDE, HEIGHT, BULK)
