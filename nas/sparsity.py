"""How sparse a weight is, and in which pattern: hashable values, their labels and their masks.

A ratio is the fraction of zeros: 0.9 is 90 % zeros. Patterns act on a weight of shape
(out, in / groups, *kernel), at each kernel position.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """No zeros."""

    @property
    def ratio(self) -> float:
        """The fraction of zeros, 0."""
        return 0.0

    @property
    def label(self) -> str:
        """`dense`."""
        return "dense"


@dataclass(frozen=True)
class Unstructured:
    """Any element may be zero."""

    ratio: float

    def __post_init__(self) -> None:
        _check_ratio(self, self.ratio)

    @property
    def label(self) -> str:
        """The ratio, such as `0.9`."""
        return repr(float(self.ratio))


@dataclass(frozen=True)
class NM:
    """Keeps `n` of every `m` consecutive input channels."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise ValueError(f"{_name(self)}: needs 0 < n <= m, got n={self.n}, m={self.m}")

    @property
    def ratio(self) -> float:
        """The fraction of zeros, 1 - n / m."""
        return 1 - self.n / self.m

    @property
    def label(self) -> str:
        """`n:m`, such as `2:4`."""
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block:
    """Whole blocks of `rows` output by `cols` input channels at one kernel position are zero."""

    rows: int
    cols: int
    ratio: float

    def __post_init__(self) -> None:
        _check_ratio(self, self.ratio)
        if min(self.rows, self.cols) < 1:
            raise ValueError(
                f"{_name(self)}: needs rows and cols of at least 1, "
                f"got rows={self.rows}, cols={self.cols}"
            )

    @property
    def label(self) -> str:
        """`block<rows>x<cols>:<ratio>`, such as `block4x1:0.9`."""
        return f"block{self.rows}x{self.cols}:{float(self.ratio)!r}"


@dataclass(frozen=True)
class Channel:
    """Whole output channels are zero."""

    ratio: float

    def __post_init__(self) -> None:
        _check_ratio(self, self.ratio)

    @property
    def label(self) -> str:
        """`channel:<ratio>`, such as `channel:0.5`."""
        return f"channel:{float(self.ratio)!r}"


Sparsity = Dense | Unstructured | NM | Block | Channel

DENSE = Dense()


def parse(label: str) -> Sparsity:
    """The sparsity that has this label; ValueError where none has."""
    try:
        return _parse(label)
    except ValueError as error:
        raise ValueError(
            f"sparsity label {label!r}: needs one of dense, 0.9, 2:4, block4x1:0.9, channel:0.5 "
            f"({error})"
        ) from error


def _parse(label: str) -> Sparsity:
    head, _, tail = label.partition(":")
    if label == "dense":
        return DENSE
    if head == "channel":
        return Channel(float(tail))
    if head.startswith("block"):
        rows, cols = head.removeprefix("block").split("x")
        return Block(int(rows), int(cols), float(tail))
    return NM(int(head), int(tail)) if tail else Unstructured(float(head))


def admits(sparsity: Sparsity, shape: Sequence[int]) -> str | None:
    """Why a weight of this shape, (out, in / groups, *kernel), cannot be so sparse, else None."""
    if isinstance(sparsity, Dense):
        return None
    if not shape or 0 in shape:
        return f"{_name(sparsity)} needs a weight with elements, got shape {tuple(shape)}"
    if isinstance(sparsity, NM):
        return _divides(sparsity, shape, 1, sparsity.m)
    if isinstance(sparsity, Block):
        rows = _divides(sparsity, shape, 0, sparsity.rows)
        return rows or _divides(sparsity, shape, 1, sparsity.cols)
    return None


def check(sparsity: Sparsity, shape: Sequence[int], who: str) -> None:
    """Raises ValueError, naming `who`, if a weight of this shape cannot be so sparse."""
    reason = admits(sparsity, shape)
    if reason:
        raise ValueError(f"{who}: {reason}")


def kept(sparsity: Sparsity, shape: Sequence[int]) -> int:
    """How many elements of a weight of this shape are not masked."""
    check(sparsity, shape, "kept")
    size = prod(shape)
    if isinstance(sparsity, NM):
        return size // sparsity.m * sparsity.n
    if isinstance(sparsity, Block):
        area = sparsity.rows * sparsity.cols
        return _round(sparsity.ratio, size // area) * area
    if isinstance(sparsity, Channel):
        return _round(sparsity.ratio, shape[0]) * prod(shape[1:])
    return _round(sparsity.ratio, size)


def mask(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """Keeps the highest scores: bool, of the scores' shape (out, in / groups, *kernel).

    Blocks and channels are scored by the sum of |score|. Exactly round((1 - ratio) * size)
    elements, blocks or channels are kept, ties by the lower index, so masks of one pattern from
    one ranking are nested. Scores that hold NaN are a ValueError.
    """
    check(sparsity, scores.shape, "mask")
    if scores.isnan().any():
        raise ValueError("mask: needs scores that can be ranked, got NaN")
    if isinstance(sparsity, NM):
        return _nm_mask(scores, sparsity)
    if isinstance(sparsity, Block):
        return _block_mask(scores, sparsity)
    if isinstance(sparsity, Channel):
        return _channel_mask(scores, sparsity)
    return _top(scores.flatten(), _round(sparsity.ratio, scores.numel())).view_as(scores)


def _nm_mask(scores: Tensor, sparsity: NM) -> Tensor:
    channels_last = scores.movedim(1, -1)
    keep = _top(channels_last.reshape(-1, sparsity.m), sparsity.n)
    return keep.view(channels_last.shape).movedim(-1, 1).contiguous()


def _block_mask(scores: Tensor, sparsity: Block) -> Tensor:
    rows, cols = sparsity.rows, sparsity.cols
    out, into, *kernel = scores.shape
    split = (out // rows, rows, into // cols, cols, *kernel)
    blocks = scores.abs().reshape(split).sum((1, 3))
    keep = _top(blocks.flatten(), _round(sparsity.ratio, blocks.numel())).view_as(blocks)
    return keep.repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def _channel_mask(scores: Tensor, sparsity: Channel) -> Tensor:
    out = len(scores)
    keep = _top(scores.abs().reshape(out, -1).sum(1), _round(sparsity.ratio, out))
    return keep.view(out, *[1] * (scores.ndim - 1)).expand_as(scores).contiguous()


def _top(scores: Tensor, count: int) -> Tensor:
    """Marks the `count` highest of the last dimension; about 5 times faster than a stable sort."""
    if count == 0:
        return scores.isnan()
    threshold = scores.kthvalue(scores.shape[-1] - count + 1, dim=-1, keepdim=True).values
    above, ties = scores > threshold, scores == threshold
    return above | (ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def _round(ratio: float, size: int) -> int:
    return round((1 - ratio) * size)


def _divides(sparsity: Sparsity, shape: Sequence[int], axis: int, by: int) -> str | None:
    if len(shape) < 2:
        return f"{_name(sparsity)} needs a weight of 2 or more dimensions, got {len(shape)}"
    if shape[axis] % by == 0:
        return None
    linear, conv = ("out_features", "in_features"), ("out_channels", "in_channels / groups")
    name = (linear if len(shape) == 2 else conv)[axis]
    return f"{_name(sparsity)} needs {name} divisible by {by}, got {shape[axis]}"


def _check_ratio(sparsity: Unstructured | Block | Channel, ratio: float) -> None:
    if not 0 <= ratio < 1:
        raise ValueError(f"{type(sparsity).__name__}: needs a ratio in [0, 1), got {ratio}")


def _name(sparsity: Sparsity) -> str:
    return f"{type(sparsity).__name__}({', '.join(map(str, astuple(sparsity)))})"
