"""Packing a weight on a GPU: which blocks of it are stored, or which of its non-zeros."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.cuda import blob as b
from kernels.cuda.blocks import CONV2D, DTYPES, LINEAR, SIZES, TILE, TILE_ROWS, Form
from kernels.packed import Packed

WORTH = 0.7  # a weight of which more would be stored in blocks is kept dense
_BLOCKS = 96  # rows of tiles at least, where there are rows enough
_AT_ONCE = 2**26  # weights that are cut into tiles at once
_STEP = 63  # columns from an entry to the next at most
SPARSE = 0.52  # kept of a dense weight, up to which its entries are stored beside it


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
    return _packed(weight.detach(), Form(LINEAR))


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
    return _packed(by_tap.reshape(rows, by_tap[:1].numel()), Form(CONV2D, (height, width), groups))


def _check(name: str, weight: Tensor, dims: tuple[str, ...]) -> None:
    if weight.dim() != len(dims) or weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: weight must be float32, bfloat16 or float16 ({', '.join(dims)}), "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )


def _packed(matrix: Tensor, form: Form) -> Packed:
    raw = _write(matrix, form)
    return Packed(raw, b.meta_of(raw, b.pattern(matrix, form)))


def _block(matrix: Tensor, form: Form) -> tuple[int, int] | None:
    """The largest block that stores about as little as any; None where dense is as good."""
    stored: dict[tuple[int, int], int] = {}
    rows, channels = matrix.shape[0], matrix.shape[1] // form.taps
    for height in SIZES:
        for width in SIZES:
            if rows % height == 0 and channels % width == 0:
                kept = _grid(matrix, height, width).ne(0).any(3).any(2)
                stored[height, width] = int(kept.sum()) * height * width
    least = min(stored.values(), default=matrix.numel())
    if form.groups > 1 or not matrix.numel() or least > WORTH * matrix.numel():
        return None
    return max(block for block, size in stored.items() if size <= 1.1 * least)


def _channel(matrix: Tensor, form: Form) -> Tensor | None:
    """Which rows are kept where all others are zero and that saves enough; or None."""
    kept = matrix.ne(0)
    rows = kept.any(1)
    few = form.groups == 1 and 0 < int(rows.sum()) <= WORTH * len(rows)
    return rows.nonzero()[:, 0] if few and bool((rows == kept.all(1)).all()) else None


def _grid(matrix: Tensor, height: int, width: int) -> Tensor:
    """The blocks: (rows of blocks, columns of blocks, height, width)."""
    rows, columns = matrix.shape
    return matrix.reshape(rows // height, height, columns // width, width).transpose(1, 2)


def _write(matrix: Tensor, form: Form) -> Tensor:
    rows, columns = matrix.shape
    rows_kept, block = _channel(matrix, form), _block(matrix, form)
    rows_kept = rows_kept if block is None else None  # blocks are written faster than rows
    starts = places = tiles = pairs = torch.zeros(0, dtype=torch.int32, device=matrix.device)
    values, kind, high = matrix.contiguous(), b.DENSE if block is None else b.BLOCKS, 0
    if rows_kept is not None:
        places, values, kind = rows_kept.int(), matrix[rows_kept], b.CHANNEL
    elif block is None and _has_entries(matrix, form):
        (starts, places), kind = _entries(values), b.ENTRIES
        if columns % 8 == 0:
            high = _tile_rows(rows)
            tiles, pairs = _tiles(values, high)
    elif block is not None:
        grid = _grid(matrix, *block)
        full = grid.ne(0).any(3).any(2)
        starts = torch.cat([starts.new_zeros(1), full.sum(1).cumsum(0).int()])
        places, values = full.nonzero()[:, 1].int(), grid[full].contiguous()
    head = np.zeros((), b.HEADER)
    head["words"], head["tile_rows"] = len(pairs), high
    head["kind"], head["dtype"], head["operation"] = kind, DTYPES[matrix.dtype], form.operation
    head["kernel_h"], head["kernel_w"], head["groups"] = *form.kernel, form.groups
    head["rows"], head["columns"] = rows, columns
    head["block_rows"], head["block_columns"] = block or (rows, columns)
    head["blocks"], head["nonzeros"] = len(places), int(matrix.count_nonzero())
    return b.write(head, (starts, places, values, tiles, pairs))


def _has_entries(matrix: Tensor, form: Form) -> bool:
    rows, columns = matrix.shape
    alone = form.taps == form.groups == 1
    fits = alone and matrix.itemsize == 2 and columns <= 2**16 and rows * columns < 2**31
    return fits and 0 < int(matrix.count_nonzero()) <= SPARSE * matrix.numel()


def _entries(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows start, in eights, and the words of their entries: see entries.cu."""
    row, column = weight.nonzero(as_tuple=True)
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    gap = column.diff(prepend=column[:1]).masked_fill(first, 0)
    fill = (gap - 1).clamp(min=0) // _STEP  # zeros on the way from the one before
    ends = (fill + 1).cumsum(0)
    which = torch.repeat_interleave(fill + 1)  # of the non-zeros each is or leads to
    left = ends[which] - 1 - torch.arange(len(which), device=row.device)  # steps to it
    counts = torch.zeros(len(weight), dtype=torch.long, device=row.device)
    counts.index_add_(0, row, fill + 1)
    starts = F.pad(((counts + 7) // 8).cumsum(0), (1, 0))
    begins = counts.cumsum(0) - counts
    place = (8 * starts[:-1] - begins)[row[which]] + torch.arange(len(which), device=row.device)
    columns = torch.zeros(8 * int(starts[-1]), dtype=torch.long, device=row.device)
    values = columns.to(weight.dtype)
    columns[place] = (column - gap)[which] + ((fill[which] - left + 1) * _STEP)
    real = left == 0
    columns[place[real]], values[place[real]] = column, weight[row, column]
    return starts.int(), torch.cat([values.view(torch.int32), _codes(columns.view(-1, 8))])


def _codes(columns: Tensor) -> Tensor:
    """Two words of each eight columns: the first, and how far each is behind the one before."""
    steps = columns.diff().clamp(min=0)  # what fills up the last eight of a row stays in place
    shifts = torch.arange(5, device=columns.device) * 6
    low = columns[:, 0] + (steps[:, :2] << 16 + shifts[:2]).sum(1)
    return torch.stack([low, (steps[:, 2:] << shifts).sum(1)], 1).int().flatten()


def _tile_rows(rows: int) -> int:
    """Rows of a tile: as many as leave enough thread blocks, each of which reads all of x."""
    return next((high for high in TILE_ROWS[::-1] if rows >= _BLOCKS * high), TILE_ROWS[0])


def _tiles(weight: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """Where tiles of so many rows begin, in fours of words, and the words: see expand.cu."""
    lines = max(1, _AT_ONCE // max(1, high * weight.shape[1])) * high
    parts = [_words(part, high) for part in torch.split(weight, lines)]
    sizes = torch.cat([size for size, _ in parts])
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).int(), torch.cat([w for _, w in parts])


def _words(weight: Tensor, high: int) -> tuple[Tensor, Tensor]:
    """The sizes of tiles in fours of words, and their words."""
    bits = _pairs(weight, high)
    kept = bits.ne(0)
    counts, lanes = kept.sum(2), torch.arange(32, device=weight.device)
    masks, begins = (kept.long() << lanes).sum(2), counts.cumsum(1) - counts
    head = torch.cat([masks, begins[:, 0::2] | begins[:, 1::2] << 16], 1)
    sizes = (head.shape[1] + counts.sum(1) + 3) // 4
    first = 4 * (sizes.cumsum(0) - sizes)
    words = torch.zeros(4 * int(sizes.sum()), dtype=torch.int32, device=weight.device)
    words[first[:, None] + torch.arange(head.shape[1], device=weight.device)] = _signed(head)
    tile, lane, _ = kept.nonzero(as_tuple=True)
    before = counts.flatten().cumsum(0) - counts.flatten()
    turn = torch.arange(len(tile), device=weight.device) - before[32 * tile + lane]
    words[first[tile] + head.shape[1] + begins[tile, lane] + turn] = bits[kept]
    return sizes, words


def _pairs(weight: Tensor, high: int) -> Tensor:
    """Pairs of neighbours in a row as bits, (tiles, 32 lanes, 32): 0 where both are zero.

    Lane l multiplies of each 16 rows and 32 columns the row l // 4 and the one eight further, of
    each four pairs from column l % 4 * 8 on.
    """
    wide, (rows, columns) = TILE // high, weight.shape
    whole = F.pad(weight + 0, (0, -columns % wide, 0, -rows % high))  # -0 + 0 is 0
    grid = whole.view(-(-rows // high), high // 16, 2, 8, -(-columns // wide), wide // 32, 4, 8)
    lanes = grid.permute(0, 4, 3, 6, 1, 5, 2, 7).contiguous()
    return lanes.view(torch.int16).view(torch.int32).view(-1, 32, 32)


def _signed(words: Tensor) -> Tensor:
    """Numbers of 32 bits without a sign, int64, as those with one that have the same bits."""
    return torch.where(words < 2**31, words, words - 2**32).int()
