"""The bytes of a weight packed for a GPU: a header, an index of its blocks, and their values."""

import warnings
import zlib
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.packed import Packed
from kernels.patterns import pattern_of

VERSION = 1
DENSE, BLOCKS, ENTRIES = 0, 1, 2
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SIZES = (128, 64, 32, 16)  # rows or columns of a block
LARGE = 2**24  # weights from which PyTorch's 2:4 was faster than dense
WORTH = 0.7  # a weight of which more would be stored in blocks is kept dense
UNPACKED = 0.3  # kept in blocks, from which the weight is held unpacked too
SPARSE = 0.35  # kept of a dense weight, up to which its entries are stored beside it
Made = TypeVar("Made", Tensor, Tensor | None)
_MAGIC = b"SNBLOCKS"
_INTS = (
    "rows",
    "channels",
    "block_rows",
    "block_columns",
    "blocks",
    "nonzeros",
    "dtype",
    "kind",
    "kept",
    "spare",
)
_SECTIONS = ("starts", "columns", "values", "tiles", "kept")
HEADER = np.dtype(
    [("magic", "S8"), ("version", "<i4"), ("crc", "<u4"), ("bytes", "<i8")]
    + [(name, "<i4") for name in _INTS]
    + [(f"at_{name}", "<i8") for name in _SECTIONS]
)
_SPACE = 128  # the header and what follows it; sections begin at multiples of this


@dataclass(frozen=True, eq=False)
class Blocks:
    """A packed weight as kernels see it: views of one tensor, and what its header says.

    Attributes:
        rows: output features.
        channels: input features.
        block: (rows, columns) of a block; of a dense weight its shape.
        starts: (rows / block rows + 1,) int32, where each row of blocks begins; or (rows + 1,),
            where each row of entries does, a multiple of 4.
        columns: (blocks,) int32, which column of blocks each is in, ascending in a row; or
            (entries,): a column below, the bits of a value of 16 bits above.
        values: (blocks, block rows, block columns), or (rows, channels) of a dense weight.
        dense: whether the whole weight is stored, perhaps with its entries.
        tiles: (tiles + 1,) int32, or empty: where the entries begin of each tile of 16 rows and 32
            columns, a row of tiles after another.
        kept: (entries,) int32, those of all tiles: a place below, twice what `_tiles` counts, and
            the bits of a value above.
        order: (rows / block rows,) int32, rows of blocks, longest first; made when read.
        two_of_four: the weight as PyTorch's kernels want it where two of every four along a row
            are kept at most and the whole is stored, or None; made when read.
        whole: (rows, channels): `values` of a dense weight; of blocks what they unpack to, where
            so much is kept that PyTorch's product may be the fastest, or None; made when read.
    """

    rows: int
    channels: int
    block: tuple[int, int]
    starts: Tensor
    columns: Tensor
    values: Tensor
    dense: bool
    tiles: Tensor
    kept: Tensor
    order: Tensor
    two_of_four: Tensor | None
    whole: Tensor | None = None

    @property
    def has_entries(self) -> bool:
        """Whether non-zeros are stored one by one beside the whole weight."""
        return self.dense and len(self.starts) > 0


def pack_linear(weight: Tensor) -> Packed:
    """Packs a weight on a GPU: see `kernels.pack_linear`, which calls this.

    Args:
        weight: (out, in), float32, bfloat16 or float16, on a CUDA device; blocks of zeros are left
            out where that saves enough, else it is stored dense, for many tokens; of two bytes and
            with few non-zeros also non-zero by non-zero, for few.

    Raises:
        ValueError: not two dimensions, or another dtype.
    """
    if weight.dim() != 2 or weight.dtype not in DTYPES:
        raise ValueError(
            "pack_linear: weight must be float32, bfloat16 or float16 (out, in), "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    weight = weight.detach()
    block = _block(weight)
    raw = _write(weight, block)
    return Packed(raw, _meta(raw, pattern_of(weight.cpu().ne(0).numpy()[:, :, None])))


def read(data: Tensor) -> Blocks:
    """The parts of a packed weight.

    The index is checked when a tensor is met for the first time or after it was written to; that
    waits for the device. Later calls find what was found then. Of an inference tensor it is not
    seen that it was written to: load such a weight into a new one.

    Raises:
        ValueError: it is malformed, or was not packed for a GPU.
    """
    held: tuple[tuple[int, int], Blocks, list[Tensor | None]] | None = _met.get(data)
    now = (0 if data.is_inference() else data._version, data.data_ptr())
    if held is None or held[0] != now:
        blocks, replaced = _parse(data.detach()), list[Tensor | None]()
        if held is not None:  # a captured graph may still read what was made of the old weight
            replaced = [*held[2], held[1].two_of_four, held[1].whole]
            blocks = replace(blocks, order=_over(held[1].order, blocks.order))
            if not held[1].dense and not blocks.dense:
                blocks = replace(blocks, whole=_over(held[1].whole, blocks.whole))
        _met[data] = held = (now, blocks, replaced)
    return held[1]


def _over(old: Made, new: Made) -> Made:
    """What was made anew, in the place of what it replaces where it fits."""
    if old is None or new is None or (old.shape, old.dtype) != (new.shape, new.dtype):
        return new
    return old.copy_(new)


_met: Any = WeakTensorKeyDictionary()


def validate(data: Tensor, meta: dict[str, Any]) -> None:
    """Checks a packed weight that came from elsewhere, its checksum too.

    Raises:
        ValueError: names what is malformed, the rule and the value.
    """
    blocks = read(data)
    raw = data.cpu().numpy()
    found = _checksum(raw)
    _rule(_head(raw)["crc"] == found, "checksum", f"{found:#010x}", _head(raw)["crc"])
    kept = unpack(blocks).ne(0)
    nonzeros = int(kept.sum())
    _rule(_head(raw)["nonzeros"] == nonzeros, "nonzeros", str(nonzeros), _head(raw)["nonzeros"])
    true = _meta(data, pattern_of(kept.cpu().numpy()[:, :, None]))
    for key in true.keys() | meta.keys():
        _rule(meta.get(key) == true.get(key), f"meta {key}", repr(true.get(key)), meta.get(key))


def unpack(blocks: Blocks) -> Tensor:
    """The dense weight (rows, channels)."""
    if blocks.dense:
        return blocks.values
    height, width = blocks.block
    counts = blocks.starts.diff().long()
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    grid = blocks.values.new_zeros(blocks.rows // height, blocks.channels // width, height, width)
    grid[row, blocks.columns.long()] = blocks.values
    return grid.transpose(1, 2).reshape(blocks.rows, blocks.channels)


def _block(weight: Tensor) -> tuple[int, int] | None:
    """The largest block that stores about as little as any; None where dense is as good."""
    stored: dict[tuple[int, int], int] = {}
    for height in SIZES:
        for width in SIZES:
            if weight.shape[0] % height == 0 and weight.shape[1] % width == 0:
                kept = _grid(weight, height, width).ne(0).any(3).any(2)
                stored[height, width] = int(kept.sum()) * height * width
    least = min(stored.values(), default=weight.numel())
    if not weight.numel() or least > WORTH * weight.numel():
        return None
    return max(block for block, size in stored.items() if size <= 1.1 * least)


def _grid(weight: Tensor, height: int, width: int) -> Tensor:
    """The blocks: (rows of blocks, columns of blocks, height, width)."""
    rows, channels = weight.shape
    return weight.reshape(rows // height, height, channels // width, width).transpose(1, 2)


def _write(weight: Tensor, block: tuple[int, int] | None) -> Tensor:
    rows, channels = weight.shape
    starts = columns = tiles = kept = torch.zeros(0, dtype=torch.int32, device=weight.device)
    values, kind = weight.contiguous(), DENSE if block is None else BLOCKS
    if block is None and _has_entries(weight):
        (starts, columns), kind = _entries(values), ENTRIES
        if rows % 16 == 0 and channels % 32 == 0:
            tiles, kept = _tiles(values)
    elif block is not None:
        grid = _grid(weight, *block)
        full = grid.ne(0).any(3).any(2)
        starts = torch.cat([starts.new_zeros(1), full.sum(1).cumsum(0).int()])
        columns, values = full.nonzero()[:, 1].int(), grid[full].contiguous()
    head = np.zeros((), HEADER)
    head["magic"], head["version"], head["kind"] = _MAGIC, VERSION, kind
    head["rows"], head["channels"], head["dtype"] = rows, channels, DTYPES[weight.dtype]
    head["block_rows"], head["block_columns"] = block or (rows, channels)
    head["blocks"], head["nonzeros"] = len(columns), int(weight.count_nonzero())
    head["kept"] = len(kept)
    parts = (starts, columns, values, tiles, kept)
    offsets, head["bytes"] = _offsets([part.nbytes for part in parts])
    raw = torch.zeros(int(head["bytes"]), dtype=torch.uint8, device=weight.device)
    for name, offset, part in zip(_SECTIONS, offsets, parts, strict=True):
        head[f"at_{name}"] = offset
        raw[offset : offset + part.nbytes] = part.view(torch.uint8).flatten()
    head["crc"] = _checksum(raw.cpu().numpy())
    raw[: HEADER.itemsize] = torch.from_numpy(head.reshape(1).view(np.uint8)).to(raw.device)
    return raw


def _has_entries(weight: Tensor) -> bool:
    rows, channels = weight.shape
    fits = weight.itemsize == 2 and channels <= 2**16 and rows * channels < 2**31
    return fits and 0 < int(weight.count_nonzero()) <= SPARSE * weight.numel()


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
    bits = tiles[tile, place].view(torch.int16).int()
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return starts.int(), 2 * place.int() | (bits << 16)


def _offsets(sizes: list[int]) -> tuple[list[int], int]:
    offsets, end = [], _SPACE
    for size in sizes:
        offsets.append(end)
        end += -(-size // _SPACE) * _SPACE
    return offsets, end


def _checksum(raw: npt.NDArray[np.uint8]) -> int:
    """CRC-32 of all behind the header."""
    return zlib.crc32(raw[_SPACE:].data)


def _rule(holds: bool, thing: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"packed weight: {thing} must be {rule}, got {value}")


def _head(raw: npt.NDArray[np.uint8]) -> Any:
    _rule(len(raw) >= _SPACE, "size", f"at least {_SPACE} bytes", len(raw))
    head = raw[: HEADER.itemsize].view(HEADER)[0]
    known = bytes(head["magic"]) == _MAGIC
    _rule(known, "magic", f"{_MAGIC!r}, as packed from a weight on a GPU", bytes(head["magic"]))
    _rule(head["version"] == VERSION, "format", str(VERSION), head["version"])
    return head


def _parse(data: Tensor) -> Blocks:
    _rule(data.data_ptr() % 16 == 0, "data", "at a multiple of 16 bytes", data.data_ptr())
    fits = data.dtype is torch.uint8 and data.dim() == 1 and data.is_contiguous()
    _rule(fits, "data", "contiguous (n,) uint8", f"{tuple(data.shape)} {data.dtype}")
    head = _head(data[:_SPACE].cpu().numpy())
    rows, channels, height, width, count, _ = (int(head[name]) for name in _INTS[:6])
    dtype, kind, kept, spare = (int(head[name]) for name in _INTS[6:])
    _rule(spare == 0, "spare", "0", spare)
    _rule(kind in (DENSE, BLOCKS, ENTRIES), "kind", "0, 1 or 2", kind)
    _rule(dtype in DTYPES.values(), "dtype", "0, 1 or 2", dtype)
    _rule(min(rows, channels, count, kept) >= 0, "shape", "non-negative", (rows, channels, count))
    if kind == BLOCKS:
        whole = {height, width} <= set(SIZES) and rows % height == 0 and channels % width == 0
        _rule(whole, "block", f"of {SIZES}, a divisor of {(rows, channels)}", (height, width))
    else:
        _rule((height, width) == (rows, channels), "block", "the whole", (height, width))
    stored = next(known for known, number in DTYPES.items() if number == dtype)
    lines = {DENSE: 0, ENTRIES: rows + 1}.get(kind, rows // max(1, height) + 1)
    _rule(kind != DENSE or count == 0, "entries", "none", count)
    _rule(kind != ENTRIES or stored.itemsize == 2, "dtype of entries", "of 2 bytes", stored)
    size = count * height * width if kind == BLOCKS else rows * channels
    tiled = kind == ENTRIES and rows % 16 == 0 and channels % 32 == 0
    tiles = rows * channels // 512 if tiled else 0
    _rule(tiled or kept == 0, "kept", "none", kept)
    lengths = [4 * lines, 4 * count, size * stored.itemsize]
    lengths += [4 * (tiles + tiled), 4 * kept]
    offsets, end = _offsets(lengths)
    _rule(
        [int(head[f"at_{n}"]) for n in _SECTIONS] == offsets, "sections", f"at {offsets}", "others"
    )
    _rule(int(head["bytes"]) == end == len(data), "bytes", str(end), (head["bytes"], len(data)))
    parts = [data[o : o + n] for o, n in zip(offsets, lengths, strict=True)]
    starts, columns = (part.view(torch.int32) for part in parts[:2])
    values = parts[2].view(stored)
    whole = kind != BLOCKS
    values = values.view(rows, channels) if whole else values.view(count, height, width)
    order = starts.diff().argsort(descending=True, stable=True).int()
    tail = (parts[3].view(torch.int32), parts[4].view(torch.int32), order)
    semi = _two_of_four(values) if whole else None
    blocks = Blocks(rows, channels, (height, width), starts, columns, values, whole, *tail, semi)
    _check_index(blocks)
    return replace(blocks, whole=_whole(blocks))


def _whole(blocks: Blocks) -> Tensor | None:
    """See `Blocks.whole`."""
    little = blocks.values.numel() <= UNPACKED * blocks.rows * blocks.channels
    return None if little and not blocks.dense else unpack(blocks)


def _two_of_four(weight: Tensor) -> Tensor | None:
    """See `Blocks`; PyTorch wants bfloat16 or float16 on a GPU and multiples of 64."""
    fits = weight.is_cuda and weight.itemsize == 2 and weight.numel() >= LARGE
    if not fits or weight.shape[0] % 64 or weight.shape[1] % 64:
        return None
    if int(weight.ne(0).unflatten(1, (-1, 4)).sum(2).max()) > 2:  # type: ignore[no-untyped-call]
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that it is a prototype
        try:
            semi: Tensor = torch.sparse.to_sparse_semi_structured(weight)
        except RuntimeError:  # neither of PyTorch's two ways to compute it is there
            return None
    return semi


def _check_index(blocks: Blocks) -> None:
    if not len(blocks.starts):
        return
    if blocks.has_entries:
        width, every, column = blocks.channels, 4, blocks.columns & 0xFFFF
    else:
        width, every, column = blocks.channels // blocks.block[1], 1, blocks.columns
    _check_starts("starts", blocks.starts, len(column), every)
    inside = bool(((column >= 0) & (column < width)).all())
    _rule(inside, "columns", f"in [0, {width})", "others")
    if not blocks.has_entries:
        counts = blocks.starts.diff()
        row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        ascending = bool(((column.diff() > 0) | (row.diff() > 0)).all())
        _rule(ascending, "columns", "ascending in each row", "others")
    if len(blocks.tiles):
        _check_starts("tiles", blocks.tiles, len(blocks.kept), 1)
        place = blocks.kept & 0xFFFF
        inside = bool(((place < 1024) & (place % 2 == 0)).all())
        _rule(inside, "places", "even and less than 1024", "others")


def _check_starts(name: str, starts: Tensor, count: int, every: int) -> None:
    steps = starts.long().diff()  # of 32 bits a difference may wrap around
    ascending = (starts[0] == 0) & (starts[-1] == count) & (steps >= 0).all()
    whole = bool(ascending & (starts % every == 0).all())
    _rule(whole, name, f"ascending from 0 to {count} by multiples of {every}", starts.tolist()[:4])


def _meta(data: Tensor, pattern: str) -> dict[str, Any]:
    head = _head(data[:_SPACE].cpu().numpy())
    block = f"{head['block_rows']}x{head['block_columns']}"
    stored = next(known for known, number in DTYPES.items() if number == head["dtype"])
    return {
        "format": VERSION,
        "operation": "sparse_linear",
        "device": "cuda",
        "shape": [int(head["rows"]), int(head["channels"])],
        "dtype": str(stored).removeprefix("torch."),
        "pattern": pattern,
        "block": {DENSE: "dense", ENTRIES: "1x1"}.get(int(head["kind"]), block),
        "nonzeros": int(head["nonzeros"]),
    }
