"""Packing a weight on a GPU: which blocks of it are stored, or which of its non-zeros."""

import numpy as np
import torch
from torch import Tensor

from kernels.cuda import blob as b
from kernels.packed import Packed

WORTH = 0.7  # a weight of which more would be stored in blocks is kept dense
SPARSE = 0.35  # kept of a dense weight, up to which its entries are stored beside it


def pack_linear(weight: Tensor) -> Packed:
    """Packs a weight on a GPU: see `kernels.pack_linear`, which calls this.

    Args:
        weight: (out, in), float32, bfloat16 or float16, on a CUDA device; blocks of zeros are left
            out where that saves enough, or whole rows where the others are full, else it is
            stored dense, for many tokens; of two bytes and with few non-zeros also non-zero by
            non-zero, for few.

    Raises:
        ValueError: not two dimensions, or another dtype.
    """
    _check("pack_linear", weight, ("out", "in"))
    return _packed(weight.detach(), b.Form(b.LINEAR))


def pack_conv2d(weight: Tensor, groups: int = 1) -> Packed:
    """Packs a convolution's weight on a GPU: see `kernels.pack_conv2d`, which calls this.

    Args:
        weight: (out, in / groups, kernel_h, kernel_w), float32, bfloat16 or float16, on a CUDA
            device; blocks of zeros, each within one kernel position, are left out where that saves
            enough, else it is stored dense, as it is where `groups` is not 1.
        groups: as of `torch.nn.Conv2d`.

    Raises:
        ValueError: not four dimensions, another dtype, an empty kernel, or `groups` does not
            divide `out`.
    """
    _check("pack_conv2d", weight, ("out", "in / groups", "kernel_h", "kernel_w"))
    rows, _, height, width = weight.shape
    if groups < 1 or rows % groups:
        raise ValueError(f"pack_conv2d: groups must divide out={rows}, got {groups}")
    if not height * width:
        raise ValueError(f"pack_conv2d: the kernel must not be empty, got {height}x{width}")
    by_tap = weight.detach().permute(0, 2, 3, 1)
    return _packed(
        by_tap.reshape(rows, by_tap[:1].numel()), b.Form(b.CONV2D, (height, width), groups)
    )


def _check(name: str, weight: Tensor, dims: tuple[str, ...]) -> None:
    if weight.dim() != len(dims) or weight.dtype not in b.DTYPES:
        raise ValueError(
            f"{name}: weight must be float32, bfloat16 or float16 ({', '.join(dims)}), "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )


def _packed(matrix: Tensor, form: b.Form) -> Packed:
    raw = _write(matrix, form)
    return Packed(raw, b.meta_of(raw, b.pattern(matrix, form)))


def _block(matrix: Tensor, form: b.Form) -> tuple[int, int] | None:
    """The largest block that stores about as little as any; None where dense is as good."""
    stored: dict[tuple[int, int], int] = {}
    rows, channels = matrix.shape[0], matrix.shape[1] // form.taps
    for height in b.SIZES:
        for width in b.SIZES:
            if rows % height == 0 and channels % width == 0:
                kept = _grid(matrix, height, width).ne(0).any(3).any(2)
                stored[height, width] = int(kept.sum()) * height * width
    least = min(stored.values(), default=matrix.numel())
    if form.groups > 1 or not matrix.numel() or least > WORTH * matrix.numel():
        return None
    return max(block for block, size in stored.items() if size <= 1.1 * least)


def _channel(matrix: Tensor, form: b.Form) -> Tensor | None:
    """Which rows are kept where all others are zero and that saves enough; or None."""
    kept = matrix.ne(0)
    rows = kept.any(1)
    few = form.groups == 1 and 0 < int(rows.sum()) <= WORTH * len(rows)
    return rows.nonzero()[:, 0] if few and bool((rows == kept.all(1)).all()) else None


def _grid(matrix: Tensor, height: int, width: int) -> Tensor:
    """The blocks: (rows of blocks, columns of blocks, height, width)."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // height, height, columns // width, width).transpose(1, 2)


def _write(matrix: Tensor, form: b.Form) -> Tensor:
    rows, columns = matrix.shape
    rows_kept, block = _channel(matrix, form), _block(matrix, form)
    rows_kept = rows_kept if block is None else None  # blocks are written faster than rows
    starts = places = tiles = kept = torch.zeros(0, dtype=torch.int32, device=matrix.device)
    values, kind = matrix.contiguous(), b.DENSE if block is None else b.BLOCKS
    if rows_kept is not None:
        places, values, kind = rows_kept.int(), matrix[rows_kept], b.CHANNEL
    elif block is None and _has_entries(matrix, form):
        (starts, places), kind = _entries(values), b.ENTRIES
        if rows % 16 == 0 and columns % 32 == 0:
            tiles, kept = _tiles(values)
    elif block is not None:
        grid = _grid(matrix, *block)
        full = grid.ne(0).any(3).any(2)
        starts = torch.cat([starts.new_zeros(1), full.sum(1).cumsum(0).int()])
        places, values = full.nonzero()[:, 1].int(), grid[full].contiguous()
    head = np.zeros((), b.HEADER)
    head["kind"], head["dtype"], head["operation"] = kind, b.DTYPES[matrix.dtype], form.operation
    head["kernel_h"], head["kernel_w"], head["groups"] = *form.kernel, form.groups
    head["rows"], head["columns"] = rows, columns
    head["block_rows"], head["block_columns"] = block or (rows, columns)
    head["blocks"], head["nonzeros"] = len(places), int(matrix.count_nonzero())
    head["kept"] = len(kept)
    return b.write(head, (starts, places, values, tiles, kept))


def _has_entries(matrix: Tensor, form: b.Form) -> bool:
    rows, columns = matrix.shape
    alone = form.taps == form.groups == 1
    fits = alone and matrix.itemsize == 2 and columns <= 2**16 and rows * columns < 2**31
    return fits and 0 < int(matrix.count_nonzero()) <= SPARSE * matrix.numel()


def _entries(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows start, and their entries, zeros behind them up to a multiple of four."""
    row, column = weight.nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=len(weight))
    ends, first = counts.cumsum(0), (counts + 3) // 4 * 4
    starts = torch.cat([first.new_zeros(1), first.cumsum(0)])
    place = starts[row] + torch.arange(len(row), device=row.device) - (ends - counts)[row]
    held = torch.zeros(int(starts[-1]), dtype=torch.int32, device=row.device)
    bits = weight[row, column].view(torch.int16).int()
    held[place] = column.int() | (bits << 16)
    return starts.int(), held


def _tiles(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where tiles start, and their entries, in the order in which lanes of a warp multiply them.

    Lane l takes the eight columns from l % 4 * 8 on of row l / 4, then of the row eight further.
    """
    rows, channels = weight.shape
    tiles = (
        weight.view(rows // 16, 2, 8, channels // 32, 32).permute(0, 3, 1, 2, 4).reshape(-1, 512)
    )
    tile, place = tiles.nonzero(as_tuple=True)
    counts = torch.bincount(tile, minlength=len(tiles))
    spread = _spread(tile, place)
    tile, place = tile[spread], place[spread]
    bits = tiles[tile, place].view(torch.int16).int()
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return starts.int(), 2 * place.int() | (bits << 16)


def _spread(tile: Tensor, place: Tensor) -> Tensor:
    """An order in each tile in which neighbours go to different banks of shared memory.

    A bank holds every 32nd pair of places; the first of every bank come before the second.
    """
    bank = place // 2 % 32
    by_bank = (tile * 32 + bank).argsort(stable=True)
    which = (tile * 32 + bank)[by_bank]
    counts = torch.unique_consecutive(which, return_counts=True)[1]
    begins = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    turn = torch.arange(len(which), device=which.device) - begins
    return by_bank[((which // 32 * 16 + turn) * 32 + which % 32).argsort(stable=True)]
