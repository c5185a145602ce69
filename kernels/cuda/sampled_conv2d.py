"""The gradient of a block-sparse convolution's weight, where it is kept, in Triton.

As `sampled`, but a step is a box of output pixels: what a block multiplies is the box of input
pixels under its kernel position.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.block_index import BlockIndex
from kernels.cuda.implicit import (
    Box,
    box,
    boxes_at,
    boxes_of,
    boxes_under,
    brings,
    constants,
    covered,
    pixels_of,
    tile_at,
    tile_under,
)
from kernels.cuda.many import TYPES
from kernels.cuda.sampled import Plan, added, group_of, parts_of, plan, put, steps_of
from kernels.window import Window

_WASTE = 1.25  # times the least pixels that boxes cover


def weight_grad(
    index: BlockIndex,
    grad: Tensor,
    x: Tensor,
    window: Window,
    how: Plan | None = None,
    precision: str = "ieee",
) -> Tensor:
    """Gives the gradient of values (blocks, h, w); grad (N, out, H', W') and x channels last."""
    (images, channels, height, width), (_, rows, *out) = x.shape, grad.shape
    if how is None:
        boxes = brings(x, window.stride, precision)
        how = plan(index, x, grad.numel() // rows, precision, boxes)
    block, step = index.block, step_of((images, out[0], out[1]), how.step)
    given = x.new_empty(len(index.columns), *block)
    if not len(given):
        return given
    sums = parts_of(given, how)
    tiles: tuple[Any, Any] = (grad, x)
    if how.bulk:
        under = boxes_under(x, window.stride, step, block[1], last=True)
        tiles = (boxes_at(grad, step, block[0], last=True), under)
    _sampled[(len(index.groups) * how.split,)](
        *tiles, index.groups, sums, images, height, width, *out, rows,
        len(given), len(index.groups), how.split,
        HEIGHT=block[0], WIDTH=block[1], SIZE=index.groups.shape[1] - 2,
        IMAGES=step[0], TALL=step[1], WIDE=step[2],
        BULK=how.bulk, PRECISION=precision, OUT=TYPES[sums.dtype],
        num_warps=how.warps, num_stages=how.stages, **constants(window, channels),
    )  # fmt: skip
    return added(sums, given, how)


def step_of(sizes: Box, pixels: int) -> Box:
    """The box of so many pixels: of one of each image, unless that leaves more of it empty.

    Tiles of such a box are matrices for the compiler; others go through registers.
    """
    deep, best = (pixels, 1, 1), box(sizes, pixels)
    return deep if covered(sizes, deep) <= _WASTE * covered(sizes, best) else best


@triton.jit(do_not_specialize=["blocks", "count", "split"])
def _sampled(
    grad, x, groups, sums, images, height, width, out_height, out_width, rows,
    blocks, count, split,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
    CHANNELS: tl.constexpr, ACROSS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, APART_H: tl.constexpr, APART_W: tl.constexpr,
    IMAGES: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    row, first, columns, held, part = group_of(groups, count, SIZE)
    boxes = boxes_of(images, out_height, out_width, IMAGES, TALL, WIDE)
    begin, end = steps_of(boxes, part, split)
    out = sums + (part.to(tl.int64) * blocks + first) * HEIGHT * WIDTH
    for size in tl.static_range(1, SIZE + 1):  # a loop for each size: none multiplies in vain
        if held == size:
            _blocks(
                grad, x, row, columns, out, begin, end, images, height, width, out_height,
                out_width, rows, size, HEIGHT, WIDTH, CHANNELS, ACROSS, STRIDE_H, STRIDE_W,
                PAD_H, PAD_W, APART_H, APART_W, IMAGES, TALL, WIDE, BULK, PRECISION, OUT,
            )  # fmt: skip


@triton.jit
def _blocks(
    grad, x, row, columns, out, begin, end, images, height, width, out_height, out_width, rows,
    SIZE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, ACROSS: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, APART_H: tl.constexpr, APART_W: tl.constexpr,
    IMAGES: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
    BULK: tl.constexpr, PRECISION: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    PIXELS: tl.constexpr = IMAGES * TALL * WIDE
    totals = ()
    for _ in tl.static_range(SIZE):
        totals += (tl.zeros([HEIGHT, WIDTH], tl.float32),)
    for i in range(begin, end):
        corner, pixels, place = pixels_of(
            i, images, out_height, out_width, IMAGES, TALL, WIDE, True
        )
        here = place[:, None] * rows + row * HEIGHT + tl.arange(0, HEIGHT)[None, :]
        shared = tile_at(grad, corner, row * HEIGHT, here, pixels[3], PIXELS, HEIGHT, BULK, True).T
        found = ()
        for k in tl.static_range(SIZE):
            part = tile_under(
                x, corner, pixels, columns[k] * WIDTH, height, width, CHANNELS, ACROSS, STRIDE_H,
                STRIDE_W, PAD_H, PAD_W, APART_H, APART_W, PIXELS, WIDTH, BULK, True,
            )  # fmt: skip
            found += (tl.dot(shared, part, totals[k], input_precision=PRECISION),)
        totals = found
    put(out, totals, SIZE, HEIGHT, WIDTH, OUT)
