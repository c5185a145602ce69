"""Which blocks of a weight are kept: made once of a mask, walked by rows and by columns.

A convolution's weight (out, in, kernel height, kernel width) is seen as a matrix (out, taps * in),
see `flat`: a tap is a position of the kernel, a column is tap * in + channel, and a block lies
within one tap.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

_SHARED = 128 * 128  # sums of a group at most, so that they stay in registers
_GROUP = 2  # blocks of a group at most: of more the last are fewer


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Where the kept blocks of a weight (out, taps * in) lie, for the product and its gradients.

    The place of a block is its number in `values` (blocks, block rows, block columns), where they
    lie row of blocks by row of blocks, in each by column. All tensors are int32.

    Attributes:
        out_features: rows of the weight.
        in_features: columns of the weight, of all taps.
        block: rows and columns of a block.
        lists: (n,), all of the following one after another, so that an operator takes one tensor.
        groups: (groups, 2 + size), up to `size` blocks of a row that lie together: the row, the
            first place, and their columns, -1 where there are fewer; the largest first.
        starts: (rows of blocks + 1,), the place at which each row begins.
        columns: (blocks,), the column of blocks of each place, ascending in a row.
        order: (rows of blocks,), the longest first.
        taps: positions of the kernel, row by row; 1 for a linear layer.
        column_starts: (blocks of input channels + 1,), where those of each begin in the next two.
        rows: (blocks,), walked input channels by input channels: (taps - 1 - tap) * rows of blocks
            + the row of each block, ascending. So these lists are an index of the flipped kernel
            with inputs and outputs exchanged, the one that gives a convolution's input gradient.
        places: (blocks,), its place.
        column_order: (blocks of input channels,), the longest first.
    """

    out_features: int
    in_features: int
    block: tuple[int, int]
    lists: Tensor
    groups: Tensor
    taps: int = 1
    starts: Tensor = field(init=False)
    columns: Tensor = field(init=False)
    order: Tensor = field(init=False)
    column_starts: Tensor = field(init=False)
    rows: Tensor = field(init=False)
    places: Tensor = field(init=False)
    column_order: Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows = self.out_features // self.block[0]
        columns = self.channels // self.block[1]
        count = blocks_of(self.lists, rows, columns)
        sizes = [rows + 1, count, rows, columns + 1, count, count, columns]
        for name, part in zip(_LISTS, torch.split(self.lists, sizes), strict=True):
            object.__setattr__(self, name, part)

    @property
    def channels(self) -> int:
        """Columns of one tap: the input's channels."""
        return self.in_features // self.taps

    def to(self, device: torch.device | str) -> "BlockIndex":
        """The same on a device."""
        return replace(self, lists=self.lists.to(device), groups=self.groups.to(device))


_LISTS = ("starts", "columns", "order", "column_starts", "rows", "places", "column_order")


def blocks_of(lists: Tensor, rows: int, columns: int) -> int:
    """How many blocks the lists name, of a `BlockIndex` of rows x (taps) columns of blocks."""
    return (len(lists) - 2 * (rows + columns + 1)) // 3


def block_index(
    mask: Tensor, block: tuple[int, int], taps: int = 1, group: int | None = None
) -> BlockIndex:
    """The index of the blocks that a mask keeps, on its device; waits for it.

    Args:
        mask: (rows of blocks, taps * columns of blocks) bool, as `block_mask` gives it.
        block: rows and columns of a block; on a GPU each 16, 32, 64 or 128 for the fast kernels.
        taps: positions of a convolution's kernel.
        group: blocks of a row whose gradients are computed together; None: by their size.

    Raises:
        ValueError: the mask is empty or not a matrix of bool, a size is not positive, or the
            columns are not those of so many taps.
    """
    fits = mask.dim() == 2 and mask.dtype is torch.bool and mask.numel() > 0
    positive = min(*block, taps, 1 if group is None else group) > 0
    if not fits or not positive or mask.shape[1] % taps:
        raise ValueError(
            "block_index: needs a bool mask (rows of blocks, taps * columns of blocks), positive "
            f"block, taps and group, got {mask.dtype} {tuple(mask.shape)}, {block}, {taps}, "
            f"{group}"
        )
    group = group or max(1, min(_GROUP, _SHARED // (block[0] * block[1])))
    column, place = mask.nonzero()[:, 1], mask.flatten().cumsum(0).view(mask.shape) - 1
    turned = _turned(mask, taps)
    by_row, by_column = mask.sum(1), turned.sum(1)
    lists = [
        _starts(by_row),
        column,
        by_row.argsort(descending=True, stable=True),
        _starts(by_column),
        turned.nonzero()[:, 1],
        _turned(place, taps)[turned],
        by_column.argsort(descending=True, stable=True),
    ]
    sizes = mask.shape[0] * block[0], mask.shape[1] * block[1]
    groups = _groups(by_row, column, group)
    return BlockIndex(*sizes, block, torch.cat(lists).int(), groups.int(), taps)


def _turned(grid: Tensor, taps: int) -> Tensor:
    """Of (rows, taps * columns) the flipped and transposed (columns, taps * rows)."""
    return grid.unflatten(1, (taps, -1)).flip(1).permute(2, 1, 0).flatten(1)  # type: ignore[no-untyped-call]


def block_mask(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Which blocks of a matrix (out, in) hold a number other than 0, (out / h, in / w) bool.

    Raises:
        ValueError: the weight does not divide into such blocks.
    """
    return _grid(weight, block).ne(0).any(3).any(2)


def gather(weight: Tensor, index: BlockIndex) -> Tensor:
    """The kept blocks of a matrix (out, taps * in): (blocks, h, w); differentiable."""
    return _grid(weight, index.block)[_rows(index), index.columns].contiguous()


def scatter(values: Tensor, index: BlockIndex) -> Tensor:
    """The matrix (out, taps * in) of kept blocks (blocks, h, w), else zeros; differentiable.

    Of values that are `whole` it is a view.
    """
    if is_whole(values):
        return values.reshape(index.out_features, index.in_features)
    rows, height, columns, width = whole_shape(index)
    grid = values.new_zeros(rows, columns, height, width)
    grid = grid.index_put((_rows(index), index.columns), values)
    return grid.transpose(1, 2).reshape(index.out_features, index.in_features)


def whole_of(values: Tensor, index: BlockIndex) -> Tensor:
    """The matrix of kept blocks as (out / h, h, taps * in / w, w): values that hold it whole."""
    return scatter(values, index).view(whole_shape(index))


def masked(values: Tensor, index: BlockIndex) -> Tensor:
    """Whole values with zeros where no block is kept; blocks as they are; differentiable."""
    if not is_whole(values):
        return values
    return whole_of(gather(scatter(values, index), index), index)


def whole_shape(index: BlockIndex) -> tuple[int, int, int, int]:
    """Sizes of values that hold a weight whole."""
    height, width = index.block
    return index.out_features // height, height, index.in_features // width, width


def is_whole(values: Tensor) -> bool:
    """Whether values hold a weight whole, zeros where no block is kept, and not its blocks."""
    return values.dim() == 4


def block_of(values: Tensor) -> tuple[int, ...]:
    """Rows and columns of a block of values, (blocks, h, w) or whole."""
    return values.shape[1::2] if is_whole(values) else values.shape[1:]


def flat(weight: Tensor) -> Tensor:
    """A weight (out, in, kernel height, kernel width) as the matrix (out, taps * in)."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def unflat(weight: Tensor, kernel: tuple[int, int]) -> Tensor:
    """The weight (out, in, *kernel) of a matrix (out, taps * in); channels lie last in memory."""
    return weight.view(len(weight), *kernel, -1).permute(0, 3, 1, 2)


def mask_of(starts: Tensor, columns: Tensor, width: int) -> Tensor:
    """The mask of blocks (rows of blocks, width) of parts of an index that came from elsewhere.

    Raises:
        ValueError: they are no index of such a mask; names the part and the rule.
    """
    counts = starts.long().diff()
    whole = len(starts) > 1 and starts[0] == 0 and starts[-1] == len(columns)
    if not whole or bool((counts < 0).any()):
        raise ValueError(f"block index: starts must be ascending from 0 to {len(columns)}")
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    inside = bool(((columns >= 0) & (columns < width)).all())
    if not inside or not bool(((columns.diff() > 0) | (row.diff() > 0)).all()):
        raise ValueError(f"block index: columns must be in [0, {width}), ascending in each row")
    mask = torch.zeros(len(counts), width, dtype=torch.bool, device=counts.device)
    mask[row, columns] = True
    return mask


def _rows(index: BlockIndex) -> Tensor:
    """The row of blocks of each place."""
    counts = index.starts.diff()
    rows = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(rows, counts, output_size=len(index.columns))


def _grid(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The blocks: (rows of blocks, columns of blocks, h, w)."""
    if weight.dim() != 2 or weight.shape[0] % block[0] or weight.shape[1] % block[1]:
        raise ValueError(
            f"blocks: a weight (out, in) must divide into {block[0]}x{block[1]}, "
            f"got {tuple(weight.shape)}"
        )
    return weight.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).transpose(1, 2)  # type: ignore[no-untyped-call]


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _groups(counts: Tensor, columns: Tensor, size: int) -> Tensor:
    """See `BlockIndex`: a row's blocks in as few groups as can be, about equally large."""
    parts, starts = (counts + size - 1) // size, _starts(counts)
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), parts)
    part = torch.arange(len(row), device=row.device) - _starts(parts)[row]
    first, end = (starts[row] + (part + i) * counts[row] // parts[row] for i in (0, 1))
    within = torch.arange(size, device=row.device)
    place = first[:, None] + within
    kept = torch.cat([columns, columns.new_full((size,), -1)])[place]
    kept = kept.where(place < end[:, None], -1)
    order = (end - first).argsort(descending=True, stable=True)
    return torch.cat([row[:, None], first[:, None], kept], 1)[order]
