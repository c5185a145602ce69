from __future__ import annotations

import gc
import os
from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.latency import Timing, measure, profile
from nas.packing import pack
from tests.pack_models import prefer

X = torch.ones(2, 4)


class Clock:
    """A machine whose calls take as long as they say, in seconds, whatever really passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.order: list[str] = []
        monkeypatch.setattr("nas.latency.time.perf_counter", lambda: self.now)

    def network(self, name: str, *durations: float) -> Callable[[Tensor], Tensor]:
        waits = cycle(durations)

        def call(x: Tensor) -> Tensor:
            self.order.append(name)
            self.now += next(waits)
            return x

        return call


def test_medians_and_speedup_are_those_of_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timing = measure(clock.network("packed", 0.002), clock.network("twin", 0.006), X, rounds=4)
    assert timing.median_ms == pytest.approx(2.0)
    assert timing.twin_median_ms == pytest.approx(6.0)
    assert timing.speedup == pytest.approx(3.0)
    assert timing.iqr_ms == pytest.approx(0.0, abs=1e-9)
    assert (timing.rounds, timing.reliable) == (4, True)


def test_a_network_and_its_twin_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    measure(clock.network("a", 1.0), clock.network("b", 1.0), X, rounds=3, seconds=0.1)
    assert clock.order[-6:] == ["a", "b"] * 3


def test_short_calls_are_repeated_to_fill_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    measure(clock.network("a", 0.001), None, X, rounds=10, seconds=1.0)
    assert clock.now == pytest.approx(1.0, rel=0.02)


def test_without_a_twin_there_is_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = measure(Clock(monkeypatch).network("a", 0.01), None, X)
    assert (timing.twin_median_ms, timing.twin_iqr_ms, timing.speedup) == (None, None, None)


def test_a_wide_spread_is_measured_again_and_then_said_to_be_unreliable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    timing = measure(clock.network("a", 0.1, 0.2), None, X, rounds=5, seconds=0.01)
    assert not timing.reliable
    assert timing.rounds == 10
    assert timing.iqr_ms == pytest.approx(100.0)


def test_an_unsteady_twin_makes_the_comparison_unreliable(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    steady, unsteady = clock.network("a", 0.1), clock.network("b", 0.1, 0.2)
    assert not measure(steady, unsteady, X, rounds=4, seconds=0.01).reliable


def test_a_spread_that_settles_is_reliable(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    durations = [0.1, 0.2] * 4 + [0.1] * 20
    timing = measure(clock.network("a", *durations), None, X, rounds=5, seconds=0.01)
    assert (timing.reliable, timing.rounds) == (True, 10)


def seen_while(**options: Any) -> tuple[dict[str, Any], Timing]:
    seen: dict[str, Any] = {}

    def look(x: Tensor) -> Tensor:
        seen["threads"] = torch.get_num_threads()
        seen["cores"] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        seen["gc"] = gc.isenabled()
        seen["inference"] = torch.is_inference_mode_enabled()
        return x

    timing = measure(look, None, X, seconds=0.001, rounds=2, **options)
    return seen, timing


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_collector_and_mode_are_set_and_put_back(threads: int) -> None:
    before = torch.get_num_threads()
    seen, timing = seen_while(threads=threads)
    assert (seen["threads"], seen["gc"], seen["inference"]) == (threads, False, True)
    assert (timing.threads, timing.device) == (threads, "cpu")
    assert (torch.get_num_threads(), gc.isenabled()) == (before, True)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process")
def test_one_thread_is_pinned_to_one_core_and_let_go() -> None:
    before = os.sched_getaffinity(0)
    seen, timing = seen_while(threads=1)
    assert seen["cores"] == {timing.core}
    assert os.sched_getaffinity(0) == before
    seen, timing = seen_while(threads=2)
    assert (seen["cores"], timing.core) == (before, None)


def test_all_is_put_back_when_the_network_fails() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("broken")

    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken"):
        measure(fail, None, X, threads=before + 1)
    assert (torch.get_num_threads(), gc.isenabled()) == (before, True)


def test_a_tuple_of_inputs_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[Tensor, ...]] = []
    measure(lambda *inputs: taken.append(inputs), None, (X, X), rounds=2, seconds=0.0)
    assert all(len(inputs) == 2 for inputs in taken)


def test_a_profile_splits_the_whole_call() -> None:
    packed = pack(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), X.new_ones(3, 64)
    )
    parts = profile(packed, X.new_ones(3, 64))
    assert parts["kernels_us"] + parts["calls_us"] == pytest.approx(parts["whole_us"])
    assert parts["share"] == pytest.approx(parts["kernels_us"] / parts["whole_us"])


def test_a_profile_tells_kernels_from_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operator takes 1 s to call and 1 s per row: two of them make 2 of 2 + 2 x 3."""
    prefer(monkeypatch, lambda kernel: {"dense": 1.0, "apart": 2.0}.get(kernel.name, 3.0))
    packed = pack(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), X)
    clock = Clock(monkeypatch)
    linear = torch.ops.aten.linear.default

    def slow(self: object, x: Tensor, *args: Any) -> Tensor:
        clock.now += 1.0 + x.shape[0]
        return linear._op(x, *args)

    monkeypatch.setattr(type(linear), "__call__", slow)
    parts = profile(packed, X.new_ones(3, 4))
    assert parts == {"whole_us": 8e6, "kernels_us": 6e6, "calls_us": 2e6, "share": 0.75}


def test_a_network_without_a_graph_has_no_profile() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if bool(x.sum() > 0) else -x

    with pytest.raises(ValueError, match="no traced graph"):
        profile(pack(Branch(), X), X)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_is_timed_by_its_events() -> None:
    network = nn.Linear(256, 256).cuda()
    timing = measure(network, None, torch.ones(64, 256, device="cuda"))
    assert timing.device == "cuda" and timing.median_ms > 0
