"""Measuring how long a network takes, beside its dense twin, in one interleaved run."""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nas.packing import PackedNetwork

Call = Callable[[], Any]
Clock = Callable[[Call, int], float]  # seconds of a call, of so many
SPREAD_LIMIT = 0.1
WARM_UP = 3
FEWEST = 3  # rounds of slow calls
MOST_COLD = 4  # calls of a round, before each of which caches are emptied


@dataclass(frozen=True)
class Timing:
    """What one measurement found.

    Attributes:
        median_ms: median time of one call, milliseconds.
        iqr_ms: distance between the quartiles of the rounds, milliseconds.
        rounds: how many rounds the figures come from; a round is the mean of some calls.
        reliable: whether every spread (iqr / median) is at most 10 %.
        threads: intra-operator threads of torch while measuring.
        core: the core that the process was pinned to, or None.
        device: the kind of device, `cpu` or `cuda`.
        twin_median_ms: the dense twin's median from the same rounds, or None without a twin.
        twin_iqr_ms: the dense twin's spread, or None.
    """

    median_ms: float
    iqr_ms: float
    rounds: int
    reliable: bool
    threads: int
    core: int | None
    device: str
    twin_median_ms: float | None = None
    twin_iqr_ms: float | None = None

    @property
    def speedup(self) -> float | None:
        """How many times faster than its twin, by the medians."""
        return None if self.twin_median_ms is None else self.twin_median_ms / self.median_ms


def measure(
    packed: Callable[..., Any],
    twin: Callable[..., Any] | None,
    example: Tensor | tuple[Tensor, ...],
    *,
    threads: int = 1,
    rounds: int = 30,
    seconds: float = 0.3,
) -> Timing:
    """Measure `packed` and its dense `twin` on `example`, turn by turn.

    Each round calls one after the other, as often as fills `seconds` over all rounds. With one
    thread the calling thread is pinned to one core; threads, pin and garbage collector are put
    back afterwards. A spread above 10 % is measured once more with twice the rounds, then
    recorded as unreliable. On a GPU a call is captured into a graph that is replayed, where it can
    be captured: by itself Python takes longer than most networks.

    Args:
        packed: what to measure, called as `packed(*example)` in inference mode.
        twin: what to compare with, or None.
        example: the inputs; their batch is the one measured, their device the one timed.
        threads: torch's intra-operator threads.
        rounds: rounds of the first measurement.
        seconds: aim for the length of the first measurement.
    """
    inputs = (example,) if isinstance(example, Tensor) else example
    device = inputs[0].device.type
    calls = [lambda call=call: call(*inputs) for call in (packed, twin) if call is not None]
    here: Any = torch.cuda.device_of  # nothing where that is the CPU
    with (
        torch.inference_mode(),
        here(inputs[0]),
        using_threads(threads),
        pinned(threads == 1) as core,
        no_gc(),
    ):
        times = _rounds(calls, device, rounds, seconds)
        if not all(map(_is_steady, times)):
            times = _rounds(calls, device, 2 * rounds, 2 * seconds)
    return _timing(times, threads, core, device)


def _timing(times: list[list[float]], threads: int, core: int | None, device: str) -> Timing:
    spreads = [(statistics.median(t) * 1e3, _iqr(t) * 1e3) for t in times]
    twin = spreads[1] if len(spreads) > 1 else (None, None)
    steady = all(map(_is_steady, times))
    return Timing(*spreads[0], len(times[0]), steady, threads, core, device, *twin)


def interleaved(
    calls: Sequence[Call], seconds: float, rounds: int, device: str = "cpu", cold: bool = False
) -> list[float]:
    """Median seconds of each of `calls`, timed turn by turn for about `seconds` in all.

    Slow calls get fewer than `rounds`, but three at least.

    Args:
        calls: what to time.
        seconds: aim for the length of it all.
        rounds: of all calls in turn.
        device: `cpu`, or `cuda`, where calls are replayed graphs.
        cold: on a GPU, whether nothing is in its caches when a call begins.
    """
    found = _rounds(calls, device, rounds, seconds, min(rounds, FEWEST), cold)
    return [statistics.median(times) for times in found]


def profile(
    packed: PackedNetwork, example: Tensor | tuple[Tensor, ...], *, threads: int = 1
) -> dict[str, float]:
    """How much of a packed network's call is spent in kernels, and how much in calling them.

    The network is timed on `example` and, turn by turn, on a batch of 0: there every operator is
    called and has nothing to compute, so what remains is calls, and the rest of the whole is
    kernels. The fastest round of each counts, since a busy machine slows the longer one more.

    Args:
        packed: a network with a traced graph that runs a batch of 0.
        example: the inputs.
        threads: torch's threads.

    Returns:
        `whole_us`, `kernels_us`, `calls_us` (microseconds) and `share`, kernels over whole.

    Raises:
        ValueError: where `packed` has no traced graph, or on a GPU, where a replayed graph has
            no calls.
    """
    inputs = (example,) if isinstance(example, Tensor) else example
    if inputs[0].is_cuda:
        raise ValueError(f"profile: of a network on a CPU, got inputs on {inputs[0].device}")
    empty = packed.empty(inputs)
    calls = [lambda: packed(*inputs), lambda: packed(*empty)]
    with torch.inference_mode(), using_threads(threads), pinned(threads == 1), no_gc():
        whole, bare = (min(times) * 1e6 for times in _rounds(calls, "cpu", 50, 0.5))
    kernels = max(0.0, whole - bare)
    return {
        "whole_us": whole,
        "kernels_us": kernels,
        "calls_us": whole - kernels,
        "share": kernels / whole,
    }


def _rounds(
    calls: Sequence[Call],
    device: str,
    rounds: int,
    seconds: float,
    fewest: int | None = None,
    cold: bool = False,
) -> list[list[float]]:
    """Seconds of each call by round; calls that are slow for `seconds` get `fewest` rounds."""
    clock: Clock = _clock
    if device == "cuda":
        from kernels.cuda import clock as gpu  # not at the top: nobody without a GPU needs it

        calls, clock = [gpu.replayed(call) for call in calls], partial(gpu.seconds, cold=cold)
    for _ in range(WARM_UP - 1 if fewest is None else 1):
        for call in calls:
            call()
    once = [clock(call, 1) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    if fewest is not None and fewest * sum(once) > seconds:
        times, rounds = [[taken] for taken in once], fewest - 1
    elif fewest is not None:
        rounds = min(rounds, int(seconds / sum(once)))
    share = seconds / max(1, rounds) / len(calls)
    most = MOST_COLD if cold else sys.maxsize
    repeats = [min(most, max(1, int(share / taken))) for taken in once]
    for _ in range(rounds):
        for series, call, repeat in zip(times, calls, repeats, strict=True):
            series.append(clock(call, repeat))
    return times


def _clock(call: Call, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def _iqr(times: list[float]) -> float:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return high - low


def _is_steady(times: list[float]) -> bool:
    return _iqr(times) <= SPREAD_LIMIT * statistics.median(times)


@contextmanager
def using_threads(threads: int | None) -> Iterator[None]:
    """Set torch's intra-operator threads (None leaves them), and put them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def pinned(wanted: bool) -> Iterator[int | None]:
    """Keep the calling thread on one core of those it may use; yields the core, or None.

    Where the system knows no affinity nothing is pinned, and None says so.
    """
    if not wanted or not hasattr(os, "sched_setaffinity"):
        yield None
        return
    before = os.sched_getaffinity(0)
    core = max(before)
    os.sched_setaffinity(0, {core})
    try:
        yield core
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def no_gc() -> Iterator[None]:
    """Keep the garbage collector from running inside a measurement."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
