"""Sparse linear of many tokens, in Triton: a program takes a row of blocks and some tokens."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.cuda.blob import Blocks


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


def plan(blocks: Blocks, x: Tensor) -> Plan:
    """What was fastest on an H200 for blocks of this height."""
    some = len(blocks.columns) > 0  # a descriptor of nothing is refused
    bulk = some and x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    wide, step = x.element_size() > 2, min(64, blocks.block[1])
    few = len(x) <= 4096  # waves of programs: the longest decides
    if blocks.block[0] >= 128:
        how = (8, 2) if wide else (4, 3)
        return Plan(128 if len(x) > 64 else 64, False, 16 if few else 8, few, *how, step, bulk)
    if blocks.block[0] == 64 and len(x) * blocks.rows >= 2**24 and not wide:
        return Plan(512, True, 1, few, 8, 3, step, bulk)
    tokens = 256 if len(x) > 128 and not wide else 128 if len(x) > 64 else 64
    return Plan(tokens, True, 4 if few else 2, few, 4, 2, step, bulk)


def linear(
    blocks: Blocks, x: Tensor, bias: Tensor | None, activation: int, how: Plan | None = None
) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; bias float32."""
    how = how or plan(blocks, x)
    y = x.new_empty(len(x), blocks.rows)
    height, width = blocks.block
    tiles, lines = triton.cdiv(len(x), how.tokens), blocks.rows // height
    flat = blocks.values.view(-1, width)
    given: tuple[Any, Any] = (x, flat)
    to: Any = y
    if how.bulk:
        given = (
            TensorDescriptor.from_tensor(x, [how.tokens, how.step]),
            TensorDescriptor.from_tensor(flat, [height, how.step]),
        )
        to = TensorDescriptor.from_tensor(y, [how.tokens, height])
    _linear[(tiles * lines,)](
        *given, blocks.order, blocks.starts, blocks.columns,
        bias if bias is not None else blocks.starts, to, len(x), blocks.channels, blocks.rows,
        HEIGHT=height, WIDTH=width, STEP=how.step, STEPS=width // how.step,
        TOKENS=how.tokens, TURNED=how.turned, GROUP=how.group, SORTED=how.sorted,
        BULK=how.bulk, BIAS=bias is not None, ACTIVATION=activation,
        PRECISION=precision(x), OUT=TYPES[x.dtype],
        num_warps=how.warps, num_stages=how.stages, **early(how.bulk),
    )  # fmt: skip
    return y


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def precision(x: Tensor) -> str:
    """How float32 is multiplied: as it is, or rounded to TF32 where torch is told to do so."""
    rounded = x.dtype is not torch.float32 or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if rounded else "ieee"


def early(possible: bool) -> dict[str, bool]:
    """A launch's options, with which it need not wait for the kernel before it to end."""
    return {"launch_pdl": True} if possible else {}


@triton.jit
def activated(v, KIND: tl.constexpr):
    """Behind an activation, by its number in `kernels.calls`."""
    if KIND == 1 or KIND == 2:
        v = tl.where(v < 0, 0.0, v)
    if KIND == 2:
        v = tl.where(v > 6, 6.0, v)
    if KIND == 3:
        v = v / (1 + tl.exp(-v))
    if KIND == 4:
        v = 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    return v


@triton.jit
def placed(tiles, lines, GROUP: tl.constexpr):
    """Tile of tokens and row of blocks of a program: a few tiles first, for all rows of blocks."""
    program = tl.program_id(0)
    first = program // (GROUP * lines) * GROUP
    side = tl.minimum(tiles - first, GROUP)
    rest = program % (GROUP * lines)
    return first + rest % side, rest // side


@triton.jit
def _linear(
    x, values, order, starts, columns, bias, y,
    tokens, channels, rows,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    TOKENS: tl.constexpr, TURNED: tl.constexpr, GROUP: tl.constexpr,
    SORTED: tl.constexpr, BULK: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    tile, line = placed(tl.cdiv(tokens, TOKENS), rows // HEIGHT, GROUP)
    if SORTED:
        line = tl.load(order + line)
    token, row = tile * TOKENS + tl.arange(0, TOKENS), line * HEIGHT + tl.arange(0, HEIGHT)
    column = tl.arange(0, STEP)
    total = tl.zeros([HEIGHT, TOKENS] if TURNED else [TOKENS, HEIGHT], tl.float32)
    begin, end = tl.load(starts + line), tl.load(starts + line + 1)
    next_at = tl.load(columns + begin, mask=begin < end, other=0)
    if BULK:
        gdc_launch_dependents()
        gdc_wait()  # for x; what came before reads the weight
    for i in range(begin * STEPS, end * STEPS):
        block, side = i // STEPS, i % STEPS * STEP
        at = next_at * WIDTH + side
        # asked for a step ahead: what it brings waits for it
        next_at = tl.load(columns + tl.minimum((i + 1) // STEPS, end - 1))
        if BULK:
            w = values.load([block * HEIGHT, side])
            part = x.load([tile * TOKENS, at])
        else:
            place = tl.full([], HEIGHT * WIDTH, tl.int64) * block + side
            w = tl.load(values + place + tl.arange(0, HEIGHT)[:, None] * WIDTH + column[None, :])
            here = x + token.to(tl.int64)[:, None] * channels + at + column[None, :]
            part = tl.load(here, mask=token[:, None] < tokens, other=0.0)
        if TURNED:
            total = tl.dot(w, part.T, total, input_precision=PRECISION)
        else:
            total = tl.dot(part, w.T, total, input_precision=PRECISION)
    if TURNED:
        total = total.T
    if BIAS:
        total += tl.load(bias + row).to(tl.float32)[None, :]
    total = activated(total, ACTIVATION).to(OUT)
    if BULK:
        y.store([tile * TOKENS, line * HEIGHT], total)
    else:
        here = y + token.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(here, total, mask=token[:, None] < tokens)
