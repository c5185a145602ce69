"""Measuring how long a network takes, beside its dense twin, in one interleaved run."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

if TYPE_CHECKING:
    from nas.packing import PackedNetwork

Call = Callable[[], Any]
SPREAD_LIMIT = 0.1
WARM_UP = 3


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
    recorded as unreliable.

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
    with torch.inference_mode(), using_threads(threads), pinned(threads == 1) as core, no_gc():
        times = _rounds(calls, device, rounds, seconds)
        if not all(map(_is_steady, times)):
            times = _rounds(calls, device, 2 * rounds, 2 * seconds)
    return _timing(times, threads, core, device)


def _timing(times: list[list[float]], threads: int, core: int | None, device: str) -> Timing:
    spreads = [(statistics.median(t) * 1e3, _iqr(t) * 1e3) for t in times]
    twin = spreads[1] if len(spreads) > 1 else (None, None)
    steady = all(map(_is_steady, times))
    return Timing(*spreads[0], len(times[0]), steady, threads, core, device, *twin)


def interleaved(calls: Sequence[Call], seconds: float, rounds: int) -> list[float]:
    """Median seconds of each of `calls` (CPU), timed turn by turn for about `seconds` in all."""
    return [statistics.median(times) for times in _rounds(calls, "cpu", rounds, seconds)]


def profile(
    packed: PackedNetwork, example: Tensor | tuple[Tensor, ...], *, threads: int = 1
) -> dict[str, float]:
    """How much of a packed network's call is spent in kernels, and how much in calling them.

    Every operator of the traced graph is timed by itself twice, on what it is given for `example`
    and on what it is given for a batch of 0, where only the way to the kernel is left; the
    difference is the kernel's. The rest of the whole call, which is timed likewise, is calls.

    Args:
        packed: a network with a traced graph that runs a batch of 0.
        example: the inputs.
        threads: torch's threads.

    Returns:
        `whole_us`, `kernels_us`, `calls_us` (microseconds) and `share`, kernels over whole.

    Raises:
        ValueError: where `packed` has no traced graph.
    """
    if not isinstance(packed.body, GraphModule):
        raise ValueError("profile: needs a traced network, this one's layers were exchanged")
    inputs = (example,) if isinstance(example, Tensor) else example
    with torch.inference_mode(), using_threads(threads), pinned(threads == 1), no_gc():
        (whole,) = interleaved([lambda: packed(*inputs)], 0.2, 20)
        kernels = sum(_beyond_the_call(packed.body, inputs, packed.empty(inputs)))
    share = min(1.0, kernels / whole)
    whole_us, kernels_us = whole * 1e6, share * whole * 1e6
    return {
        "whole_us": whole_us,
        "kernels_us": kernels_us,
        "calls_us": whole_us - kernels_us,
        "share": share,
    }


class _Operands(Interpreter):
    """Runs a graph and keeps a call of each operator with what it is given."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.calls: list[Call] = []

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(target, torch._ops.OpOverload):
            self.calls.append(lambda: target(*args, **kwargs))
        return super().call_function(target, args, kwargs)


def _beyond_the_call(
    body: GraphModule, inputs: tuple[Tensor, ...], empty: tuple[Tensor, ...]
) -> Iterator[float]:
    full, bare = _Operands(body), _Operands(body)
    full.run(*inputs)
    bare.run(*empty)
    for call, way in zip(full.calls, bare.calls, strict=True):
        taken, overhead = interleaved([call, way], 0.01, 9)
        yield max(0.0, taken - overhead)


def _rounds(calls: Sequence[Call], device: str, rounds: int, seconds: float) -> list[list[float]]:
    clock = _cuda_clock if device == "cuda" else _clock
    for _ in range(WARM_UP - 1):
        for call in calls:
            call()
    share = seconds / rounds / len(calls)
    repeats = [max(1, int(share / clock(call, 1))) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for taken, call, repeat in zip(times, calls, repeats, strict=True):
            taken.append(clock(call, repeat))
    return times


def _clock(call: Call, repeat: int) -> float:
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - start) / repeat


def _cuda_clock(call: Call, repeat: int) -> float:
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeat):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeat


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
