"""Sparse linear of one to four tokens, zeros anywhere, by entries.cu."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cuda.blob import Blocks
from kernels.cuda.driver import available, function, most_shared

MOST_TOKENS = 4
_BYTES = {1: 4, 2: 4, 4: 8}  # of a column of x in shared memory, by tokens


@dataclass(frozen=True)
class Plan:
    """How entries.cu is compiled.

    Attributes:
        warps: of a thread block, each of which takes a row.
        loads: of four entries, that a lane asks for at once.
        rounds: rows that a warp takes one after another, at least.
    """

    warps: int
    loads: int
    rounds: int


def takes(blocks: Blocks, x: Tensor) -> bool:
    """Whether this kernel computes it: there are entries, and x fits into shared memory."""
    if not blocks.has_entries or not 1 <= len(x) <= MOST_TOKENS or not available(x.device.index):
        return False
    return blocks.channels * _BYTES[_width(len(x))] <= most_shared(x.device.index)


def plan(blocks: Blocks, tokens: int) -> Plan:
    """What was fastest on an H100 for weights like this one."""
    if tokens > 2:
        return Plan(32, 2, 2) if blocks.rows > 4096 else Plan(32, 1, 1)
    return Plan(32, 4 if blocks.rows <= 4096 else 2, 1)


def linear(
    blocks: Blocks, x: Tensor, bias: Tensor | None, activation: int, how: Plan | None = None
) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; bias float32."""
    how, width = how or plan(blocks, len(x)), _width(len(x))
    y = x.new_empty(len(x), blocks.rows)
    narrow = ("BF16", int(x.dtype is torch.bfloat16))
    defines = (("COUNT", width), ("WARPS", how.warps), ("U", how.loads), narrow)
    kernel = function("entries.cu", "entries", x.device.index, defines, dynamic=True)
    tensors = (blocks.columns, blocks.starts, x, bias, y)
    numbers = (len(x), blocks.channels, blocks.rows, activation)
    grid, shared = (
        (-(-blocks.rows // (how.warps * how.rounds)), 1),
        blocks.channels * _BYTES[width],
    )
    kernel.launch(grid, 32 * how.warps, tensors, numbers, shared)
    return y


def _width(tokens: int) -> int:
    return 1 if tokens == 1 else 2 if tokens == 2 else 4
