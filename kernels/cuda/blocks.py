"""A packed weight as GPU kernels see it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

LINEAR, CONV2D = 1, 2
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SIZES = (128, 64, 32, 16)  # rows or columns of a block
# Kept in blocks of so many rows, up to which they were faster than dense, by the bytes of a value:
# of up to MANY tokens or pixels, and of more. Where more is kept than the first says, dense may be
# faster, and the weight is held unpacked too.
MANY = 1024
PAYS = {
    2: {16: (0.03, 0.07), 32: (0.06, 0.23), 64: (0.18, 0.5), 128: (0.2, 0.7)},
    4: {16: (0.05, 0.14), 32: (0.05, 0.2), 64: (0.05, 0.4), 128: (0.03, 0.4)},
}
TILE, TILE_ROWS = 2048, (16, 32, 64)  # weights of a tile
EIGHT = 6  # words of eight entries


@dataclass(frozen=True)
class Form:
    """What a packed matrix is the weight of.

    Attributes:
        operation: `LINEAR` or `CONV2D`.
        kernel: (height, width); of a convolution the columns are its positions, at each of them
            the input channels of a group.
        groups: of a convolution.
    """

    operation: int
    kernel: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.kernel[0] * self.kernel[1]

    def weight(self, matrix: Tensor) -> Tensor:
        """A view of (rows, columns) as the layer holds it; of a convolution channels last."""
        if self.operation == LINEAR:
            return matrix
        channels = matrix.shape[1] // self.taps
        return matrix.view(len(matrix), *self.kernel, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A packed weight as kernels see it: views of one tensor, and what its header says.

    Attributes:
        form: what it is the weight of.
        rows: output features or channels.
        channels: columns of the matrix: input features, or kernel positions times input channels.
        block: (rows, columns) of a block; of a weight that is not in blocks its shape.
        starts: (rows / block rows + 1,) int32, where each row of blocks begins; or (rows + 1,),
            where each row of entries does, in eights.
        columns: (blocks,) int32, which column of blocks each is in, ascending in a row; or
            (words,) of entries as entries.cu describes them: the values of all eights, then their
            columns; or which rows are kept of a channel pattern, ascending.
        values: (blocks, block rows, block columns), or (rows, channels) of a dense weight, or
            (rows kept, channels) of a channel pattern.
        dense: whether the whole weight is stored, perhaps with its entries.
        tiles: (tiles + 1,) int32, or empty: where in `pairs` each tile of `TILE` weights begins,
            in fours, a row of tiles after another.
        pairs: (words,) int32, all tiles as expand.cu describes them: of each the pairs of
            neighbours in a row that are not both zero.
        tile_rows: of a tile, one of `TILE_ROWS`; 0 without tiles.
        order: (rows / block rows,) int32, rows of blocks, longest first, or int64 the rows that
            are kept of a channel pattern; made when read.
        two_of_four: the weight as cuSPARSELt wants it where two of every four along a row are kept
            at most, the whole is stored and it has no `halves`, or None; made when read.
        longest: most blocks of a row of blocks; found when read.
        room: bytes of the largest tile; found when read.
        halves: the weight as halves.cu wants it where it reads that, or None; made when read.
        blank: what `halves` was, of no numbers, while the weight is no more two of every four.
        plans: which tiles thread blocks of hopper.cu take, by how many tiles of tokens there are;
            made when needed. Of a weight that is written over they stay right, for a graph too.
        planned: which of them were made for these blocks.
        whole: (rows, channels): `values` of a dense weight; of blocks what they unpack to, where
            so much is kept that PyTorch's product may be the fastest, or None; made when read.
    """

    form: Form
    rows: int
    channels: int
    block: tuple[int, int]
    starts: Tensor
    columns: Tensor
    values: Tensor
    dense: bool
    tiles: Tensor
    pairs: Tensor
    tile_rows: int
    order: Tensor
    two_of_four: Tensor | None
    longest: int = 0
    room: int = 0
    whole: Tensor | None = None
    halves: Tensor | None = None
    blank: Tensor | None = None
    plans: dict[int, list[Tensor]] = field(default_factory=dict)
    planned: set[int] = field(default_factory=set)

    @property
    def has_entries(self) -> bool:
        """Whether non-zeros are stored one by one beside the whole weight."""
        return self.dense and len(self.starts) > 0

    @property
    def entries(self) -> int:
        """How many non-zeros are stored one by one, with zeros that fill up their eights."""
        return len(self.columns) // EIGHT * 8 if self.has_entries else 0

    @property
    def share(self) -> float:
        """Of all weights, those stored one by one."""
        return self.entries / max(1, self.rows * self.channels)

    @property
    def in_blocks(self) -> bool:
        """Whether blocks are stored."""
        return not self.dense and not self.is_channel

    @property
    def kept(self) -> float:
        """Of all weights, those in blocks."""
        return self.values.numel() / max(1, self.rows * self.channels)

    def pays(self, tokens: int, kept: float) -> bool:
        """Whether so many tokens or pixels are faster than dense, by a rule of thumb."""
        return kept <= PAYS[self.values.itemsize][self.block[0]][tokens > MANY]

    @property
    def is_channel(self) -> bool:
        """Whether whole rows are stored, and others are zero."""
        return not self.dense and len(self.starts) == 0
