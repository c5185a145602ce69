"""Sparse linear of many tokens, in Triton: a program takes a row of blocks and some tokens."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.block_index import BlockIndex
from kernels.cuda.blocks import Blocks
from kernels.cuda.driver import most_shared
from kernels.cuda.rounding import precision


@dataclass(frozen=True, eq=False)
class Walk:
    """Blocks of a weight in the order in which a product takes them.

    Attributes:
        rows: of the weight.
        channels: its columns.
        block: (rows, columns) of a block.
        starts: (rows / block rows + 1,) int32, where each row of blocks begins.
        columns: (blocks,) int32, which column of blocks each is in.
        order: (rows / block rows,) int32, rows of blocks, longest first.
        values: (blocks, block rows, block columns).
        places: None, or (blocks,) int32, which of `values` each block is; there it is transposed:
            (blocks, block columns, block rows).
        fixed: whether the lists are those of a packed weight: they were complete before any kernel
            that may still run was launched, and may be read before it has ended.
    """

    rows: int
    channels: int
    block: tuple[int, int]
    starts: Tensor
    columns: Tensor
    order: Tensor
    values: Tensor
    places: Tensor | None = None
    fixed: bool = False


def packed(blocks: Blocks) -> Walk:
    """A packed weight."""
    index = (blocks.starts, blocks.columns, blocks.order)
    return Walk(blocks.rows, blocks.channels, blocks.block, *index, blocks.values, fixed=True)


def by_rows(index: BlockIndex, values: Tensor) -> Walk:
    """The weight of an index; values (blocks, h, w)."""
    sizes, lists = (index.out_features, index.in_features), (index.starts, index.columns)
    return Walk(*sizes, index.block, *lists, index.order, values)


def by_columns(index: BlockIndex, values: Tensor) -> Walk:
    """The weight of an index transposed; values (blocks, h, w) stay as they lie.

    Of several taps it is flipped too: (in, taps * out).
    """
    sizes = (index.channels, index.taps * index.out_features)
    lists = (index.column_starts, index.rows)
    block = (index.block[1], index.block[0])
    return Walk(*sizes, block, *lists, index.column_order, values, index.places)


@dataclass(frozen=True)
class Plan:
    """How the kernel is compiled.

    Attributes:
        tokens: of a program.
        turned: whether rows of the weight, not tokens, are the rows of the product.
        group: tokens' tiles that run side by side, so that x is read once from memory.
        sorted: whether the longest rows of blocks begin first, so that none is left at the end.
        warps: of a program.
        stages: steps that are under way at once.
        step: columns of a block that are multiplied at once.
        bulk: whether tiles are brought by the copy engine, and a program may begin before the
            kernel before it has ended (compute capability 9.0 and newer).
    """

    tokens: int
    turned: bool
    group: int
    sorted: bool
    warps: int
    stages: int
    step: int
    bulk: bool


def plan(blocks: Blocks | Walk, x: Tensor, rounding: str = "ieee") -> Plan:
    """What was fastest on an H200 for blocks of this height."""
    some = len(blocks.columns) > 0  # a descriptor of nothing is refused
    wide, step = x.element_size() > 2, min(64, blocks.block[1])
    some &= not wide or rounding == "tf32"  # its tiles would spill
    bulk = some and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    few = len(x) <= 4096  # waves of programs: the longest decides
    each = step * x.element_size()  # bytes of a row of a tile
    if blocks.block[0] >= 128:
        short = len(blocks.columns) < 5 * (blocks.rows // blocks.block[0])
        group = 16 if few else 1 if short else 8
        warps, stages = (8, 2) if wide else (4, 3)
        stages = fitting(stages, (128 + blocks.block[0]) * each, bulk, x.device)
        return Plan(128, False, group, few, warps, stages, step, bulk)
    large = blocks.block[0] == 64 and len(x) * blocks.rows >= 2**24 and not wide
    if large and fitting(3, (512 + 64) * each, bulk, x.device) == 3:
        return Plan(512, True, 1, few, 8, 3, step, bulk)
    tokens = 256 if len(x) > 128 and not wide else 128
    stages = fitting(2, (tokens + blocks.block[0]) * each, bulk, x.device)
    return Plan(tokens, True, 4 if few else 2, few, 4, stages, step, bulk)


def fitting(stages: int, size: int, bulk: bool, device: torch.device) -> int:
    """As many stages, up to so many, as shared memory holds of tiles of so many bytes."""
    if device.type != "cuda":
        return stages
    return max(1, min(stages, most_shared(device.index) // size + (not bulk)))


def linear(
    blocks: Blocks,
    x: Tensor,
    bias: Tensor | None,
    activation: int,
    how: Plan | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; bias float32."""
    return product(packed(blocks), x, bias, activation, how, precision(), residual)


def product(
    walk: Walk,
    x: Tensor,
    bias: Tensor | None,
    activation: int = 0,
    how: Plan | None = None,
    rounding: str = "ieee",
    residual: Tensor | None = None,
) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; rounding: of float32.

    A residual (tokens, rows) is added before the activation.
    """
    how = how or plan(walk, x, rounding)
    y = x.new_empty(len(x), walk.rows)
    height, width = walk.block
    tiles, lines = triton.cdiv(len(x), how.tokens), walk.rows // height
    flat = walk.values.view(-1, walk.values.shape[2])
    given: tuple[Any, Any] = (x, flat)
    added: Any = y if residual is None else residual
    to: Any = y
    if how.bulk:
        tile = [height, how.step] if walk.places is None else [how.step, height]
        given = (
            TensorDescriptor.from_tensor(x, [how.tokens, how.step]),
            TensorDescriptor.from_tensor(flat, tile),
        )
        added, to = (TensorDescriptor.from_tensor(t, [how.tokens, height]) for t in (added, y))
    _linear[(tiles * lines,)](
        *given, walk.order, walk.starts, walk.columns,
        walk.starts if walk.places is None else walk.places,
        bias if bias is not None else walk.starts, added, to, len(x), walk.channels, walk.rows,
        HEIGHT=height, WIDTH=width, STEP=how.step, STEPS=width // how.step,
        TOKENS=how.tokens, TURNED=how.turned, GROUP=how.group, SORTED=how.sorted,
        BULK=how.bulk, EARLY=how.bulk and walk.fixed, PLACES=walk.places is not None,
        BIAS=bias is not None,
        ADDED=residual is not None, ACTIVATION=activation, PRECISION=rounding, OUT=TYPES[x.dtype],
        num_warps=how.warps, num_stages=how.stages, **early(how.bulk and walk.fixed),
    )  # fmt: skip
    return y


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def early(possible: bool) -> dict[str, bool]:
    """A launch's options, with which it need not wait for the kernel before it to end."""
    return {"launch_pdl": True} if possible else {}


@triton.jit
def after(EARLY: tl.constexpr):
    """Where `early`, the next kernel may begin, and what reads x waits for the one before."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _erf(x):
    """The error function within 2e-5, for results of 16 bits: a third of the time of tl.erf."""
    x = tl.minimum(tl.maximum(x, -3.0), 3.0)
    t = x * x
    p = 3.91253982e-08
    p = p * t - 1.88303651e-06
    p = p * t + 4.00883595e-05
    p = p * t - 0.000502921879
    p = p * t + 0.00419685743
    p = p * t - 0.0249989005
    p = p * t + 0.1109308
    p = p * t - 0.375219649
    p = p * t + 1.12825064
    return p * x


@triton.jit
def finished(v, bias, row, BIAS: tl.constexpr, KIND: tl.constexpr, OUT: tl.constexpr):
    """Sums (tokens, rows), their bias added, behind an activation's number in `kernels.calls`."""
    if BIAS:
        v += tl.load(bias + row).to(tl.float32)[None, :]
    if KIND == 1 or KIND == 2:
        v = tl.where(v < 0, 0.0, v)
    if KIND == 2:
        v = tl.where(v > 6, 6.0, v)
    if KIND == 3:
        v = v / (1 + tl.exp(-v))
    if KIND == 4:
        half = v * 0.7071067811865476
        v = 0.5 * v * (1 + (tl.erf(half) if OUT == tl.float32 else _erf(half)))
    return v.to(OUT)


@triton.jit
def placed(tiles, lines, GROUP: tl.constexpr):
    """Tile of tokens and row of blocks of a program: a few tiles first, for all rows of blocks."""
    program = tl.program_id(0)
    first = program // (GROUP * lines) * GROUP
    side = tl.minimum(tiles - first, GROUP)
    rest = program % (GROUP * lines)
    return first + rest % side, rest // side


# lists may lie anywhere: parts of one tensor
@triton.jit(do_not_specialize_on_alignment=["order", "starts", "columns", "places"])
def _linear(
    x, values, order, starts, columns, places, bias, added, y, tokens, channels, rows,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    TOKENS: tl.constexpr, TURNED: tl.constexpr, GROUP: tl.constexpr, SORTED: tl.constexpr,
    BULK: tl.constexpr, EARLY: tl.constexpr, PLACES: tl.constexpr, BIAS: tl.constexpr,
    ADDED: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    tile, line = placed(tl.cdiv(tokens, TOKENS), rows // HEIGHT, GROUP)
    if SORTED:
        line = tl.load(order + line)
    token, row = tile * TOKENS + tl.arange(0, TOKENS), line * HEIGHT + tl.arange(0, HEIGHT)
    total = tl.zeros([HEIGHT, TOKENS] if TURNED else [TOKENS, HEIGHT], tl.float32)
    begin, end = tl.load(starts + line), tl.load(starts + line + 1)
    next_at = tl.load(columns + begin, mask=begin < end, other=0)
    next_place = next_at
    if PLACES:
        next_place = tl.load(places + begin, mask=begin < end, other=0)
    after(EARLY)
    for i in range(begin * STEPS, end * STEPS):
        block, side = i // STEPS, i % STEPS * STEP
        at = next_at * WIDTH + side
        # asked for a step ahead: what they bring waits for them
        ahead = tl.minimum((i + 1) // STEPS, end - 1)
        next_at = tl.load(columns + ahead)
        if PLACES:
            block, next_place = next_place, tl.load(places + ahead)
        w = weights(values, block, side, HEIGHT, WIDTH, STEP, BULK, PLACES)
        part = tile_of(x, tile * TOKENS, at, tokens, channels, TOKENS, STEP, BULK)
        if TURNED:
            total = tl.dot(w, part.T, total, input_precision=PRECISION)
        else:
            total = tl.dot(part, w.T, total, input_precision=PRECISION)
    if TURNED:
        total = total.T
    if ADDED:
        others = tile_of(added, tile * TOKENS, line * HEIGHT, tokens, rows, TOKENS, HEIGHT, BULK)
        total += others.to(tl.float32)
    total = finished(total, bias, row, BIAS, ACTIVATION, OUT)
    if BULK:
        y.store([tile * TOKENS, line * HEIGHT], total)
    else:
        here = y + token.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(here, total, mask=token[:, None] < tokens)


@triton.jit
def tile_of(
    source, token, column, tokens, width, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
    BULK: tl.constexpr,
):  # fmt: skip
    """Some tokens of a (tokens, width) tensor, some columns; zeros behind the last token."""
    if BULK:
        tile = source.load([token, column])
    else:
        line, beside = token + tl.arange(0, TOKENS), column + tl.arange(0, COLUMNS)
        here = source + line.to(tl.int64)[:, None] * width + beside[None, :]
        tile = tl.load(here, mask=line[:, None] < tokens, other=0.0)
    return tile


@triton.jit
def weights(
    values, block, side,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, BULK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Columns of a block from `side` on, (HEIGHT, STEP); perhaps stored as (WIDTH, HEIGHT)."""
    if BULK:
        if TRANSPOSED:
            tile = values.load([block * WIDTH + side, 0]).T
        else:
            tile = values.load([block * HEIGHT, side])
    else:
        row, column = tl.arange(0, HEIGHT)[:, None], side + tl.arange(0, STEP)[None, :]
        first = values + tl.full([], HEIGHT * WIDTH, tl.int64) * block
        if TRANSPOSED:
            tile = tl.load(first + column.T * HEIGHT + row.T).T
        else:
            tile = tl.load(first + row * WIDTH + column)
    return tile
