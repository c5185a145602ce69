"""The gradient of a weight held whole, zeros where no block is kept, by whole_grad.cu (9.0)."""

import torch
from torch import Tensor

from kernels.block_index import BlockIndex
from kernels.cuda.driver import available, capability, function, tensor_map
from kernels.cuda.hopper import LINE, STEP, THREADS

_STORED = 64  # rows and columns that a group of warps writes at once
_WARPS, _RING = 8, 4  # that multiply; tiles whose kept blocks are looked up ahead
_ROOM = 196_608  # bytes of tiles that are under way or in use, at most
# Of tiles of so many rows and columns, microseconds on an H200: of a launch, of 64 tokens, of a
# tile at least, which is written.
TILES = {
    (128, 256): (3.9, 0.7, 2.2),
    (128, 192): (3.6, 0.52, 1.75),
    (128, 128): (3.3, 0.4, 1.25),
    (128, 64): (3.15, 0.21, 0.8),
    (64, 64): (2.85, 0.15, 0.6),
}


def takes(index: BlockIndex, dtype: torch.dtype) -> bool:
    """Whether this kernel computes it: bfloat16 or float16 on a GPU of 9.0, blocks of 16s."""
    device = index.lists.device
    narrow = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if not narrow or any(side % 16 for side in index.block):
        return False
    return capability(device.index) == (9, 0) and available(device.index)


def microseconds(index: BlockIndex, tokens: int) -> float:
    """How long it takes on an H200, by a rule of thumb."""
    return _plan(index, tokens)[0]


def weight_grad(index: BlockIndex, grad: Tensor, x: Tensor) -> Tensor:
    """Gives grad^T x (out, in) at the blocks, else zeros; grad (tokens, out) and x contiguous.

    As all that is compiled at first use it cannot be first used while a graph is captured.
    """
    _, (rows, columns) = _plan(index, len(x))
    stages, (height, width) = stages_of(rows, columns), index.block
    given = x.new_empty(index.out_features, index.in_features)
    defines = (
        ("HEIGHT", rows),
        ("SPAN", columns),
        ("STAGES", stages),
        ("BH", height),
        ("BW", width),
        ("BF16", int(x.dtype is torch.bfloat16)),
    )
    kernel = function("whole_grad.cu", "whole_grad", x.device.index, defines, dynamic=True)
    boxes = ((grad, STEP), (x, STEP), (given, _STORED))
    maps = tuple(tensor_map(part, lines, STEP) for part, lines in boxes)
    shared = stages * ((rows + columns) * LINE + 16) + _sums(rows, columns)
    shared += _RING * (4 * _WARPS + 16) + 1024
    grid = (min(_at_once(index), _tiles(index, rows, columns)), 1)
    numbers = (*given.shape, -(-len(x) // STEP))
    kernel.launch(grid, THREADS, (index.starts, index.columns), numbers, shared, maps)
    return given


def stages_of(rows: int, columns: int) -> int:
    """Steps that are under way or in use at once."""
    return (_ROOM - max(0, _sums(rows, columns) - 4 * _STORED * LINE)) // ((rows + columns) * LINE)


def _sums(rows: int, columns: int) -> int:
    """Bytes of sums in shared memory; a group of warps that takes turns gives its to the other."""
    return 2 * _STORED * LINE + (columns * 256 if rows == _STORED else 2 * _STORED * LINE)


def _plan(index: BlockIndex, tokens: int) -> tuple[float, tuple[int, int]]:
    """Microseconds, and rows and columns of a tile with which it takes them: the fewest."""
    times = []
    for tile, (launch, step, least) in TILES.items():
        waves = -(-_tiles(index, *tile) // _at_once(index))
        times.append((launch + waves * max(step * -(-tokens // STEP), least), tile))
    return min(times)


def _tiles(index: BlockIndex, rows: int, columns: int) -> int:
    return -(-index.out_features // rows) * -(-index.in_features // columns)


def _at_once(index: BlockIndex) -> int:
    return torch.cuda.get_device_properties(index.lists.device).multi_processor_count
