"""Sparse linear of up to 32 tokens, zeros anywhere, by expand.cu."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cuda.blocks import Blocks
from kernels.cuda.driver import available, function, most_shared

MOST_TOKENS = 32
_COPIED = 512  # bytes of a tile that a warp asks for at once


@dataclass(frozen=True)
class Plan:
    """How expand.cu is compiled.

    Attributes:
        warps: of a thread block, between which the columns are shared.
        depth: tiles of a warp that are under way or in use.
    """

    warps: int
    depth: int


def takes(blocks: Blocks, x: Tensor) -> bool:
    """Whether this kernel computes it: there are tiles, they fit, and tokens are few."""
    if not len(blocks.tiles) or not 1 <= len(x) <= MOST_TOKENS or not available(x.device.index):
        return False
    return plan(blocks, x) is not None


def pays(blocks: Blocks, x: Tensor) -> bool:
    """Whether it was faster than dense, by a rule of thumb."""
    long = blocks.rows < 1024 and blocks.channels > 8192  # few thread blocks
    return blocks.share <= (0.2 if long else 0.55 if len(x) <= 16 else 0.4)


def plan(blocks: Blocks, x: Tensor) -> Plan | None:
    """What was fastest on an H200 for such tiles, or less where shared memory is less."""
    plans, room = [Plan(16, 2), Plan(8, 2), Plan(4, 2)], most_shared(x.device.index)
    if len(x) <= 8 or (len(x) <= 16 and blocks.rows > 2048):
        plans.insert(0, Plan(24, 2))  # of more tokens the sums would not fit into registers
    return next((how for how in plans if _shared(blocks, how, len(x)) <= room), None)


def _width(tokens: int) -> int:
    return 1 if tokens <= 8 else 2 if tokens <= 16 else 4


def _shared(blocks: Blocks, how: Plan, tokens: int) -> int:
    """Bytes of shared memory: of tiles, then of the sums of all warps."""
    sums = 8 * _width(tokens) * (blocks.tile_rows + 4) * 4
    return how.warps * max(how.depth * blocks.room, sums)


def linear(
    blocks: Blocks, x: Tensor, bias: Tensor | None, activation: int, how: Plan | None = None
) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; bias float32."""
    how, wide = how or plan(blocks, x), _width(len(x))
    assert how is not None
    y = x.new_empty(len(x), blocks.rows)
    defines = (
        ("MT", blocks.tile_rows // 16),
        ("NT", wide),
        ("WARPS", how.warps),
        ("DEPTH", how.depth),
        ("COPIES", -(-blocks.room // _COPIED)),
        ("BF16", int(x.dtype is torch.bfloat16)),
    )
    kernel = function("expand.cu", "expand", x.device.index, defines, dynamic=True)
    tensors = (blocks.pairs, blocks.tiles, x, bias, y)
    numbers = (len(x), blocks.channels, blocks.rows, blocks.room, activation)
    grid = (-(-blocks.rows // blocks.tile_rows), 1)
    kernel.launch(grid, 32 * how.warps, tensors, numbers, _shared(blocks, how, len(x)))
    return y
