from typing import Any

import pytest
import torch
from torch import nn

import kernels
from scripts import bench_kernels, gpu_timing, kernels_on_gpu, options, training_on_gpu


def test_drawn_cases_are_the_same_in_every_run_and_divide_into_their_blocks() -> None:
    cases = list(kernels_on_gpu.drawn(200, tuned=True))
    assert cases == list(kernels_on_gpu.drawn(200, tuned=True)) and len(set(map(str, cases))) > 180
    for case in cases:
        if isinstance(case, kernels_on_gpu.Linear):
            assert case.rows % case.block == case.columns % case.block == 0
            assert case.tuned and not case.with_peers
        else:
            assert case.channels % case.block == 0 and case.tuned
    kinds = {type(case) for case in cases}
    assert kinds == {kernels_on_gpu.Linear, kernels_on_gpu.Conv2d}


def test_drawn_layers_that_train_divide_into_their_blocks() -> None:
    given = (200, kernels_on_gpu.WIDTHS, kernels_on_gpu.SHARES, True, False)
    cases = list(training_on_gpu.drawn(*given))
    assert cases == list(training_on_gpu.drawn(*given)) and len(set(map(str, cases))) > 180
    for case in cases:
        if isinstance(case.of, training_on_gpu.Linear):
            assert case.of.rows % case.of.block == case.of.columns % case.of.block == 0
        else:
            assert case.of.channels % case.of.block == 0
    assert len(cases) == 200 and all(case.tuned and not case.ways for case in cases)
    kinds = {(type(case.of), case.operation) for case in cases}
    every = training_on_gpu.ALL
    assert kinds == {(training_on_gpu.Linear, every), (training_on_gpu.Conv2d, every)}


@pytest.mark.parametrize(
    ("given", "law"),
    [
        (["--drawn", "3"], "--drawn goes with --device cuda"),
        (["--training", "3"], "--training goes with --device cuda"),
        (["--device", "cuda", "--tuned"], "--tuned goes with --drawn or --training"),
        (["--device", "cuda", "--ways", "--drawn", "3"], "--ways goes with --training"),
        (["--device", "cuda", "--drawn", "-3"], "--drawn must not be negative, got -3"),
        (["--device", "cuda", "--training", "-1"], "--training must not be negative, got -1"),
        (["--device", "cuda", "--training", "3", "--drawn", "3"], "not allowed with"),
    ],
)
def test_what_does_not_go_together_is_refused(
    given: list[str],
    law: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(options, "has_driver", lambda: True)
    with pytest.raises(SystemExit):
        bench_kernels.main(given)
    assert law in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratios", "ratio"),
    [
        ((0.97,), 0.97),
        ((0.96, 1.2, 1.0), 1.0),  # it was spread
        ((0.96, 0.95, 1.0), 0.96),  # it was not
        ((0.96, None, 1.0), None),
        ((None,), None),
    ],
)
def test_what_seems_behind_dense_is_measured_twice_more(
    ratios: tuple[float | None, ...], ratio: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(ratios)

    def measure(work: gpu_timing.Work, on: gpu_timing.Card) -> gpu_timing.Row:
        found = left.pop(0)
        return gpu_timing.Row("", "", "", 0.5, found is not None, ratio=found)

    monkeypatch.setattr(gpu_timing, "measure", measure)
    card: Any = None
    row = gpu_timing.settled(lambda: card, card)
    assert not left
    assert row.ratio == ratio and row.correct == (ratio is not None)
    assert row.ratios == (ratios if ratio else ())


def test_every_way_of_a_step_can_be_timed() -> None:
    layer, x = kernels.BlockLinear.of(nn.Linear(64, 64), (16, 16)), torch.randn(9, 64)
    made = training_on_gpu._ways(layer, x)
    assert made.keys() == {"blocks", "blocks, beside", "whole", "whole, beside"}  # of a CPU
    for make in made.values():
        y, to_x, to_values = make(x)()
        assert torch.allclose(y, layer(x), atol=1e-5) and to_x.shape == x.shape
        assert to_values.numel() == 64 * 64
