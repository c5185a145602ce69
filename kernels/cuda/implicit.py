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

from kernels.cuda.many import TYPES, Walk, after, early, finished, placed, weights
from kernels.window import Pair, Window

Box = tuple[int, int, int]


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


def plan(
    walk: Walk, x: Tensor, out: tuple[int, ...], window: Window, rounding: str = "ieee"
) -> Plan:
    """What was fastest on an H200 for an output (N, C, H, W) and blocks of this height."""
    images, _, height, width = out
    few = images * height * width < 2**10
    warps = 8 if x.element_size() > 2 else 4
    best = box((images, height, width), 64 if few else 128)
    bulk = brings(x, window.stride, rounding) and len(walk.columns) > 0
    return Plan(best, 1, False, warps, 3, min(64, walk.block[1]), bulk)


def brings(x: Tensor, stride: Pair, rounding: str) -> bool:
    """Whether the copy engine brings boxes of x: there is one, and strides divide the image."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] < 9:
        return False
    if x.element_size() > 2 and rounding != "tf32":  # tiles would spill
        return False
    return x.shape[2] % stride[0] == 0 and x.shape[3] % stride[1] == 0


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
    walk: Walk,
    x: Tensor,
    bias: Tensor | None,
    window: Window,
    out: tuple[int, int, int, int],
    activation: int = 0,
    how: Plan | None = None,
    rounding: str = "ieee",
    residual: Tensor | None = None,
) -> Tensor:
    """Gives y of shape `out` (N, C, H, W) of x (N, C, H, W), both channels last.

    A stride of 1 admits a padding below zero. A residual like y is added before the activation.
    """
    how = how or plan(walk, x, out, window, rounding)
    y = torch.empty(out, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    (images, channels, height, width), (block_rows, block_columns) = x.shape, walk.block
    boxes = covered((out[0], *out[2:]), how.box) // prod(how.box)
    flat = walk.values.view(-1, walk.values.shape[2])
    given: tuple[Any, Any] = (x, flat)
    added: Any = y if residual is None else residual
    to: Any = y
    if how.bulk:
        step = [block_rows, how.step] if walk.places is None else [how.step, block_rows]
        given = (
            boxes_under(x, window.stride, how.box, how.step),
            TensorDescriptor.from_tensor(flat, step),
        )
        added, to = (boxes_at(t, how.box, block_rows) for t in (added, y))
    _conv2d[(boxes * (walk.rows // block_rows),)](
        *given, walk.order, walk.starts, walk.columns,
        walk.starts if walk.places is None else walk.places,
        bias if bias is not None else walk.starts, added, to,
        images, height, width, out[2], out[3], walk.rows,
        HEIGHT=block_rows, WIDTH=block_columns, STEP=how.step, STEPS=block_columns // how.step,
        IMAGES=how.box[0], TALL=how.box[1], WIDE=how.box[2], GROUP=how.group, SORTED=how.sorted,
        BULK=how.bulk, PLACES=walk.places is not None, BIAS=bias is not None,
        ADDED=residual is not None, ACTIVATION=activation, PRECISION=rounding,
        OUT=TYPES[x.dtype], num_warps=how.warps, num_stages=how.stages,
        **constants(window, channels), **early(how.bulk),
    )  # fmt: skip
    return y


def constants(window: Window, channels: int) -> dict[str, int]:
    """What kernels are compiled for, of a window over an image of so many channels."""
    pairs = zip(("STRIDE", "PAD", "APART"), window.pairs, strict=True)
    sides = {
        f"{name}_{side}": n for name, pair in pairs for side, n in zip("HW", pair, strict=True)
    }
    return {"CHANNELS": channels, "ACROSS": window.kernel[1], **sides}


def boxes_under(
    x: Tensor, stride: Pair, box: Box, channels: int, last: bool = False
) -> TensorDescriptor:
    """Channels-last x in boxes of steps of a stride: (N, H/s, s, W/s, s * C), perhaps N later."""
    down, across = x.shape[2] // stride[0], x.shape[3] // stride[1]
    steps = _last(x).view(len(x), down, stride[0], across, stride[1] * x.shape[1])
    tile = [box[0], box[1], 1, box[2], channels]
    if last:
        steps, tile = steps.permute(1, 2, 3, 0, 4), [*tile[1:4], box[0], channels]
    return TensorDescriptor.from_tensor(steps, tile)


def boxes_at(x: Tensor, box: Box, channels: int, last: bool = False) -> TensorDescriptor:
    """Channels-last x in boxes: (N, H, W, C), or with the images before the channels."""
    if last:
        return TensorDescriptor.from_tensor(
            _last(x).permute(1, 2, 0, 3), [*box[1:], box[0], channels]
        )
    return TensorDescriptor.from_tensor(_last(x), [*box, channels])


def _last(x: Tensor) -> Tensor:
    """Channels-last x as (N, H, W, C); where a size is 1 its stride may have been anything."""
    last = x.permute(0, 2, 3, 1)
    return last.view(-1).view(last.shape)


@triton.jit
def _inside(image, row, column, height, width):
    """Where pixels lie, and whether they are inside their image."""
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return (image.to(tl.int64) * height + row) * width + column, inside


@triton.jit
def pixels_of(
    box, images, height, width, IMAGES: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """The corner of a box, its pixels (image, row, column, is there one), and where they lie.

    LAST: pixels of all images at one place lie beside each other, not an image's pixels.
    """
    down, across = tl.cdiv(height, TALL), tl.cdiv(width, WIDE)
    corner = (box // (down * across) * IMAGES, box // across % down * TALL, box % across * WIDE)
    pixel = tl.arange(0, IMAGES * TALL * WIDE)
    if LAST:
        image, pixel = corner[0] + pixel % IMAGES, pixel // IMAGES
    else:
        image, pixel = corner[0] + pixel // (TALL * WIDE), pixel % (TALL * WIDE)
    row, column = corner[1] + pixel // WIDE, corner[2] + pixel % WIDE
    place, inside = _inside(image, row, column, height, width)
    return corner, (image, row, column, inside & (image < images)), place


@triton.jit
def boxes_of(images, height, width, IMAGES: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr):
    """How many boxes cover all pixels."""
    return tl.cdiv(images, IMAGES) * tl.cdiv(height, TALL) * tl.cdiv(width, WIDE)


@triton.jit
def tile_under(
    x, corner, pixels, at, height, width,
    CHANNELS: tl.constexpr, ACROSS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, APART_H: tl.constexpr, APART_W: tl.constexpr,
    PIXELS: tl.constexpr, STEP: tl.constexpr, BULK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """What columns `at` and after of the weight multiply, (pixels, STEP), of a box of outputs."""
    UP: tl.constexpr = (PAD_H + STRIDE_H - 1) // STRIDE_H  # strides, so that no rest is negative
    LEFT: tl.constexpr = (PAD_W + STRIDE_W - 1) // STRIDE_W
    dy = at // CHANNELS // ACROSS * APART_H - PAD_H + UP * STRIDE_H
    dx = at // CHANNELS % ACROSS * APART_W - PAD_W + LEFT * STRIDE_W
    if BULK:
        down, across = corner[1] - UP + dy // STRIDE_H, corner[2] - LEFT + dx // STRIDE_W
        rest, beside = dy % STRIDE_H, dx % STRIDE_W * CHANNELS + at % CHANNELS
        if LAST:
            box = x.load([down, rest, across, corner[0], beside])
        else:
            box = x.load([corner[0], down, rest, across, beside])
        return box.reshape([PIXELS, STEP])
    else:
        image, row, column, real = pixels
        row, column = (row - UP) * STRIDE_H + dy, (column - LEFT) * STRIDE_W + dx
        place, inside = _inside(image, row, column, height, width)
        from_x = x + place[:, None] * CHANNELS + at % CHANNELS + tl.arange(0, STEP)[None, :]
        return tl.load(from_x, mask=(inside & real)[:, None], other=0.0)


@triton.jit
def tile_at(
    source, corner, row, here, real, PIXELS: tl.constexpr, HEIGHT: tl.constexpr,
    BULK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Channels `row` and after of a box of pixels (pixels, HEIGHT), which lie `here`."""
    if BULK:
        if LAST:
            box = source.load([corner[1], corner[2], corner[0], row])
        else:
            box = source.load([corner[0], corner[1], corner[2], row])
        return box.reshape([PIXELS, HEIGHT])
    else:
        return tl.load(source + here, mask=real[:, None], other=0.0)


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


# lists may lie anywhere: parts of one tensor
@triton.jit(do_not_specialize_on_alignment=["order", "starts", "columns", "places"])
def _conv2d(
    x, values, order, starts, columns, places, bias, added, y,
    images, height, width, out_height, out_width, rows,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    CHANNELS: tl.constexpr, ACROSS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, APART_H: tl.constexpr, APART_W: tl.constexpr,
    IMAGES: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr,
    SORTED: tl.constexpr, BULK: tl.constexpr, PLACES: tl.constexpr, BIAS: tl.constexpr,
    ADDED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = IMAGES * TALL * WIDE
    count = boxes_of(images, out_height, out_width, IMAGES, TALL, WIDE)
    box, line = placed(count, rows // HEIGHT, GROUP)
    if SORTED:
        line = tl.load(order + line)
    corner, pixels, spot = pixels_of(box, images, out_height, out_width, IMAGES, TALL, WIDE, False)
    begin, end = tl.load(starts + line), tl.load(starts + line + 1)
    next_at = tl.load(columns + begin, mask=begin < end, other=0)
    next_place = next_at
    if PLACES:
        next_place = tl.load(places + begin, mask=begin < end, other=0)
    after(BULK)
    total = tl.zeros([HEIGHT, PIXELS], tl.float32)
    for i in range(begin * STEPS, end * STEPS):
        block, side = i // STEPS, i % STEPS * STEP
        at = next_at * WIDTH + side
        # asked for a step ahead: what they bring waits for them
        ahead = tl.minimum((i + 1) // STEPS, end - 1)
        next_at = tl.load(columns + ahead)
        if PLACES:
            block, next_place = next_place, tl.load(places + ahead)
        w = weights(values, block, side, HEIGHT, WIDTH, STEP, BULK, PLACES)
        part = tile_under(
            x, corner, pixels, at, height, width, CHANNELS, ACROSS, STRIDE_H, STRIDE_W,
            PAD_H, PAD_W, APART_H, APART_W, PIXELS, STEP, BULK, False,
        )  # fmt: skip
        total = tl.dot(w, part.T, total, input_precision=PRECISION)
    row, total = line * HEIGHT + tl.arange(0, HEIGHT), total.T
    here = spot[:, None] * rows + row[None, :]
    first, real = line * HEIGHT, pixels[3]
    if ADDED:
        total += tile_at(added, corner, first, here, real, PIXELS, HEIGHT, BULK, False)
    total = finished(total, bias, row, BIAS, ACTIVATION, OUT)
    _put(y, total, corner, first, here, real, IMAGES, TALL, WIDE, HEIGHT, BULK)
