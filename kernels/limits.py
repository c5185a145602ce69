"""What one core can do at most: multiply-adds a second, and bytes read from buffers of a size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from math import log2
from time import perf_counter

import numpy as np

from kernels.native.library import Library, library

_SMALLEST, _LARGEST = 12, 26  # powers of two, bytes
_BURST_S, _TRIES = 0.001, 5  # short, so that some are not interrupted


@dataclass(frozen=True)
class Limits:
    """The limits of one core; each is measured when first asked for, once for a process.

    Attributes:
        core: the compiled core, whose widest vectors do the work.
    """

    core: Library

    @property
    def multiply_adds(self) -> float:
        """Float32 multiply-adds a second, on numbers in registers."""
        return _multiply_adds(self.core)

    def bandwidth(self, size: float) -> float:
        """Bytes a second when a buffer of `size` bytes is read again and again.

        Measured at the nearest power of two from 4 KiB to 64 MiB.
        """
        return _bandwidth(self.core, min(max(_SMALLEST, round(log2(max(1.0, size)))), _LARGEST))

    def least_us(self, multiply_adds: float, size: float) -> float:
        """The least microseconds that work takes that also reads or writes `size` bytes."""
        seconds = (multiply_adds / self.multiply_adds, size / self.bandwidth(size))
        return 1e6 * max(seconds)


def limits() -> Limits | None:
    """The limits of a core of this machine; None without a compiled core to measure them with."""
    core = library()
    return None if core is None else Limits(core)


@cache
def _multiply_adds(core: Library) -> float:
    some = 1 << 16
    return some * _best(lambda times: core.multiply_adds(times * some))


@cache
def _bandwidth(core: Library, power: int) -> float:
    size = 1 << power
    buffer = np.ones(size + 64, np.uint8)  # written: pages of its own
    start = buffer.ctypes.data + -buffer.ctypes.data % 64
    return size * _best(partial(core.reads, start, size // 4))


def _best(work: Callable[[int], float]) -> float:
    """How often a second `work(times)` does its work, in the best of some bursts."""
    times = 1
    while _seconds(work, times) < _BURST_S:
        times *= 2
    return times / min(_seconds(work, times) for _ in range(_TRIES))


def _seconds(work: Callable[[int], float], times: int) -> float:
    begun = perf_counter()
    work(times)
    return perf_counter() - begun
