"""What is measured for a layer once is not measured again, unless that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernels import measured
from nas.costs import Latency
from nas.packing import PackedNetwork, load, pack, save
from nas.packing.layer import Kernel, Layer, sparse_kernel
from tests.pack_models import Mlp, Residual, assert_same, kernels_of, masked, prefer, prefer_sparse


class Clock:
    """Counts what is timed; sparse kernels are the faster ones, unless `slow`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timed: list[str] = []
        self.slow = False
        prefer(monkeypatch, self.rank)

    def rank(self, kernel: Kernel) -> float:
        if kernel.name in ("dense", "sparse_linear", "sparse_conv2d"):
            self.timed.append(kernel.name)
            return 4.0 if kernel.name == "dense" else 9.0 if self.slow else 2.0
        return 6.0 if kernel.name == "apart" else 9.0


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Times are kept in a folder of the test's own, whatever was kept before."""
    monkeypatch.setenv("SPARSE_NAS_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "_cpu", lambda: "a CPU")  # compiles nothing into that folder
    monkeypatch.setenv("SPARSE_NAS_MEASURED", "on")
    measured._times.cache_clear()
    yield Clock(monkeypatch)
    measured._times.cache_clear()


def when(packed: PackedNetwork) -> list[str]:
    return [layer.measured for layer in packed.layers]


def test_the_same_network_is_measured_once(clock: Clock) -> None:
    module, x = masked(Mlp()), torch.randn(2, 33)
    first = pack(module, x)
    assert clock.timed == ["dense", "sparse_linear"] * 3
    measured._times.cache_clear()  # as in another process
    again = pack(module, x)
    assert len(clock.timed) == 6
    assert (when(first), when(again)) == (["now"] * 3, ["earlier"] * 3)
    assert kernels_of(again) == {"sparse_linear"}
    assert [(a.us, a.dense_us) for a in again.layers] == [(a.us, a.dense_us) for a in first.layers]
    assert_same(again, module, (33,))


def test_measuring_anew_replaces_what_was_measured(clock: Clock) -> None:
    module, x = masked(nn.Linear(24, 16)), torch.randn(2, 24)
    assert kernels_of(pack(module, x)) == {"sparse_linear"}
    clock.slow = True
    assert kernels_of(pack(module, x)) == {"sparse_linear"}
    anew = pack(module, x, measure="anew")
    assert kernels_of(anew) == {"dense"} and when(anew) == ["now"]
    assert kernels_of(pack(module, x)) == {"dense"}
    with pytest.raises(ValueError, match="measure must be 'once' or 'anew', got 'twice'"):
        pack(module, x, measure="twice")  # type: ignore[arg-type]


def test_layers_that_are_alike_are_measured_once(clock: Clock) -> None:
    module = masked(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)))
    packed = pack(module, torch.randn(2, 16))
    assert when(packed) == ["now", "earlier"]
    assert clock.timed == ["dense", "sparse_linear"]


@pytest.mark.parametrize(
    "other",
    [
        lambda: (masked(nn.Linear(16, 16), 0.5), torch.randn(2, 16), {}),
        lambda: (masked(nn.Linear(16, 16)), torch.randn(3, 16), {}),
        lambda: (masked(nn.Linear(16, 16, bias=False)), torch.randn(2, 16), {}),
        lambda: (masked(nn.Linear(16, 16)), torch.randn(2, 16), {"threads": 7}),
        lambda: (masked(nn.Linear(16, 16)), torch.randn(2, 16), {"kernels": "dense"}),
        lambda: (nn.Sequential(masked(nn.Linear(16, 16)), nn.ReLU()), torch.randn(2, 16), {}),
        lambda: (masked(nn.Conv2d(16, 16, 1)), torch.randn(2, 16, 1, 1), {}),
    ],
)
def test_what_differs_in_what_counts_is_another_case(other: Any, clock: Clock) -> None:
    pack(masked(nn.Linear(16, 16)), torch.randn(2, 16), threads=1)
    before = len(clock.timed)
    module, x, options = other()
    assert when(pack(module, x, **({"threads": 1} | options))) == ["now"]
    assert len(clock.timed) > before


def test_a_convolution_is_known_by_how_it_walks(clock: Clock) -> None:
    x = torch.randn(2, 8, 6, 6)
    ways: list[dict[str, Any]] = [
        {},
        {"stride": 2},
        {"padding": 1},
        {"dilation": 2},
        {"groups": 2},
    ]
    for options in ways:
        assert when(pack(masked(nn.Conv2d(8, 8, 3, **options), 0.5), x)) == ["now"]
        assert when(pack(masked(nn.Conv2d(8, 8, 3, **options), 0.5), x)) == ["earlier"]


def test_a_kernel_is_checked_although_its_time_is_known(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(layer: Layer) -> Kernel:
        kernel = sparse_kernel(layer)
        step = kernel.steps[0]
        spoiled = type(step)(lambda x, *args: step.target(x, *args) + 1e-3, step.args)
        return type(kernel)(kernel.name, (spoiled,))

    module, x = masked(nn.Linear(16, 16)), torch.randn(2, 16)
    pack(module, x)
    monkeypatch.setattr("nas.packing.tune.sparse_kernel", wrong)
    packed = pack(module, x)
    assert kernels_of(packed) == {"dense"} and "differs from dense" in packed.notes[0]


def test_explain_says_which_times_are_of_an_earlier_measurement(
    clock: Clock, tmp_path: Path
) -> None:
    x = torch.randn(2, 33)
    pack(masked(Mlp()), x)
    head, *rows = pack(masked(Mlp()), x).explain().splitlines()
    assert head.split()[-1] == "measured"
    assert [row.split()[-1] for row in rows] == ["earlier"] * 3
    save(pack(masked(Mlp()), x), tmp_path / "packed")
    assert load(tmp_path / "packed").explain().splitlines()[0] == head


def test_the_time_of_a_run_is_never_an_earlier_one(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer_sparse(monkeypatch, runs=True)
    module, x = masked(Residual(4)), torch.randn(2, 4, 6, 6)
    pack(module, x)
    packed = pack(module, x)
    assert kernels_of(packed) == {"sparse_chain[0]"}
    assert when(packed) == ["dense earlier"] * 2
    assert [row.split()[-1] for row in packed.explain().splitlines()[-2:]] == ["now"] * 2


def test_a_latency_is_measured_now_and_so_are_its_layers(clock: Clock) -> None:
    module, x = masked(nn.Linear(16, 16)), torch.randn(2, 16)
    pack(module, x, threads=1)
    before = len(clock.timed)
    found = Latency().measure(module, nn.Linear(16, 16), x)
    assert clock.timed[before:].count("sparse_linear") == 1
    assert found["layers"] == {"weight": 0.002} and found["value"] > 0
