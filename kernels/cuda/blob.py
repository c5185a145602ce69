"""The bytes of a weight packed for a GPU: a header, an index of its blocks, and their values."""

import zlib
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from kernels.cuda import halves, two_of_four
from kernels.cuda.blocks import (
    CONV2D,
    DTYPES,
    EIGHT,
    LINEAR,
    SIZES,
    TILE,
    TILE_ROWS,
    Blocks,
    Form,
)
from kernels.cuda.checks import check_index, rule
from kernels.cuda.driver import has_triton
from kernels.patterns import pattern_of

VERSION = 4
OPERATIONS = {LINEAR: "sparse_linear", CONV2D: "sparse_conv2d"}
DENSE, BLOCKS, ENTRIES, CHANNEL = 0, 1, 2, 3
_MAGIC = b"SNBLOCKS"
_INTS = (
    "rows",
    "columns",
    "block_rows",
    "block_columns",
    "blocks",
    "nonzeros",
    "dtype",
    "kind",
    "words",
    "operation",
    "kernel_h",
    "kernel_w",
    "groups",
    "tile_rows",
)
_SECTIONS = ("starts", "columns", "values", "tiles", "pairs")
HEADER = np.dtype(
    [("magic", "S8"), ("version", "<i4"), ("crc", "<u4"), ("bytes", "<i8")]
    + [(name, "<i4") for name in _INTS]
    + [(f"at_{name}", "<i8") for name in _SECTIONS]
)
_SPACE = 128  # the header and what follows it; sections begin at multiples of this


def read(data: Tensor) -> Blocks:
    """The parts of a packed weight.

    The index is checked when a tensor is met for the first time or after it was written to; that
    waits for the device. Later calls find what was found then. Of an inference tensor, and where
    its `.data` is written to, that is not seen: load such a weight into a new one. A graph that
    was captured before needs one call like this, outside of it, once a weight was written to; one
    of cuSPARSELt stays with the old weight where the new one is not two of every four.

    Raises:
        ValueError: it is malformed, or was not packed for a GPU.
    """
    held: tuple[tuple[int, int], Blocks, list[Tensor | None]] | None = _met.get(data)
    now = (0 if data.is_inference() else data._version, data.data_ptr())
    if held is None or held[0] != now:
        with torch.inference_mode(False), torch.no_grad():  # what is made outlives the mode
            blocks, replaced = _parse(data.detach()), list[Tensor | None]()
            if held is not None:
                blocks, replaced = _over(held[1], blocks), held[2]
                replaced += _left(held[1], blocks)
        if data.is_cuda:  # another stream may use it next
            torch.cuda.current_stream(data.device).synchronize()
        _met[data] = held = (now, blocks, replaced)
    return held[1]


def _over(old: Blocks, new: Blocks) -> Blocks:
    """What was made anew, in the place of what it replaces where it fits: a graph may read it."""
    names = ["order", "two_of_four", *(["whole"] if not (old.dense or new.dense) else [])]
    made: dict[str, Any] = {n: _copied(getattr(old, n), getattr(new, n)) for n in names}
    was = old.halves if old.halves is not None else old.blank
    made["halves"] = _copied(was, new.halves)
    made["blank"] = was if new.halves is None else None
    if old.halves is not None and new.halves is None:  # a graph that reads it gives no number
        old.halves[: old.rows * old.channels // 4] = _NO_NUMBERS
    if (old.rows, old.block) == (new.rows, new.block):
        made["plans"] = old.plans
    return replace(new, **made)


def _copied(old: Tensor | None, new: Tensor | None) -> Any:
    """What replaces an old tensor, in its place where it fits: a graph may read that."""
    if old is None or new is None:
        return new
    alike = (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
    return old.copy_(new) if alike else new


def _left(old: Blocks, new: Blocks) -> list[Tensor | None]:
    """What was made of the old weight and not written over, which a graph may still read."""
    pairs = ((getattr(old, name), getattr(new, name)) for name in _MADE)
    left = [before for before, now in pairs if before is not None and before is not now]
    return left if new.plans is old.plans else [*left, *chain(*old.plans.values())]


_NO_NUMBERS = 0x7FFF7FFF  # two of them, in bfloat16 or float16
_MADE = ("order", "two_of_four", "halves", "whole")  # of a weight when it is read
_met: Any = WeakTensorKeyDictionary()


def validate(data: Tensor, meta: dict[str, Any]) -> None:
    """Checks a packed weight that came from elsewhere, its checksum too.

    Raises:
        ValueError: names what is malformed, the rule and the value.
    """
    _is_bytes(data)
    raw = data.cpu().numpy()
    head, found = _head(raw), _checksum(raw)
    rule(head["crc"] == found, "checksum", f"{found:#010x}", head["crc"])
    _lengths(head, _form(head))
    said = meta_of(data, "") | {"pattern": meta.get("pattern")}
    _agree(meta, said)  # before memory is taken for a size that the description does not have
    blocks = read(data)
    matrix = unpack(blocks)
    nonzeros = int(matrix.count_nonzero())
    rule(head["nonzeros"] == nonzeros, "nonzeros", str(nonzeros), head["nonzeros"])
    _agree(meta, meta_of(data, pattern(matrix, blocks.form)))


def _agree(meta: dict[str, Any], true: dict[str, Any]) -> None:
    for key in true.keys() | meta.keys():
        rule(meta.get(key) == true.get(key), f"meta {key}", repr(true.get(key)), meta.get(key))


def _is_bytes(data: Tensor) -> None:
    rule(data.data_ptr() % 16 == 0, "data", "at a multiple of 16 bytes", data.data_ptr())
    fits = data.dtype is torch.uint8 and data.dim() == 1 and data.is_contiguous()
    rule(fits, "data", "contiguous (n,) uint8", f"{tuple(data.shape)} {data.dtype}")


def write(head: Any, parts: tuple[Tensor, ...]) -> Tensor:
    """The bytes of a header, of which offsets and checksum are filled in here, and of sections."""
    offsets, head["bytes"] = _offsets([part.nbytes for part in parts])
    raw = torch.zeros(int(head["bytes"]), dtype=torch.uint8, device=parts[0].device)
    for name, offset, part in zip(_SECTIONS, offsets, parts, strict=True):
        head[f"at_{name}"] = offset
        raw[offset : offset + part.nbytes] = part.view(torch.uint8).flatten()
    head["magic"], head["version"] = _MAGIC, VERSION
    head["crc"] = _checksum(raw.cpu().numpy())
    raw[: HEADER.itemsize] = torch.from_numpy(head.reshape(1).view(np.uint8)).to(raw.device)
    return raw


def unpack(blocks: Blocks) -> Tensor:
    """The dense weight as a matrix (rows, channels)."""
    if blocks.dense:
        return blocks.values
    if blocks.is_channel:
        zeros = blocks.values.new_zeros(blocks.rows, blocks.channels)
        return zeros.index_copy_(0, blocks.order, blocks.values)
    height, width = blocks.block
    counts = blocks.starts.diff().long()
    row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    grid = blocks.values.new_zeros(blocks.rows // height, blocks.channels // width, height, width)
    grid[row, blocks.columns.long()] = blocks.values
    return grid.transpose(1, 2).reshape(blocks.rows, blocks.channels)


def _offsets(sizes: list[int]) -> tuple[list[int], int]:
    offsets, end = [], _SPACE
    for size in sizes:
        offsets.append(end)
        end += -(-size // _SPACE) * _SPACE
    return offsets, end


def _checksum(raw: npt.NDArray[np.uint8]) -> int:
    """CRC-32 of all behind the header."""
    return zlib.crc32(raw[_SPACE:].data)


def _head(raw: npt.NDArray[np.uint8]) -> Any:
    rule(len(raw) >= _SPACE, "size", f"at least {_SPACE} bytes", len(raw))
    head = raw[: HEADER.itemsize].view(HEADER)[0]
    known = bytes(head["magic"]) == _MAGIC
    rule(known, "magic", f"{_MAGIC!r}, as packed from a weight on a GPU", bytes(head["magic"]))
    rule(head["version"] == VERSION, "format", str(VERSION), head["version"])
    return head


def _parse(data: Tensor) -> Blocks:
    _is_bytes(data)
    head = _head(data[:_SPACE].cpu().numpy())
    form = _form(head)
    stored, lengths = _lengths(head, form)
    offsets, end = _offsets(lengths)
    found = [int(head[f"at_{name}"]) for name in _SECTIONS]
    rule(found == offsets, "sections", f"at {offsets}", found)
    rule(int(head["bytes"]) == end == len(data), "bytes", str(end), (head["bytes"], len(data)))
    parts = [data[o : o + n] for o, n in zip(offsets, lengths, strict=True)]
    starts, columns, tiles, pairs = (parts[i].view(torch.int32) for i in (0, 1, 3, 4))
    rows, channels, height, width, count, _ = (int(head[name]) for name in _INTS[:6])
    kind = int(head["kind"])
    shapes = {BLOCKS: (count, height, width), CHANNEL: (count, channels)}
    values = parts[2].view(stored).view(shapes.get(kind, (rows, channels)))
    order = starts.diff().argsort(descending=True, stable=True).int()
    order = columns.long() if kind == CHANNEL else order
    whole = kind in (DENSE, ENTRIES)
    may = 2 * int(head["nonzeros"]) <= rows * channels  # be two of every four
    plain = whole and may and form.taps == form.groups == 1
    half = halves.compressed(values) if plain else None
    semi = two_of_four.compressed(values) if plain and half is None else None
    sizes = (form, rows, channels, (height, width))
    tiled = (tiles, pairs, int(head["tile_rows"]))
    blocks = Blocks(*sizes, starts, columns, values, whole, *tiled, order, semi)
    check_index(blocks)
    longest = _longest(starts) if blocks.in_blocks else 0
    made: dict[str, Any] = {"whole": _whole(blocks), "halves": half}
    return replace(blocks, **made, longest=longest, room=16 * _longest(tiles))


def _longest(starts: Tensor) -> int:
    return int(starts.diff().max()) if len(starts) > 1 else 0


def _lengths(head: Any, form: Form) -> tuple[torch.dtype, list[int]]:
    """The dtype of values, and how many bytes the sections have."""
    rows, channels, height, width, count, _ = (int(head[name]) for name in _INTS[:6])
    dtype, kind, words = (int(head[name]) for name in _INTS[6:9])
    rule(kind in (DENSE, BLOCKS, ENTRIES, CHANNEL), "kind", "0, 1, 2 or 3", kind)
    rule(dtype in DTYPES.values(), "dtype", "0, 1 or 2", dtype)
    rule(min(rows, channels, count, words) >= 0, "shape", "non-negative", (rows, channels, count))
    if kind == BLOCKS:
        within = channels // form.taps
        whole = {height, width} <= set(SIZES) and rows % height == 0 and within % width == 0
        rule(whole, "block", f"of {SIZES}, a divisor of {(rows, within)}", (height, width))
        rule(form.groups == 1, "groups of blocks", "1", form.groups)
    else:
        rule((height, width) == (rows, channels), "block", "the whole", (height, width))
    stored = next(known for known, number in DTYPES.items() if number == dtype)
    rule(kind != DENSE or count == 0, "entries", "none", count)
    rule(kind != ENTRIES or count % EIGHT == 0, "words of entries", f"in {EIGHT}s", count)
    rule(kind != ENTRIES or stored.itemsize == 2, "dtype of entries", "of 2 bytes", stored)
    rule(kind != ENTRIES or form.taps == form.groups == 1, "kernel of entries", "1x1", form)
    rule(kind != CHANNEL or form.groups == 1, "groups of a channel pattern", "1", form.groups)
    lines = {DENSE: 0, CHANNEL: 0, ENTRIES: rows + 1}.get(kind, rows // max(1, height) + 1)
    size = {BLOCKS: count * height * width, CHANNEL: count * channels}.get(kind, rows * channels)
    tiles = _tiles(head, kind)
    rule(tiles > 0 or words == 0, "words", "none", words)
    return stored, [4 * lines, 4 * count, size * stored.itemsize, 4 * tiles, 4 * words]


def _tiles(head: Any, kind: int) -> int:
    """How many numbers say where tiles begin."""
    high, channels = int(head["tile_rows"]), int(head["columns"])
    tiled = kind == ENTRIES and channels % 8 == 0
    rule(high in (TILE_ROWS if tiled else (0,)), "tile rows", f"one of {TILE_ROWS}, or 0", high)
    if not tiled:
        return 0
    return -(-int(head["rows"]) // high) * -(-channels // (TILE // high)) + 1


def _whole(blocks: Blocks) -> Tensor | None:
    """See `Blocks.whole`."""
    if blocks.in_blocks:
        return None if blocks.pays(0, blocks.kept) and has_triton() else unpack(blocks)
    return blocks.values if blocks.dense else None


def _form(head: Any) -> Form:
    operation, *kernel, groups = (int(head[name]) for name in _INTS[9:13])
    rule(operation in (LINEAR, CONV2D), "operation", "1 or 2", operation)
    form = Form(operation, (kernel[0], kernel[1]), groups)
    plain = operation == CONV2D or form == Form(LINEAR)
    rule(plain, "kernel and groups of a linear weight", "1", (*kernel, groups))
    rule(min(*kernel, groups) >= 1, "kernel and groups", "positive", (*kernel, groups))
    rows, columns = int(head["rows"]), int(head["columns"])
    fits = rows % groups == 0 and columns % form.taps == 0
    rule(fits, "groups and kernel", f"divisors of {(rows, columns)}", (groups, *kernel))
    return form


def pattern(matrix: Tensor, form: Form) -> str:
    """Which pattern the zeros of a matrix follow, as `kernels.patterns` names it."""
    kept = matrix.ne(0).view(len(matrix), form.taps, matrix.shape[1] // form.taps)
    return pattern_of(kept.transpose(1, 2).cpu().numpy())


def meta_of(data: Tensor, pattern: str) -> dict[str, Any]:
    """What is kept as JSON beside the bytes."""
    head = _head(data[:_SPACE].cpu().numpy())
    form, block = _form(head), f"{head['block_rows']}x{head['block_columns']}"
    stored = next(known for known, number in DTYPES.items() if number == head["dtype"])
    rows, columns = int(head["rows"]), int(head["columns"])
    shape = [rows, columns // form.taps, *form.kernel]
    return {
        "format": VERSION,
        "operation": OPERATIONS[form.operation],
        "device": "cuda",
        "shape": shape if form.operation == CONV2D else shape[:2],
        "groups": form.groups,
        "dtype": str(stored).removeprefix("torch."),
        "pattern": pattern,
        "block": {DENSE: "dense", ENTRIES: "1x1", CHANNEL: "channel"}.get(
            int(head["kind"]), block
        ),
        "nonzeros": int(head["nonzeros"]),
    }
