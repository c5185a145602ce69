"""How fast networks are beside what they must beat, all timed turn by turn in one run.

A point of the front, packed, stands beside its dense twin and the dense parent, packed by the
same `pack` with dense kernels only, and beside the same masked network unpacked, run by torch as
it is (eager) and compiled: those last two run dense kernels on zeros, and their times are never a
sparse speed.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nas.latency import SPREAD_LIMIT, interleaved, no_gc, pinned, profile, using_threads
from nas.masks import bake
from nas.packing import pack
from nas.packing.network import PackedNetwork
from nas.run import Point

THREADS = 1
ROUNDS = 30
SECONDS = 0.01  # of each network in a round
KERNEL_SHARE = 0.7  # of a packed call that kernels should take


@dataclass(frozen=True)
class Timed:
    """One network's time in a run.

    Attributes:
        median_ms: Of one call.
        iqr_ms: Between the quartiles of the rounds.
        rounds: How many; a round is the mean of some calls.
        reliable: Whether the spread is at most 10 % of the median.
    """

    median_ms: float
    iqr_ms: float
    rounds: int
    reliable: bool


@dataclass(frozen=True)
class Ratio:
    """How many times faster the packed network is: over rounds, the median and the quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """One point at one batch size.

    Attributes:
        batch: Samples in a call.
        threads: Of torch.
        networks: Times of `packed`, `twin`, `parent`, `eager` and `compiled`.
        speedups: Of `packed` over each other one.
        unpacked: The faster of `eager` and `compiled`.
        kernels: How often each kernel runs in a call of the packed network.
        profile: `nas.latency.profile` of it; its `share` is what kernels take of the call.
        left_out: Why something is missing, by its name.
    """

    batch: int
    threads: int
    networks: dict[str, Timed]
    speedups: dict[str, Ratio]
    unpacked: str
    kernels: dict[str, int]
    profile: dict[str, float] | None
    left_out: dict[str, str] = field(default_factory=dict)


def measure_speed(point: Point, batch: int, compiled: bool = True) -> Speed:
    """Time a point of the front at one batch size.

    Args:
        point: With its trained weights in the run's folder.
        batch: Samples in a call.
        compiled: Whether to compile it too, which takes tens of seconds.
    """
    space, example = point.run.problem.space, point.run.evaluate.example
    x = example(space, batch)
    module = point.module()
    packed = pack(module, x, threads=THREADS)
    networks: dict[str, Callable[..., Any]] = {
        "packed": packed,
        "twin": _dense(space.build(point.picks, masked=False), x),
        "parent": _dense(space.build(space.largest(), masked=False), x),
        "eager": bake(copy.deepcopy(module)).eval().requires_grad_(False),
    }
    left_out = _add_compiled(networks, x) if compiled else {}
    times = dict(zip(networks, _together(list(networks.values()), x), strict=True))
    others = {name: t for name, t in times.items() if name != "packed"}
    found, why = _profiled(packed, x)
    return Speed(
        batch=batch,
        threads=THREADS,
        networks={name: _timed(t) for name, t in times.items()},
        unpacked=_faster(times),
        speedups={name: _ratio(t, times["packed"]) for name, t in others.items()},
        kernels=dict(Counter(layer.kernel for layer in packed.layers)),
        profile=found,
        left_out=left_out | why,
    )


def _dense(module: nn.Module, x: Tensor) -> PackedNetwork:
    return pack(module.eval(), x, kernels="dense", threads=THREADS)


def _add_compiled(networks: dict[str, Callable[..., Any]], x: Tensor) -> dict[str, str]:
    """Compile the eager network and add it; where that fails, the reason."""
    try:
        with warnings.catch_warnings(), torch.inference_mode(), using_threads(THREADS):
            warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 raises its own
            torch.compiler.reset()
            network = torch.compile(copy.deepcopy(networks["eager"]), dynamic=False)
            network(x)
    except Exception as error:  # without a C++ compiler, or what cannot be compiled; it is said
        return {"compiled": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
    networks["compiled"] = network
    return {}


def _together(networks: Sequence[Callable[..., Any]], x: Tensor) -> list[list[float]]:
    """Seconds of a call by round, for each network; twice the rounds where they spread."""
    calls = [lambda call=network: call(x) for network in networks]
    with torch.inference_mode(), using_threads(THREADS), pinned(True), no_gc():
        times = _rounds(calls, ROUNDS)
        if not all(_timed(t).reliable for t in times):
            times = _rounds(calls, 2 * ROUNDS)
    return times


def _rounds(calls: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    found = [interleaved(calls, SECONDS * len(calls), 1) for _ in range(rounds)]
    return [list(column) for column in zip(*found, strict=True)]


def _timed(times: Sequence[float]) -> Timed:
    low, median, high = _quartiles(times)
    steady = high - low <= SPREAD_LIMIT * median
    return Timed(median * 1e3, (high - low) * 1e3, len(times), steady)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _faster(times: Mapping[str, Sequence[float]]) -> str:
    names = [name for name in ("eager", "compiled") if name in times]
    return min(names, key=lambda name: statistics.median(times[name]))


def _ratio(others: Sequence[float], packed: Sequence[float]) -> Ratio:
    low, median, high = _quartiles([a / b for a, b in zip(others, packed, strict=True)])
    return Ratio(median, low, high)


def _profiled(packed: PackedNetwork, x: Tensor) -> tuple[dict[str, float] | None, dict[str, str]]:
    if packed.signature is None:
        return None, {"profile": packed.notes[0]}
    return profile(packed, x, threads=THREADS), {}
