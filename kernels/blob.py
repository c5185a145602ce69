"""The bytes of a packed weight: a header, then sections of starts, columns and values."""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

VERSION = 2
LINEAR, CONV2D = 1, 2
DTYPES = {"float32": 0, "bfloat16": 1}
_NUMPY = ("<f4", "<u2")
SLICE, WINDOW = 16, 32
MOST = 2**29  # elements of a dense weight
_MAGIC = b"SNWEIGHT"
_INTS = ("rows", "channels", "kernel_h", "kernel_w", "groups", "block", "chunk", "chunks")
_COUNTS = ("entries", "nonzeros", "slices", "steps")
_SECTIONS = ("order", "starts", "columns", "values")
_SLICED = ("slice_starts", "slice_bases", "slice_lanes", "slice_values")
HEADER = np.dtype(
    [("magic", "S8"), ("version", "<i4"), ("operation", "<i4"), ("bytes", "<i8"), ("crc", "<u4")]
    + [(name, "<i4") for name in (*_INTS, *_COUNTS, "dtype", "ordered", "spare")]
    + [(name, "<i8") for name in (*_SECTIONS, *_SLICED)]
)


@dataclass(frozen=True)
class Shape:
    """What a blob's header says of its weight.

    Attributes:
        operation: `LINEAR` or `CONV2D`.
        rows: output features or channels.
        channels: input features, or input channels of one group.
        kernel: (height, width); (1, 1) for a linear weight.
        groups: groups of a convolution.
        block: rows that share their columns: 1 or 4.
        chunk: input channels that are worked through before the next.
        dtype: of the values, one of `DTYPES`; sums are always float32.
        ordered: whether rows lie in an order of their own.
    """

    operation: int
    rows: int
    channels: int
    kernel: tuple[int, int]
    groups: int
    block: int
    chunk: int
    dtype: int = 0
    ordered: bool = False

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return self.kernel[0] * self.kernel[1]

    @property
    def columns(self) -> int:
        """Columns of a row: input channels of a group times kernel positions."""
        return self.channels * self.taps

    @property
    def chunks(self) -> int:
        """Chunks of input channels, at least one."""
        return max(1, -(-self.channels // self.chunk))

    @property
    def units(self) -> int:
        """Blocks of rows."""
        return self.rows // self.block

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        if self.operation == LINEAR:
            return (self.rows, self.channels)
        return (self.rows, self.channels, *self.kernel)


@dataclass(frozen=True)
class Entries:
    """Non-zeros by (chunk, unit, column).

    Starts are (chunks * units + 1,), columns (n,), values (n, block). Order is (rows,), the row at
    each place, or empty where rows lie by their numbers.
    """

    order: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]
    columns: npt.NDArray[np.int32]
    values: Floats


@dataclass(frozen=True)
class Slices:
    """Sixteen rows at a time, for few samples.

    Step i of a slice has a window of 32 columns from `bases[i]`; lane l multiplies column
    `bases[i] + lanes[i, l]` by `values[i, l]`. A lane with nothing to do has value 0.
    """

    starts: npt.NDArray[np.int32]
    bases: npt.NDArray[np.int32]
    lanes: npt.NDArray[np.uint8]
    values: Floats


def no_slices(count: int) -> Slices:
    """That many slices, all empty."""
    lanes, values = np.zeros((0, SLICE), np.uint8), np.zeros((0, SLICE), np.float32)
    return Slices(np.zeros(count + 1, np.int32), np.zeros(0, np.int32), lanes, values)


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


def _offsets(sizes: list[int]) -> tuple[list[int], int]:
    """Byte offset of each section, and the size of the whole."""
    offsets, end = [], _aligned(HEADER.itemsize)
    for size in sizes:
        offsets.append(end)
        end += _aligned(size)
    return offsets, end


def write(shape: Shape, entries: Entries, slices: Slices, nonzeros: int) -> Bytes:
    """The blob as (n,) uint8."""
    parts: list[npt.NDArray[Any]] = [entries.order, entries.starts, entries.columns]
    parts += [_stored(entries.values, shape), slices.starts, slices.bases, slices.lanes]
    parts += [_stored(slices.values, shape)]
    offsets, end = _offsets([part.nbytes for part in parts])
    blob = np.zeros(end, np.uint8)
    for part, offset in zip(parts, offsets, strict=True):
        blob[offset : offset + part.nbytes] = np.ascontiguousarray(part).view(np.uint8).ravel()
    counts = (len(entries.columns), nonzeros, len(slices.starts) - 1, len(slices.bases))
    ints = (shape.rows, shape.channels, *shape.kernel, shape.groups, shape.block, shape.chunk)
    head = (_MAGIC, VERSION, shape.operation, end, 0, *ints, shape.chunks, *counts)
    stored = (shape.dtype, shape.ordered, 0)
    blob[: HEADER.itemsize] = np.array([(*head, *stored, *offsets)], HEADER).view(np.uint8)
    return seal(blob, 24)


def seal(blob: Bytes, place: int) -> Bytes:
    """Writes the checksum of all other bytes into the four at `place`."""
    blob[place : place + 4] = np.array([checksum(blob, place)], "<u4").view(np.uint8)
    return blob


def checksum(blob: Bytes, place: int) -> int:
    """CRC-32 of a blob, its own four bytes at `place` left out."""
    return zlib.crc32(blob[place + 4 :].data, zlib.crc32(blob[:place].data))


def head(blob: Bytes) -> Any:
    """The header as a numpy record.

    Raises:
        ValueError: too short, or not a packed weight of this format.
    """
    if len(blob) < HEADER.itemsize:
        raise ValueError(f"packed weight: needs at least {HEADER.itemsize} bytes, got {len(blob)}")
    record = blob[: HEADER.itemsize].view(HEADER)[0]
    if bytes(record["magic"]) != _MAGIC:
        found = bytes(record["magic"])
        raise ValueError(f"packed weight: magic must be {_MAGIC!r}, got {found!r}")
    if record["version"] != VERSION:
        raise ValueError(f"packed weight: format {VERSION} is read here, got {record['version']}")
    return record


def shape_of(blob: Bytes) -> Shape:
    """The `Shape` that a header names; header checked for being one, values not."""
    record = head(blob)
    rows, channels, height, width, groups, block, chunk, _ = (int(record[n]) for n in _INTS)
    kernel, stored = (height, width), (int(record["dtype"]), record["ordered"] != 0)
    return Shape(int(record["operation"]), rows, channels, kernel, groups, block, chunk, *stored)


def _section(blob: Bytes, offset: int, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return blob[offset : offset + size].view(dtype).reshape(shape)


def _stored(values: Floats, shape: Shape) -> npt.NDArray[Any]:
    """Values as they lie in a blob; those of bfloat16 are already rounded."""
    return values if shape.dtype == 0 else (values.view("<u4") >> 16).astype("<u2")


def _values(blob: Bytes, offset: int, dtype: int, shape: tuple[int, ...]) -> Floats:
    """Values as float32: views where that is how they lie."""
    held = _section(blob, offset, _NUMPY[dtype], shape)
    return held if dtype == 0 else (held.astype("<u4") << 16).view("<f4")


def entries_of(blob: Bytes) -> Entries:
    """The non-zeros of a blob that `check` has passed; views but for values of bfloat16."""
    record, shape = head(blob), shape_of(blob)
    count = int(record["entries"])
    return Entries(
        _section(blob, record["order"], "<i4", (shape.rows * shape.ordered,)),
        _section(blob, record["starts"], "<i4", (shape.chunks * shape.units + 1,)),
        _section(blob, record["columns"], "<i4", (count,)),
        _values(blob, record["values"], shape.dtype, (count, shape.block)),
    )


def slices_of(blob: Bytes) -> Slices:
    """The sliced rows of a blob that `check` has passed; views as those of `entries_of`."""
    record = head(blob)
    steps = int(record["steps"])
    return Slices(
        _section(blob, record["slice_starts"], "<i4", (int(record["slices"]) + 1,)),
        _section(blob, record["slice_bases"], "<i4", (steps,)),
        _section(blob, record["slice_lanes"], "u1", (steps, SLICE)),
        _values(blob, record["slice_values"], int(record["dtype"]), (steps, SLICE)),
    )


def sections(record: Any, shape: Shape) -> tuple[list[int], int]:
    """Where the sections must lie by the header's counts, and the bytes of the whole."""
    entries, steps = int(record["entries"]), int(record["steps"])
    value = np.dtype(_NUMPY[shape.dtype]).itemsize
    sizes = [4 * shape.rows * shape.ordered, 4 * (shape.chunks * shape.units + 1), 4 * entries]
    sizes += [value * entries * shape.block]
    sizes += [4 * (int(record["slices"]) + 1), 4 * steps, SLICE * steps, value * SLICE * steps]
    return _offsets(sizes)


def section_names() -> tuple[str, ...]:
    """Header fields that hold byte offsets, in their order."""
    return (*_SECTIONS, *_SLICED)
