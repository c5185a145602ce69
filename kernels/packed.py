"""Weights packed for the sparse kernels: one contiguous uint8 tensor beside plain JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels import blob as b
from kernels.checks import check
from kernels.patterns import pattern_of

Weight = npt.NDArray[np.float32]
Order = npt.NDArray[np.int32]
_OPERATIONS = {b.LINEAR: "sparse_linear", b.CONV2D: "sparse_conv2d"}
_DTYPES = (torch.float32, torch.bfloat16)  # in the order of their numbers in a blob


@dataclass(frozen=True, eq=False)
class Packed:
    """A sparse weight, ready for its kernel.

    Attributes:
        data: (n,) uint8, contiguous, on the weight's device: what the operators take as `weight`.
        meta: JSON of format, operation, shape, groups, dtype, pattern (what the mask follows, see
            `kernels.patterns`), block (rows that are stored and run together) and nonzeros.
    """

    data: Tensor
    meta: dict[str, Any]


def pack_linear(weight: Tensor) -> Packed:
    """Packs the weight of a linear layer.

    Args:
        weight: (out, in), float32 or bfloat16, which is how it is stored; its zeros are left out,
            whatever their pattern. On a GPU float16 too, and blocks of zeros are left out.

    Raises:
        ValueError: not two dimensions, another dtype, or 2^29 elements or more.
    """
    if weight.is_cuda:
        from kernels.cuda import pack  # it imports this module, and only a GPU needs it

        return pack.pack_linear(weight)
    dense_weight = _weight(weight, "pack_linear", ("out", "in"))
    order = _order(dense_weight, 1)
    placed = _placed(dense_weight, order)
    rows, channels = dense_weight.shape
    stored = (_block(placed, 1), _MANY, _DTYPES.index(weight.dtype), len(order) > 0)
    shape = b.Shape(b.LINEAR, rows, channels, (1, 1), 1, *stored)
    return _packed(dense_weight, order, shape, _slices(placed))


def pack_conv2d(weight: Tensor, groups: int = 1) -> Packed:
    """Packs the weight of a 2-d convolution.

    Args:
        weight: (out, in / groups, kernel_h, kernel_w), float32 or bfloat16, which is how it is
            stored; its zeros are left out. On a GPU float16 too, and blocks of zeros are left out.
        groups: as of `torch.nn.Conv2d`.

    Raises:
        ValueError: not four dimensions, another dtype, an empty kernel, 2^29 elements or more, or
            `groups` does not divide `out`.
    """
    if weight.is_cuda:
        from kernels.cuda import pack

        return pack.pack_conv2d(weight, groups)
    dense_weight = _weight(weight, "pack_conv2d", ("out", "in / groups", "kernel_h", "kernel_w"))
    rows, channels, height, width = dense_weight.shape
    if groups < 1 or rows % groups:
        raise ValueError(f"pack_conv2d: groups must divide out={rows}, got {groups}")
    if not height * width:
        raise ValueError(f"pack_conv2d: the kernel must not be empty, got {height}x{width}")
    flat = dense_weight.reshape(rows, channels * height * width)
    order = _order(flat, groups)
    block = _block(_placed(flat, order), groups)
    chunk = _chunk(flat, channels, height * width, block)
    stored = (block, chunk, _DTYPES.index(weight.dtype), len(order) > 0)
    shape = b.Shape(b.CONV2D, rows, channels, (height, width), groups, *stored)
    return _packed(flat, order, shape, b.no_slices(0))


def dense(packed: Packed) -> Tensor:
    """The weight that was packed, in its dtype: exactly, but that -0 comes back as 0.

    Raises:
        ValueError: the blob is malformed.
    """
    if packed.data.is_cuda:
        blocks = _on_gpu().read(packed.data)
        held: Tensor = blocks.form.weight(_on_gpu().unpack(blocks))
        return held.clone(memory_format=torch.contiguous_format)
    check_blob(packed.data)
    return unpack(packed.data).to(_DTYPES[b.shape_of(packed.data.numpy()).dtype])


def tune(
    packed: Packed,
    x: Tensor,
    anew: bool = False,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> dict[str, float]:
    """Measures which GPU kernel is the fastest for a weight and as many tokens, or such images.

    Every kernel that takes the case is checked against float64 first; what was measured is kept
    (`kernels.measured`), so that it is measured once for weights like this one. From then on
    `sparse_linear` takes the fastest for numbers of tokens up to the next power of two, and
    `sparse_conv2d` for numbers of such images.

    Args:
        packed: on a GPU.
        x: (..., in), or (N, C, H, W) for a convolution; finite, with the weight's dtype.
        anew: whether to measure what was measured before.
        stride: of a convolution, (height, width).
        padding: likewise.
        dilation: likewise.

    Returns:
        Microseconds of each kernel that is right; `dense` is PyTorch's product.

    Raises:
        ValueError: the weight is not on a GPU, or x does not fit it, is empty or not finite.
    """
    if not packed.data.is_cuda:
        raise ValueError(f"tune: needs a weight on a GPU, got one on {packed.data.device}")
    from kernels.cuda import tuning  # not at the top: nobody without a GPU needs it

    return tuning.tune(packed.data, x, anew, (tuple(stride), tuple(padding), tuple(dilation)))


def unpack(data: Tensor) -> Tensor:
    """The dense float32 weight of a blob that has been checked."""
    raw = data.numpy()
    shape, entries = b.shape_of(raw), b.entries_of(raw)
    units = np.repeat(np.arange(shape.chunks * shape.units), np.diff(entries.starts))
    units %= max(1, shape.units)
    weight = np.zeros((shape.units, shape.block, shape.columns), np.float32)
    weight[units, :, entries.columns] = entries.values
    flat = _placed(weight.reshape(shape.rows, shape.columns), np.argsort(entries.order))
    return torch.from_numpy(flat.reshape(shape.weight_shape))


def validate(data: Tensor, meta: dict[str, Any]) -> None:
    """Checks a packed weight that came from elsewhere: every offset, column and count.

    Raises:
        ValueError: names what is malformed, the rule and the value.
    """
    if data.is_cuda:
        return _on_gpu().validate(data, meta)
    if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous():
        raise ValueError(
            "packed weight: data must be contiguous (n,) uint8, "
            f"got {tuple(data.shape)} {data.dtype}"
        )
    raw = data.cpu().numpy()
    check(raw)
    true = _meta(raw, unpack(torch.from_numpy(raw)).numpy())
    for key in true.keys() | meta.keys():
        if meta.get(key) != true.get(key):
            raise ValueError(
                f"packed weight: meta {key} must be {true.get(key)!r} as in data, "
                f"got {meta.get(key)!r}"
            )


def _on_gpu() -> Any:
    """`kernels.cuda.blob`, which nobody without a GPU needs."""
    from kernels.cuda import blob

    return blob


def check_blob(data: Tensor) -> None:
    """Checks the bytes of a packed weight, as `kernels.checks.check` says."""
    check(data.numpy())


# Channels that are worked through before the next: few, so that their pixels stay in the first
# cache of 32 KiB (those of a KxK kernel lie in several rows, panels of blocks are half as wide),
# but so many that a row's sums are not put away and fetched for a few products.
_MANY = 256
_NEAR = {1: (64, _MANY, 12), 4: (128, _MANY, 12)}  # by block: channels at least, at most; products
_NEAR_TAPS = {1: (16, 32, 24), 4: (32, 32, 24)}
_CACHED = 2**20  # non-zeros of a linear weight that stay in some cache


def _chunk(weight: Weight, channels: int, taps: int, block: int) -> int:
    chunk, most, products = (_NEAR if taps == 1 else _NEAR_TAPS)[block]
    while chunk < most and np.count_nonzero(weight) * chunk * taps < products * weight.size:
        chunk *= 2
    return max(1, -(-channels // max(1, round(channels / chunk))))


def _weight(weight: Tensor, name: str, dims: tuple[str, ...]) -> Weight:
    if weight.dim() != len(dims) or weight.dtype not in _DTYPES:
        raise ValueError(
            f"{name}: weight must be float32 or bfloat16 ({', '.join(dims)}), "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    if weight.numel() >= b.MOST:
        raise ValueError(
            f"{name}: weight must have less than {b.MOST} elements, got {tuple(weight.shape)}"
        )
    return weight.detach().cpu().contiguous().float().numpy()


def _packed(weight: Weight, order: Order, shape: b.Shape, slices: b.Slices) -> Packed:
    entries = _entries(_placed(weight, order), order, shape)
    raw = b.write(shape, entries, slices, int(np.count_nonzero(weight)))
    return Packed(torch.from_numpy(raw), _meta(raw, weight))


def _meta(raw: b.Bytes, weight: Weight) -> dict[str, Any]:
    shape = b.shape_of(raw)
    return {
        "format": b.VERSION,
        "operation": _OPERATIONS[shape.operation],
        "shape": list(shape.weight_shape),
        "groups": shape.groups,
        "dtype": list(b.DTYPES)[shape.dtype],
        "pattern": pattern_of(weight.reshape(shape.rows, shape.channels, shape.taps) != 0),
        "block": f"{shape.block}x1",
        "nonzeros": int(b.head(raw)["nonzeros"]),
    }


def _block(weight: Weight, groups: int) -> int:
    """4 where four neighbouring rows share so many columns that blocks of them pay."""
    return 4 if _blocks(weight, groups) else 1


def _blocks(weight: Weight, groups: int) -> int:
    """How many blocks of four rows hold what is not zero; 0 where they do not pay."""
    rows, columns = weight.shape
    if not rows or not columns or rows // groups % 4:
        return 0
    blocks = int((weight.reshape(rows // 4, 4, columns) != 0).any(1).sum())
    return blocks if 12 * blocks <= 5 * np.count_nonzero(weight) else 0


def _order(weight: Weight, groups: int) -> Order:
    """Rows by what they keep, where that makes blocks, or a tenth fewer of them; or nothing."""
    kept, none = weight != 0, np.zeros(0, np.int32)
    if kept.all() or len(weight) // groups % 4:
        return none
    _, like = np.unique(np.packbits(kept, axis=1), axis=0, return_inverse=True)
    group = np.arange(len(weight)) // (len(weight) // groups)
    order = np.lexsort((like.ravel(), group)).astype("<i4")
    own, found = _blocks(weight, groups), _blocks(_placed(weight, order), groups)
    return order if found and (not own or 10 * found < 9 * own) else none


def _placed(weight: Weight, order: npt.NDArray[np.integer[Any]]) -> Weight:
    return weight[order] if len(order) else weight


def _entries(weight: Weight, order: Order, shape: b.Shape) -> b.Entries:
    width = shape.chunk * shape.taps
    padded = np.zeros((shape.units, shape.block, shape.chunks * width), np.float32)
    padded[:, :, : shape.columns] = weight.reshape(shape.units, shape.block, shape.columns)
    by_chunk = padded.reshape(shape.units, shape.block, shape.chunks, width).transpose(2, 0, 3, 1)
    chunk, unit, column = np.nonzero((by_chunk != 0).any(3))
    counts = np.bincount(chunk * shape.units + unit, minlength=shape.chunks * shape.units)
    starts = np.concatenate([[0], np.cumsum(counts)])
    values = by_chunk[chunk, unit, column]
    return b.Entries(order, starts.astype("<i4"), (chunk * width + column).astype("<i4"), values)


def _slices(weight: Weight) -> b.Slices:
    """Greedy: a window opens at the first column that a lane still waits for.

    Windows begin at a cache line, so that they load in two cycles instead of three or four; not
    where the steps come from memory, of which there are fewer without.
    """
    rows, columns = weight.shape
    slices, grain = -(-rows // b.SLICE), b.SLICE if np.count_nonzero(weight) < _CACHED else 1
    row, column = np.nonzero(weight)
    ends = np.searchsorted(row, np.arange(1, slices * b.SLICE + 1)).reshape(slices, b.SLICE)
    waiting = np.append(column, columns)
    value = np.append(weight[row, column], np.float32(0))
    at = np.concatenate([[0], ends.ravel()[:-1]]).reshape(slices, b.SLICE) if slices else ends
    steps = []
    active = np.arange(slices)
    while len(active := active[(at[active] < ends[active]).any(1)]):
        place = np.where(at[active] < ends[active], at[active], len(column))
        base = np.minimum(waiting[place].min(1) // grain * grain, max(0, columns - b.WINDOW))
        lane = waiting[place] - base[:, None]
        takes = (lane < b.WINDOW) & (place < len(column))
        steps.append((active, base, np.where(takes, lane, 0), np.where(takes, value[place], 0)))
        at[active] += takes
    if not steps:
        return b.no_slices(slices)
    of, bases, lanes, values = (np.concatenate(part) for part in zip(*steps, strict=True))
    order = np.argsort(of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(of, minlength=slices))])
    return b.Slices(
        starts.astype("<i4"),
        bases[order].astype("<i4"),
        lanes[order].astype(np.uint8),
        values[order].astype("<f4"),
    )
