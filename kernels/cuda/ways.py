"""By which way steps of training took the least time: of layers of blocks that were measured."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from kernels import measured
from kernels.block_index import BlockIndex
from kernels.cuda.rounding import narrowed
from kernels.window import Window


class Way(NamedTuple):
    """How a layer of blocks trains.

    Attributes:
        whole: whether its weight is held whole.
        beside: whether gradients of values and of x come beside each other, in a captured step.
        fused: whether one kernel gives a whole gradient and its zeros.
        joined: whether one launch gives both gradients.
        searched: whether cuDNN's products with a whole weight are what it found fastest, not what
            its heuristics say.
    """

    whole: bool
    beside: bool = False
    fused: bool = False
    joined: bool = False
    searched: bool = False


WAYS = {
    "blocks": Way(False),
    "blocks, beside": Way(False, beside=True),
    "whole": Way(True),
    "whole, beside": Way(True, beside=True),
    "whole, fused": Way(True, fused=True),
    "whole, fused, beside": Way(True, beside=True, fused=True),
    "whole, joined": Way(True, joined=True),
    "whole, searched": Way(True, searched=True),
    "whole, searched, beside": Way(True, beside=True, searched=True),
}


class Case(NamedTuple):
    """What times of a step of training go by; layers that are alike in all of it share them.

    Attributes:
        rows: of the weight.
        columns: of it, of all taps.
        taps: of a convolution's kernel, 1 of a linear layer.
        block: rows and columns of a block.
        kept: share of the weight, about.
        dtype: of what is multiplied: of 16 bits, or of float32 under autocast, which are one.
        rounded: see `narrowed`.
        tokens: or pixels of the output.
        window: of a convolution that is more than a linear layer of its pixels.
        benchmark: whether cuDNN's is on, which the gradient of a convolution's weight asks.
        device: of the layer.
    """

    rows: int
    columns: int
    taps: int
    block: tuple[int, int]
    kept: str
    dtype: torch.dtype
    rounded: str
    tokens: int
    window: Window | None
    benchmark: bool
    device: torch.device

    def name(self) -> str:
        """In `kernels.measured`."""
        kind = "linear" if self.window is None else "conv2d"
        words = ["step of", kind, f"{self.rows}x{self.columns}", "taps", str(self.taps)]
        words += [str(self.dtype), *(["tf32 of", self.rounded] if self.rounded else [])]
        words += ["{}x{}".format(*self.block), "kept", self.kept, "tokens", str(self.tokens)]
        if self.window is not None:
            words += [
                "kernel",
                str(self.window.kernel),
                *(["benchmark"] if self.benchmark else []),
            ]
            words += ["stride, padding, dilation", *map(str, self.window.pairs)]
        return " ".join(words)


def case_of(
    index: BlockIndex, dtype: torch.dtype, tokens: int, window: Window | None = None
) -> Case:
    """The case of a step.

    Args:
        index: of the blocks.
        dtype: of what is multiplied.
        tokens: or pixels of the output.
        window: of a convolution.
    """
    if window is not None and window.of_pixels:
        window = None
    weights = index.out_features * index.in_features
    kept = measured.share(len(index.columns) * index.block[0] * index.block[1], weights)
    sizes = index.out_features, index.in_features, index.taps, index.block, kept
    benchmark = window is not None and torch.backends.cudnn.benchmark
    rounded = narrowed(dtype, window is not None)
    return Case(*sizes, dtype, rounded, tokens, window, benchmark, index.lists.device)


class _Times(NamedTuple):
    us: Mapping[str, float]
    fastest: Mapping[bool | None, Way]  # of blocks, of whole weights, and of both


_known: dict[Case, _Times] = {}


def times(case: Case) -> Mapping[str, float]:
    """Microseconds by the names of ways; none where it was not measured.

    The first call for a case reads what is known of it; others look it up.
    """
    return _times(case).us


def fastest(case: Case, whole: bool | None = None) -> Way | None:
    """The fastest way of a case, with one form of the weight or with any; None: not measured."""
    return _times(case).fastest.get(whole)


def put(case: Case, us: Mapping[str, float]) -> None:
    """From now on these are its times."""
    found: dict[bool | None, Way] = {}
    for name in sorted(us.keys() & WAYS.keys(), key=us.__getitem__):
        for whole in (WAYS[name].whole, None):
            found.setdefault(whole, WAYS[name])
    _known[case] = _Times(us, found)


@contextmanager
def forced(case: Case, way: Way) -> Iterator[None]:
    """Meanwhile steps of a case go this way."""
    before = _times(case)
    _known[case] = _Times({}, {way.whole: way})
    try:
        yield
    finally:
        _known[case] = before


def _times(case: Case) -> _Times:
    if case not in _known:
        put(case, measured.times(case.device).of(case.name()) or {})
    return _known[case]
