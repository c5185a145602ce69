"""A product sampled at blocks, in Triton: the gradient of a block-sparse weight, where it is kept.

A program takes a group of blocks of one row, which share their tile of the output's gradient, and
a part of the tokens; the parts' sums are added in order. Of convolutions: `sampled_conv2d`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.block_index import BlockIndex
from kernels.cuda.many import TYPES, tile_of

_PROGRAMS = 1.75  # of a multiprocessor
_ADDED = 1024  # sums that a program adds
_ADDING = 14  # steps of a program that take as long as adding parts


@dataclass(frozen=True)
class Plan:
    """How the kernel is compiled and spread; how many blocks a group has, the index says.

    Attributes:
        split: parts of the tokens.
        step: tokens that are multiplied at once.
        warps: of a program.
        stages: steps that are under way at once.
        bulk: whether tiles are brought by the copy engine (compute capability 9.0 and newer; not
            where float32 is multiplied as such: its tiles would spill).
    """

    split: int
    step: int
    warps: int
    stages: int
    bulk: bool


def plan(
    index: BlockIndex, x: Tensor, tokens: int, precision: str = "ieee", boxes: bool = True
) -> Plan:
    """A plan for so many tokens.

    Args:
        index: of the blocks.
        x: what the gradient is multiplied by, of any shape.
        tokens: that are multiplied: of a convolution its output's pixels.
        precision: of products in float32.
        boxes: whether the copy engine can bring what is multiplied.
    """
    bulk, processors, wide = False, 1, x.element_size() > 2
    if x.is_cuda:
        newer = boxes and torch.cuda.get_device_capability(x.device)[0] >= 9
        bulk = newer and (not wide or precision == "tf32")
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    step = 32 if wide else 64
    held = (index.groups.shape[1] - 2) * index.block[0] * index.block[1]
    split = round(_PROGRAMS * processors / max(1, len(index.groups)))
    split = max(1, min(split, tokens // (4 * step)))
    if tokens / step * (1 - 1 / split) < _ADDING:  # steps that a program is spared
        split = 1
    return Plan(split, step, 4 if bulk and not wide and held <= 16384 else 8, 3, bulk)


def weight_grad(
    index: BlockIndex, grad: Tensor, x: Tensor, how: Plan | None = None, precision: str = "ieee"
) -> Tensor:
    """Gives grad^T x (blocks, h, w) at the blocks; grad (tokens, out) and x contiguous."""
    how = how or plan(index, x, len(x), precision)
    given = x.new_empty(len(index.columns), *index.block)
    if not len(given) or not len(x):
        return given.zero_()
    sums = parts_of(given, how)
    _launch(index, grad, x, sums, how, precision, whole=False)
    return added(sums, given, how)


def put_blocks(
    matrix: Tensor, index: BlockIndex, grad: Tensor, x: Tensor, how: Plan, precision: str = "ieee"
) -> None:
    """Writes grad^T x at the blocks into a contiguous matrix (out, in); `how.split` must be 1."""
    if len(index.columns):
        _launch(index, grad, x, matrix, how, precision, whole=True)


def _launch(
    index: BlockIndex,
    grad: Tensor,
    x: Tensor,
    sums: Tensor,
    how: Plan,
    precision: str,
    whole: bool,
) -> None:
    block = index.block
    tiles: tuple[Any, Any] = (grad, x)
    if how.bulk:
        tiles = (
            TensorDescriptor.from_tensor(grad, [how.step, block[0]]),
            TensorDescriptor.from_tensor(x, [how.step, block[1]]),
        )
    _sampled[(len(index.groups) * how.split,)](
        *tiles, index.groups, sums, len(x), index.out_features, index.in_features,
        len(index.columns), len(index.groups), how.split,
        HEIGHT=block[0], WIDTH=block[1], SIZE=index.groups.shape[1] - 2, STEP=how.step,
        WHOLE=whole, BULK=how.bulk, PRECISION=precision, OUT=TYPES[sums.dtype],
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip


def parts_of(given: Tensor, how: Plan) -> Tensor:
    """Where the sums of each part go: into the result, or before they are added."""
    if how.split == 1:
        return given
    return given.new_empty(how.split, *given.shape, dtype=torch.float32)


def added(sums: Tensor, given: Tensor, how: Plan) -> Tensor:
    """The result, of the sums of each part."""
    if how.split > 1:
        programs = (triton.cdiv(given.numel(), _ADDED),)
        _add[programs](sums, given, given.numel(), SPLIT=how.split, SIZE=_ADDED)
    return given


@triton.jit(do_not_specialize=["tokens", "blocks", "count", "split"])
def _sampled(
    grad, x, groups, sums, tokens, rows, channels, blocks, count, split,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    WHOLE: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    row, first, columns, held, part = group_of(groups, count, SIZE)
    begin, end = steps_of(tl.cdiv(tokens, STEP), part, split)
    if WHOLE:
        out = sums + row.to(tl.int64) * HEIGHT * channels
    else:
        out = sums + (part.to(tl.int64) * blocks + first) * HEIGHT * WIDTH
    for size in tl.static_range(1, SIZE + 1):  # a loop for each size: none multiplies in vain
        if held == size:
            _blocks(
                grad, x, row, columns, out, begin, end, tokens, rows, channels,
                size, HEIGHT, WIDTH, STEP, WHOLE, BULK, PRECISION, OUT,
            )  # fmt: skip


@triton.jit
def group_of(groups, count, SIZE: tl.constexpr):
    """A program's group: row, first place, columns, how many it has; and its part of the steps."""
    # all groups of a part of the tokens run side by side, so that x is read once from memory
    group, part = tl.program_id(0) % count, tl.program_id(0) // count
    group = groups + group * (SIZE + 2)
    row, first = tl.load(group), tl.load(group + 1)
    held = 0
    columns = ()
    for i in tl.static_range(SIZE):
        column = tl.load(group + 2 + i)
        columns += (column,)
        held += (column >= 0).to(tl.int32)
    return row, first, columns, held, part


@triton.jit
def steps_of(steps, part, split):
    """The first step of a part, and that behind its last."""
    each = tl.cdiv(steps, split)
    return part * each, tl.minimum(part * each + each, steps)


@triton.jit
def _blocks(
    grad, x, row, columns, out, begin, end, tokens, rows, channels,
    SIZE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
    WHOLE: tl.constexpr, BULK: tl.constexpr, PRECISION: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    totals = ()
    for _ in tl.static_range(SIZE):
        totals += (tl.zeros([HEIGHT, WIDTH], tl.float32),)
    for i in range(begin, end):
        shared = tile_of(grad, i * STEP, row * HEIGHT, tokens, rows, STEP, HEIGHT, BULK).T
        found = ()
        for k in tl.static_range(SIZE):
            part = tile_of(x, i * STEP, columns[k] * WIDTH, tokens, channels, STEP, WIDTH, BULK)
            found += (tl.dot(shared, part, totals[k], input_precision=PRECISION),)
        totals = found
    if WHOLE:
        place = tl.arange(0, HEIGHT)[:, None] * channels + tl.arange(0, WIDTH)[None, :]
        for k in tl.static_range(SIZE):
            tl.store(out + columns[k] * WIDTH + place, totals[k].to(OUT))
    else:
        put(out, totals, SIZE, HEIGHT, WIDTH, OUT)


@triton.jit
def put(
    out, totals, SIZE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr
):
    """Writes blocks one after another."""
    place = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for k in tl.static_range(SIZE):
        tl.store(out + k * HEIGHT * WIDTH + place, totals[k].to(OUT))


@triton.jit
def _add(sums, to, count, SPLIT: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(sums + tl.full([], part, tl.int64) * count + place, mask=place < count)
    tl.store(to + place, total.to(to.dtype.element_ty), mask=place < count)
