"""Sparse linear of few tokens, by few.cu."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kernels.cuda.blocks import Blocks
from kernels.cuda.driver import available, function

MOST_TOKENS = 32


@dataclass(frozen=True)
class Plan:
    """How few.cu is compiled.

    Attributes:
        tiles: 16 rows each, of a thread block.
        tokens: of a thread block, a multiple of 8.
        warps: of a thread block, between which the columns are shared.
        chunks: of 32 columns, that a warp asks for at once.
    """

    tiles: int
    tokens: int
    warps: int
    chunks: int

    @property
    def rows(self) -> int:
        """Rows of a thread block."""
        return 16 * self.tiles


def takes(blocks: Blocks, x: Tensor) -> bool:
    """Whether this kernel computes it: bfloat16 or float16, blocks of 32 columns or more."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    fits = blocks.block[1] >= 32 and len(x) <= MOST_TOKENS
    return blocks.in_blocks and narrow and fits and available(x.device.index)


def pays(blocks: Blocks, x: Tensor) -> bool:
    """Whether it was faster than dense, by a rule of thumb."""
    return len(x) <= 8 or blocks.rows <= 4096 or blocks.kept <= 0.6


def plan(blocks: Blocks, tokens: int) -> Plan:
    """What was fastest on an H200 for weights like this one.

    Where it is small, one round of all warps that takes the longest row of blocks whole.
    """
    height, width = blocks.block
    longest = blocks.longest * (width // 32)  # chunks
    mean = len(blocks.columns) * (width // 32) * height // blocks.rows
    tall, large = height >= 32, blocks.rows > 4096
    if tokens <= 8:
        if large:
            return Plan(2, 8, 16, 1) if tall else Plan(1, 8, 10, 2)
        if longest <= 24 or mean <= 32 < longest:
            return Plan(1, 8, 8 if longest <= 16 else 12, 2)
        return Plan(2 if tall else 1, 8, 8, 4)
    if tokens <= 16:
        if not tall:
            return Plan(1, 16, 6, 4) if large else Plan(1, 16, 8, 6)
        if large:
            return Plan(2, 16, 16, 1) if mean > 38 else Plan(2, 16, 8, 3)
        if longest <= 24:
            return Plan(2, 16, 8, 3)
        return Plan(2, 16, 10, 3) if mean > 32 else Plan(1, 16, 8, 6)
    if large and tall:
        return Plan(2, 32, 6, 4)
    return Plan(1, 32, 16, 1) if longest <= 16 and not large else Plan(1, 32, 6, 6)


def linear(
    blocks: Blocks, x: Tensor, bias: Tensor | None, activation: int, how: Plan | None = None
) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; bias float32."""
    how = how or plan(blocks, len(x))
    y = x.new_empty(len(x), blocks.rows)
    kernel = function("few.cu", "few", x.device.index, _defines(how, blocks.block, x.dtype))
    tensors = (blocks.values, blocks.starts, blocks.columns, x, bias, y)
    numbers = (len(x), blocks.channels, blocks.rows, activation)
    grid = (blocks.rows // how.rows, -(-len(x) // how.tokens))
    kernel.launch(grid, 32 * how.warps, tensors, numbers)
    return y


@lru_cache(maxsize=256)
def _defines(how: Plan, block: tuple[int, int], dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
    return (
        ("MT", how.tiles),
        ("NT", how.tokens // 8),
        ("WARPS", how.warps),
        ("U", how.chunks),
        ("BR", block[0]),
        ("BC", block[1]),
        ("BF16", int(dtype is torch.bfloat16)),
    )
