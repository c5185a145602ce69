"""Sparse linear of many tokens on compute capability 9.0, by hopper.cu."""

from collections.abc import Sequence
from heapq import heapify, heapreplace
from typing import Any

import torch
from torch import Tensor

from kernels.cuda.blocks import Blocks
from kernels.cuda.driver import available, capability, function, tensor_map

ROWS, TOKENS, STEP = 128, 256, 64
_STORED = 64  # tokens that a group of warps writes at once
LINE = 128  # bytes of a line of what is copied
THREADS = 384  # of a thread block: of twelve warps eight multiply
_STAGES = 4  # steps that are under way or in use, as many as shared memory holds
_SHARED = _STAGES * (TOKENS + ROWS) * LINE + 4 * _STORED * LINE + 16 * _STAGES + 1024
_ENDING = 2  # steps that beginning and ending a tile take as long as
_ROUND = 8  # tiles of a thread block are planned as a multiple of this, so that plans are alike
_NEAR = 2**24  # bytes of x that stay in the second-level cache beside weights and results
_PLANNED = 2**17  # tiles, of which a plan takes a twentieth of a second
_MANY, _LARGE = 1024, 2**36  # tokens, and multiply-adds of dense, from which it beat many.py


def takes(blocks: Blocks, x: Tensor) -> bool:
    """Whether this kernel computes it: bfloat16 or float16, blocks of 128 rows, columns in 64s.

    Not where a graph is captured of a weight and a number of tokens that it has not met; that it
    met them with a bias, or without, and with that activation is asked for then.
    """
    narrow = x.dtype in (torch.bfloat16, torch.float16) and len(x) > 0
    fits = blocks.in_blocks and blocks.block[0] == ROWS and blocks.block[1] % STEP == 0
    if not (narrow and fits and len(blocks.columns)):  # a map of nothing is refused
        return False
    if capability(x.device.index) != (9, 0) or not available(x.device.index):
        return False
    here: Any = torch.cuda.device_of
    with here(x):
        known = _tiles(x) in blocks.plans
        return known or not torch.cuda.is_current_stream_capturing()


def pays(blocks: Blocks, x: Tensor) -> bool:
    """Whether it was faster than many.py, by a rule of thumb."""
    tiles = _tiles(x) * (blocks.rows // ROWS)
    products = len(x) * blocks.rows * blocks.channels
    return len(x) >= _MANY and products >= _LARGE and tiles <= _PLANNED


def linear(blocks: Blocks, x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; bias float32."""
    y, shared_out = x.new_empty(len(x), blocks.rows), _plan(blocks, x)
    defines = (
        ("BC", blocks.block[1]),
        ("STAGES", _STAGES),
        ("BIAS", int(bias is not None)),
        ("ACT", activation),
        ("BF16", int(x.dtype is torch.bfloat16)),
    )
    kernel = function("hopper.cu", "hopper", x.device.index, defines, dynamic=True)
    maps = (
        tensor_map(x, TOKENS, STEP),
        tensor_map(blocks.values.view(-1, blocks.block[1]), ROWS, STEP),
        tensor_map(y, _STORED, STEP),
    )
    tensors = (shared_out, blocks.starts, blocks.columns, bias)
    count, waves = shared_out.shape
    numbers = (blocks.rows // ROWS, waves)
    kernel.launch((count, 1), THREADS, tensors, numbers, _SHARED, maps)
    return y


def _tiles(x: Tensor) -> int:
    """How many tiles of tokens there are."""
    return -(-len(x) // TOKENS)


def _plan(blocks: Blocks, x: Tensor) -> Tensor:
    """Which tiles each thread block takes, (thread blocks, most of one) int32; made once.

    Making it waits for the device; while a graph is captured one of a weight that was written over
    serves, less evenly.
    """
    tiles = _tiles(x)
    held = blocks.plans.get(tiles, [])
    if tiles in blocks.planned or torch.cuda.is_current_stream_capturing():
        return held[-1]
    at_once = torch.cuda.get_device_properties(x.device).multi_processor_count
    near = max(1, min(8, _NEAR // (2 * TOKENS * blocks.channels)))
    steps = (blocks.starts.diff() * (blocks.block[1] // STEP)).tolist()
    shares = share_out(steps, tiles, at_once, near)
    waves = -(-max(map(len, shares)) // _ROUND) * _ROUND
    lines = [share + [-1] * (waves - len(share)) for share in shares]
    with torch.inference_mode(False):  # it outlives the mode
        made = torch.tensor(lines, dtype=torch.int32, device="cpu")
        if held and held[-1].shape == made.shape:
            held[-1].copy_(made)
        else:
            blocks.plans[tiles] = held = [*held, made.to(x.device)]
    blocks.planned.add(tiles)
    return held[-1]


def share_out(steps: Sequence[int], tiles: int, among: int, near: int) -> list[list[int]]:
    """Numbers of the tiles that each of some thread blocks takes, one after another.

    Each tile goes to the one that is free first. So many tiles of tokens are `near`: all lines of
    them come before others, the longest first.

    Args:
        steps: of each line of tiles.
        tiles: of tokens; the one of tokens t and line l has the number t * lines + l.
        among: how many thread blocks at most.
        near: see above.
    """
    lines = sorted(range(len(steps)), key=steps.__getitem__, reverse=True)
    shares: list[list[int]] = [[] for _ in range(min(among, tiles * len(steps)))]
    free = [(0, who) for who in range(len(shares))]
    heapify(free)
    for first in range(0, tiles, near):
        for line in lines:
            for tile in range(first, min(first + near, tiles)):
                at, who = free[0]
                shares[who].append(tile * len(steps) + line)
                heapreplace(free, (at + steps[line] + _ENDING, who))
    return shares
