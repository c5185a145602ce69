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
_Fastest = Mapping[bool | None, Way]  # of a weight held as blocks, whole, and of both
_NOTHING: _Fastest = {}


class Case(NamedTuple):
    """What times of a step of training go by; layers that are alike in all of it share them."""

    rows: int
    columns: int
    taps: int
    block: tuple[int, int]
    blocks: int
    dtype: torch.dtype
    tokens: int
    window: Window | None
    rounded: str
    device: torch.device

    def name(self) -> str:
        """Its name in `kernels.measured`."""
        conv = self.window is not None
        words = ["step of", "conv2d" if conv else "linear", f"{self.rows}x{self.columns}"]
        words += [str(self.dtype), *(["tf32 of", self.rounded] if self.rounded else [])]
        whole = self.rows * self.columns
        kept = measured.share(self.blocks * self.block[0] * self.block[1], whole)
        words += ["{}x{}".format(*self.block), "kept", kept, "tokens", str(self.tokens)]
        if self.window is not None:
            searched = ["searched"] if torch.backends.cudnn.benchmark else []
            words += ["kernel", str(self.window.kernel), *searched]
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
        window = None  # a linear layer of pixels
    sizes = (index.out_features, index.in_features, index.taps, index.block, len(index.columns))
    rounded = narrowed(dtype, window is not None)
    return Case(*sizes, dtype, tokens, window, rounded, index.lists.device)


_known: dict[Case, _Fastest] = {}


def fastest(case: Case, whole: bool | None = None) -> Way | None:
    """The fastest way of a case, with one form of the weight or with any; None: not measured.

    The first call for a case reads what is known of it; others look it up.
    """
    if case not in _known:
        on_gpu = case.device.type == "cuda"
        us = measured.times(case.device).of(case.name()) if on_gpu else None
        _known[case] = _fastest(us) if us else _NOTHING
    return _known[case].get(whole)


def put(case: Case, us: Mapping[str, float]) -> None:
    """From now on these are its times, by the names of ways."""
    _known[case] = _fastest(us)


@contextmanager
def forced(case: Case, way: Way) -> Iterator[None]:
    """Meanwhile steps of a case go this way."""
    before = _known.get(case)
    _known[case] = {way.whole: way}
    try:
        yield
    finally:
        if before is None:
            del _known[case]
        else:
            _known[case] = before


def _fastest(us: Mapping[str, float]) -> _Fastest:
    found: dict[bool | None, Way] = {}
    for name in sorted(us.keys() & WAYS.keys(), key=us.__getitem__):
        for whole in (WAYS[name].whole, None):
            found.setdefault(whole, WAYS[name])
    return found
