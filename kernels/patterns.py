"""Which pattern a mask follows."""

import numpy as np
import numpy.typing as npt

_GROUPS = (2, 4, 8, 16, 32)
_FEW = 8  # rows that are looked at first
_FULL = 0.98  # of the places that n:m allows: weights may be zero by chance, masks are not


def pattern_of(kept: npt.NDArray[np.bool_]) -> str:
    """The name of the narrowest pattern that a mask follows.

    Args:
        kept: (rows, channels, kernel positions); what is not zero.

    Returns:
        `dense`; `channel`: whole rows are zero; `4x1` and the like: whole blocks of so many rows
        and channels are, powers of two; `2:4` and the like: of every four channels two are kept;
        else `unstructured`.
    """
    if kept.all():
        return "dense"
    rows = kept.reshape(len(kept), -1)
    if (rows.any(1) == rows.all(1)).all():
        return "channel"
    height, width = _block(kept, 0), _block(kept, 1)
    return f"{height}x{width}" if height * width > 1 else _of_every(kept) or "unstructured"


def _block(kept: npt.NDArray[np.bool_], axis: int) -> int:
    """The largest power of two of neighbours along an axis that are kept or zero together."""
    kept, size = np.moveaxis(kept, axis, 0), 1
    while len(kept) > 1 and len(kept) % 2 == 0 and np.array_equal(kept[::2], kept[1::2]):
        kept, size = kept[::2], 2 * size
    return size


def _of_every(kept: npt.NDArray[np.bool_]) -> str:
    """`n:m` where every m channels keep n; "" where there is no such m."""
    for m in _GROUPS:
        if (
            kept.shape[1] % m == 0
            and _kept_of(m, kept[:_FEW]) < m
            and (n := _kept_of(m, kept)) < m
        ):
            return f"{n}:{m}"
    return ""


def _kept_of(m: int, kept: npt.NDArray[np.bool_]) -> int:
    """How many of every m channels are kept; m where that differs."""
    rows, channels, taps = kept.shape
    counts = kept.reshape(rows, channels // m, m, taps).sum(2)
    n = int(counts.max())
    return n if counts.sum() >= _FULL * n * counts.size else m
