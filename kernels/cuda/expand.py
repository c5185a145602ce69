"""Sparse linear of up to 32 tokens, zeros anywhere, by expand.cu."""

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from kernels.cuda.blob import Blocks
from kernels.cuda.driver import available, function, most_shared

MOST_TOKENS = 32
_ROOM = 2 * 1040  # bytes in which a warp expands tiles
_PROGRAMS = 128  # thread blocks at least, where there are rows enough


@dataclass(frozen=True)
class Plan:
    """How expand.cu is compiled.

    Attributes:
        tiles: 16 rows each, of a thread block.
        warps: of a thread block, between which the columns are shared.
        ahead: loads of 32 entries of a tile that are asked for ahead; what is beyond waits.
    """

    tiles: int
    warps: int
    ahead: int


def takes(blocks: Blocks, x: Tensor) -> bool:
    """Whether this kernel computes it: there are tiles, and tokens are few."""
    return len(blocks.tiles) > 0 and len(x) <= MOST_TOKENS and available(x.device.index)


def pays(blocks: Blocks, x: Tensor) -> bool:
    """Whether it was faster than dense, by a rule of thumb."""
    kept = len(blocks.kept) / (blocks.rows * blocks.channels)
    return kept <= (0.22 if len(x) <= 16 else 0.15)


def plan(blocks: Blocks, x: Tensor) -> Plan:
    """As many rows a thread block as leave enough of them: each reads all of x."""
    tiles, wide = blocks.rows // 16, len(x) > 16
    room = most_shared(x.device.index)
    mean = 512 * len(blocks.kept) / max(1, blocks.rows * blocks.channels)
    ahead = max(1, min(4, ceil((mean + 1.5 * mean**0.5) / 32)))
    warps = 8 if wide and tiles > 256 else 16
    fit = [Plan(t, warps, ahead) for t in ((2,) if wide else (4,)) if tiles % t == 0]
    enough = [how for how in fit if tiles // how.tiles >= _PROGRAMS]
    enough = [how for how in enough if _shared(how, _width(blocks, len(x))) <= room]
    return enough[0] if enough else Plan(1, warps, ahead)


def _width(blocks: Blocks, tokens: int) -> int:
    """Products of eight tokens: one alone was slower where thread blocks have few rows."""
    return 4 if tokens > 16 else 2 if tokens > 8 or blocks.rows <= 4096 else 1


def _shared(how: Plan, width: int) -> int:
    """Bytes of shared memory: of tiles that are expanded, then of the sums of all warps."""
    return how.warps * max(_ROOM, 8 * width * (16 * how.tiles + 4) * 4)


def linear(
    blocks: Blocks, x: Tensor, bias: Tensor | None, activation: int, how: Plan | None = None
) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; bias float32."""
    how, wide = how or plan(blocks, x), _width(blocks, len(x))
    y = x.new_empty(len(x), blocks.rows)
    narrow = ("BF16", int(x.dtype is torch.bfloat16))
    defines = (("MT", how.tiles), ("NT", wide), ("WARPS", how.warps), ("AHEAD", how.ahead), narrow)
    kernel = function("expand.cu", "expand", x.device.index, defines, dynamic=True)
    tensors = (blocks.kept, blocks.tiles, x, bias, y)
    numbers = (len(x), blocks.channels, blocks.rows, activation)
    grid, shared = (blocks.rows // (16 * how.tiles), 1), _shared(how, wide)
    kernel.launch(grid, 32 * how.warps, tensors, numbers, shared)
    return y
