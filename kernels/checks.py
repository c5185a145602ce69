"""Is this blob what it says? Every offset and column, before any kernel sees it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels import blob as b


def _rule(holds: bool, thing: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"packed weight: {thing} must be {rule}, got {value}")


def check(blob: b.Bytes) -> None:
    """Checks a whole blob.

    Args:
        blob: (n,) uint8.

    Raises:
        ValueError: names the part that is malformed, the rule and the value.
    """
    record, shape = b.head(blob), b.shape_of(blob)
    _rule(record["bytes"] == len(blob), "bytes", f"its length {len(blob)}", record["bytes"])
    found = b.checksum(blob, 24)
    _rule(record["crc"] == found, "checksum", f"{found:#010x}, that of its bytes", record["crc"])
    _check_shape(record, shape)
    _check_sections(record, shape, len(blob))
    _check_entries(b.entries_of(blob), shape, int(record["nonzeros"]))
    _check_slices(b.slices_of(blob), shape)


def _check_shape(record: Any, shape: b.Shape) -> None:
    kernel, linear = shape.kernel, shape.operation == b.LINEAR
    _rule(shape.dtype in b.DTYPES.values(), "dtype", f"one of {b.DTYPES}", shape.dtype)
    _rule(shape.operation in (b.LINEAR, b.CONV2D), "operation", "1 or 2", shape.operation)
    _rule(shape.rows >= 0 and shape.channels >= 0, "shape", "non-negative", shape.weight_shape)
    _rule(min(kernel) >= 1 and (not linear or kernel == (1, 1)), "kernel", "positive", kernel)
    size = shape.rows * shape.columns
    _rule(size < b.MOST, "size", f"less than {b.MOST} elements", size)
    groups = shape.groups
    _rule(groups >= 1 and shape.rows % groups == 0, "groups", "a divisor of its rows", groups)
    _rule(not linear or groups == 1, "groups", "1 for a linear weight", groups)
    per_group = shape.rows // groups
    _rule(
        shape.block in (1, 4) and per_group % shape.block == 0,
        "block",
        f"1 or 4 and a divisor of {per_group} rows",
        shape.block,
    )
    _rule(record["ordered"] in (0, 1), "ordered", "0 or 1", record["ordered"])
    _rule(record["spare"] == 0, "spare", "0", record["spare"])
    _rule(shape.chunk >= 1, "chunk", "positive", shape.chunk)
    _rule(record["chunks"] == shape.chunks, "chunks", str(shape.chunks), record["chunks"])
    slices = -(-shape.rows // b.SLICE) if linear else 0
    _rule(record["slices"] == slices, "slices", str(slices), record["slices"])
    for name in ("entries", "nonzeros", "steps"):
        _rule(record[name] >= 0, name, "non-negative", record[name])


def _check_sections(record: Any, shape: b.Shape, size: int) -> None:
    offsets, end = b.sections(record, shape)
    for name, offset in zip(b.section_names(), offsets, strict=True):
        _rule(record[name] == offset, f"offset of {name}", str(offset), record[name])
    _rule(end == size, "sections", f"{size} bytes with the header", end)


def _check_starts(name: str, starts: npt.NDArray[np.int32], count: int) -> None:
    whole = starts[0] == 0 and starts[-1] == count and bool((np.diff(starts) >= 0).all())
    _rule(whole, name, f"ascending from 0 to {count}", f"{starts[0]} to {starts[-1]}")


def _check_entries(entries: b.Entries, shape: b.Shape, nonzeros: int) -> None:
    count = len(entries.columns)
    _check_order(entries.order, shape)
    _check_starts("starts", entries.starts, count)
    list_of = np.repeat(np.arange(len(entries.starts) - 1), np.diff(entries.starts))
    low = list_of // max(1, shape.units) * shape.chunk * shape.taps
    high = np.minimum(low + shape.chunk * shape.taps, shape.columns)
    inside = (entries.columns >= low) & (entries.columns < high)
    _rule(bool(inside.all()), "columns", "inside their chunk", entries.columns[~inside][:4])
    ascending = (np.diff(entries.columns) > 0) | (np.diff(list_of) > 0)
    _rule(bool(ascending.all()), "columns", "ascending in each row", "others")
    found = int(np.count_nonzero(entries.values))
    _rule(found == nonzeros, "nonzeros", f"{found}, those of its values", nonzeros)


def _check_order(order: npt.NDArray[np.int32], shape: b.Shape) -> None:
    """Every row of a group has one place in that group."""
    if not shape.ordered:
        return
    _rule(shape.block > 1, "order", "of blocks of rows only", f"block {shape.block}")
    placed = np.sort(order.reshape(shape.groups, -1), axis=1).ravel()
    whole = np.array_equal(placed, np.arange(shape.rows))
    _rule(whole, "order", f"the {shape.rows} rows, each once and in its group", order[:4])


def _check_slices(slices: b.Slices, shape: b.Shape) -> None:
    _check_starts("slice starts", slices.starts, len(slices.bases))
    last = max(0, shape.channels - b.WINDOW)
    inside = (slices.bases >= 0) & (slices.bases <= last)
    _rule(bool(inside.all()), "slice bases", f"in [0, {last}]", slices.bases[~inside][:4])
    wide = slices.lanes >= min(b.WINDOW, max(1, shape.channels))
    _rule(not wide.any(), "slice lanes", "inside their window", slices.lanes[wide][:4])
