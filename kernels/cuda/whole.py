"""Kept blocks as the whole matrix and back, in Triton: for products that dense is faster at."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.block_index import BlockIndex, is_whole, scatter
from kernels.cuda.many import after, early

_TILE = 4096  # weights that a program moves
_ZEROS = 8192  # that a program writes of a large matrix
_LARGE = 2**23
_LISTED = tl.constexpr(128)  # columns of a row that are looked through at once


def matrix_of(values: Tensor, index: BlockIndex) -> Tensor:
    """Gives the matrix (out, taps * in) of kept blocks (blocks, h, w), contiguous; else zeros.

    Of values that are `kernels.block_index.whole_of` it is a view.
    """
    if is_whole(values):
        return scatter(values, index)
    matrix = values.new_empty(index.out_features, index.in_features)
    _each(_unpacked, matrix, values.contiguous(), index)
    return matrix


def blocks_of(matrix: Tensor, index: BlockIndex) -> Tensor:
    """Gives the kept blocks (blocks, h, w) of a matrix (out, taps * in)."""
    values = matrix.new_empty(len(index.columns), *index.block)
    _each(_gathered, matrix.contiguous(), values, index)
    return values


def mask_(matrix: Tensor, index: BlockIndex) -> None:
    """Writes zeros into a contiguous matrix (out, taps * in), where no block is kept."""
    _each(_masked, matrix, matrix, index, _ZEROS if matrix.numel() >= _LARGE else _TILE)


def _each(
    kernel: Any, matrix: Tensor, values: Tensor, index: BlockIndex, tile: int = _TILE
) -> None:
    """Launched before the kernel before it has ended (9.0 and newer), for which it waits."""
    height, width = index.block
    rows, columns = len(index.starts) - 1, index.in_features // width
    group = max(1, tile // (height * width))
    soon = values.is_cuda and torch.cuda.get_device_capability(values.device)[0] >= 9
    with torch.cuda.device(values.device):
        kernel[(rows, triton.cdiv(columns, group))](
            matrix, values, index.starts, index.columns, columns,
            HEIGHT=height, WIDTH=width, GROUP=group, EARLY=soon, **early(soon),
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _unpacked(
    matrix, values, starts, columns, count,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    after(EARLY)
    row, column = tl.program_id(0), tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    place = _found(row, column, starts, columns, GROUP)
    at, held = _places(row, column, place, count, HEIGHT, WIDTH)
    block = tl.load(values + held, mask=(place >= 0)[:, None, None], other=0)
    tl.store(matrix + at, block, mask=(column < count)[:, None, None])


@triton.jit(do_not_specialize=["count"])
def _gathered(
    matrix, values, starts, columns, count,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    after(EARLY)
    row = tl.program_id(0)
    place = tl.load(starts + row) + tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    kept = place < tl.load(starts + row + 1)
    column = tl.load(columns + place, mask=kept, other=0)
    at, held = _places(row, column, place, count, HEIGHT, WIDTH)
    kept = kept[:, None, None]
    tl.store(values + held, tl.load(matrix + at, mask=kept, other=0), mask=kept)


@triton.jit(do_not_specialize=["count"])
def _masked(
    matrix, values, starts, columns, count,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0), tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    place = _found(row, column, starts, columns, GROUP)  # lists are older than the kernel before
    at, _ = _places(row, column, place, count, HEIGHT, WIDTH)
    after(EARLY)
    none = tl.zeros([GROUP, HEIGHT, WIDTH], matrix.dtype.element_ty)
    tl.store(matrix + at, none, mask=((place < 0) & (column < count))[:, None, None])


@triton.jit
def _found(row, column, starts, columns, GROUP: tl.constexpr):
    """The places of the blocks of a row in these columns, -1 where none is kept."""
    begin, end = tl.load(starts + row), tl.load(starts + row + 1)
    place = tl.full([GROUP], -1, tl.int32)
    for first in range(begin, end, _LISTED):
        places = first + tl.arange(0, _LISTED)
        listed = tl.load(columns + places, mask=places < end, other=-1)
        found = tl.where(column[:, None] == listed[None, :], places[None, :], -1)
        place = tl.maximum(place, tl.max(found, 1))
    return place


@triton.jit
def _places(row, column, place, count, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Where blocks lie in the matrix and in values, both (blocks, h, w)."""
    across, down = tl.arange(0, WIDTH)[None, None, :], tl.arange(0, HEIGHT)[None, :, None]
    wide = (count * WIDTH).to(tl.int64)
    at = (row * HEIGHT + down) * wide + column[:, None, None] * WIDTH + across
    held = place.to(tl.int64)[:, None, None] * (HEIGHT * WIDTH) + down * WIDTH + across
    return at, held
