"""The gradient of a weight held whole, zeros where no block is kept, by whole_grad.cu (9.0)."""

from functools import cache, lru_cache

import torch
from torch import Tensor

from kernels.block_index import BlockIndex
from kernels.cuda.blocks import SIZES
from kernels.cuda.driver import available, capability, function, tensor_map
from kernels.cuda.hopper import LINE, STEP, THREADS

_STORED = 64  # rows and columns that a group of warps writes at once
_WARPS, _RING = 8, 4  # that multiply; tiles whose kept blocks are looked up ahead
_ROOM = 196_608  # bytes of tiles that are under way or in use
# Of tiles of so many rows and columns, microseconds on an H200: of a launch, of 64 tokens, of a
# tile beside them. Bytes of the gradient that are written in one.
TILES = {
    (128, 256): (2.5, 0.65, 1.1),
    (128, 192): (2.31, 0.482, 1.29),
    (128, 128): (1.85, 0.344, 1.05),
    (128, 64): (1.33, 0.226, 1.35),
    (64, 64): (1.56, 0.16, 0.89),
}
_WRITTEN = 5e6
_loaded: set[tuple[object, ...]] = set()


def takes(index: BlockIndex, dtype: torch.dtype) -> bool:
    """Whether this kernel computes it: bfloat16 or float16 on a GPU of 9.0."""
    device = index.lists.device
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = set(index.block) <= set(SIZES)
    return fits and capability(device.index) == (9, 0) and available(device.index)


def ready(index: BlockIndex, x: Tensor) -> bool:
    """Whether it may be called now: while a graph is captured nothing can be loaded."""
    if not torch.cuda.is_current_stream_capturing():
        return True
    return (x.device.index, _defines(index, x)) in _loaded


def microseconds(index: BlockIndex, tokens: int) -> float:
    """How long it takes on an H200, by a rule of thumb."""
    return _plan(index, tokens)[0]


def weight_grad(index: BlockIndex, grad: Tensor, x: Tensor) -> Tensor:
    """Gives grad^T x (out, in) at the blocks, else zeros.

    Args:
        index: of the blocks.
        grad: (tokens, out), one token at least; contiguous and from a multiple of 16 bytes on.
        x: (tokens, in), as grad.
    """
    _, (rows, columns) = _plan(index, len(x))
    defines, stages = _defines(index, x), stages_of(rows, columns)
    kernel = function("whole_grad.cu", "whole_grad", x.device.index, defines, dynamic=True)
    _loaded.add((x.device.index, defines))
    given = x.new_empty(index.out_features, index.in_features)
    boxes = ((grad, STEP), (x, STEP), (given, _STORED))
    maps = tuple(tensor_map(part, lines, STEP) for part, lines in boxes)
    shared = stages * ((rows + columns) * LINE + 16) + 4 * _STORED * LINE
    shared += _RING * (4 * _WARPS + 16) + 1024
    blocks = min(
        _at_once(x.device), _tiles((index.out_features, index.in_features), (rows, columns))
    )
    numbers = (*given.shape, -(-len(x) // STEP))
    kernel.launch((blocks, 1), THREADS, (index.starts, index.columns), numbers, shared, maps)
    return given


def stages_of(rows: int, columns: int) -> int:
    """Steps that are under way or in use at once."""
    return _ROOM // ((rows + columns) * LINE)


def _defines(index: BlockIndex, x: Tensor) -> tuple[tuple[str, int], ...]:
    _, (rows, columns) = _plan(index, len(x))
    return (
        ("HEIGHT", rows),
        ("SPAN", columns),
        ("STAGES", stages_of(rows, columns)),
        ("BH", index.block[0]),
        ("BW", index.block[1]),
        ("BF16", int(x.dtype is torch.bfloat16)),
    )


def together(one: float, other: float, power: float = 1.5) -> float:
    """Of what partly hides each other: the sum (a power of 1) or less, the longer at least."""
    return (one**power + other**power) ** (1 / power)


def _plan(index: BlockIndex, tokens: int) -> tuple[float, tuple[int, int]]:
    """Microseconds, and rows and columns of a tile with which it takes them: the fewest."""
    most = _at_once(index.lists.device)
    return _fastest(index.out_features, index.in_features, tokens, most)


@lru_cache(maxsize=4096)
def _fastest(rows: int, columns: int, tokens: int, most: int) -> tuple[float, tuple[int, int]]:
    """See `_plan`; most: thread blocks that run at once."""
    times, written = [], 2 * rows * columns / _WRITTEN
    for tile, (launch, step, beside) in TILES.items():
        waves = -(-_tiles((rows, columns), tile) // most)
        each = together(step * -(-tokens // STEP), beside)
        times.append((launch + together(waves * each, written), tile))
    return min(times)


def _tiles(size: tuple[int, int], tile: tuple[int, int]) -> int:
    return -(-size[0] // tile[0]) * -(-size[1] // tile[1])


@cache
def _at_once(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
