"""Sparse linear of one or two tokens, zeros anywhere, by entries.cu."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cuda.blocks import Blocks
from kernels.cuda.driver import available, function, most_shared

MOST_TOKENS = 2
_BYTES = 4  # of a column of x in shared memory


@dataclass(frozen=True)
class Plan:
    """How entries.cu is compiled.

    Attributes:
        warps: of a thread block, each of which takes a row.
        eights: of entries, that a lane asks for at once.
    """

    warps: int
    eights: int


def takes(blocks: Blocks, x: Tensor) -> bool:
    """Whether this kernel computes it: there are entries, and x fits into shared memory."""
    if not blocks.has_entries or not 1 <= len(x) <= MOST_TOKENS or not available(x.device.index):
        return False
    return blocks.channels * _BYTES <= most_shared(x.device.index)


def pays(blocks: Blocks) -> bool:
    """Whether it was faster than expand.cu, or dense where there are no tiles; a rule of thumb."""
    few = blocks.share <= 0.35
    if not len(blocks.tiles):
        return few
    return blocks.rows > 2048 <= blocks.channels and (few or blocks.rows > 4096)


def plan(blocks: Blocks) -> Plan:
    """What was fastest on an H200 for weights like this one: short rows are asked for at once."""
    if blocks.rows > 4096:
        return Plan(32, 1)
    each = -(-blocks.entries // (8 * 32 * blocks.rows))  # eights of a lane
    return Plan(16, each if each <= 4 else 3)


def linear(
    blocks: Blocks, x: Tensor, bias: Tensor | None, activation: int, how: Plan | None = None
) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; bias float32."""
    how = how or plan(blocks)
    y = x.new_empty(len(x), blocks.rows)
    narrow = ("BF16", int(x.dtype is torch.bfloat16))
    defines = (("COUNT", len(x)), ("WARPS", how.warps), ("U", how.eights), narrow)
    kernel = function("entries.cu", "entries", x.device.index, defines, dynamic=True)
    tensors = (blocks.columns, blocks.starts, x, bias, y)
    numbers = (blocks.entries // 8, blocks.channels, blocks.rows, activation)
    grid = (-(-blocks.rows // how.warps), 1)
    kernel.launch(grid, 32 * how.warps, tensors, numbers, blocks.channels * _BYTES)
    return y
