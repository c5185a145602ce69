from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.choices import Picks
from nas.costs import Flops, NonZeros
from nas.evaluate import Evaluate
from nas.reporting.agreement import (
    latency_predictions,
    line_error,
    rank_agreement,
    supernet_ranking,
)
from nas.reporting.intervals import difference, estimate, student_t
from nas.run import Record, Run
from nas.store import Store
from nas.tasks import digits
from nas.trial import Objective, Problem, Result, Trial
from search_spaces.mlp import mlp

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=8)


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)],
)
def test_student_t_is_that_of_the_tables(freedom: int, t: float) -> None:
    assert student_t(freedom) == pytest.approx(t, rel=1e-5)


def test_student_t_tends_to_the_normal_quantile() -> None:
    normal = statistics.NormalDist().inv_cdf(0.95)
    assert student_t(20000, confidence=0.9) == pytest.approx(normal, rel=1e-3)


@pytest.mark.parametrize(("freedom", "confidence"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_student_t_refuses_what_has_no_quantile(freedom: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="student_t"):
        student_t(freedom, confidence)


def test_an_estimate_is_the_mean_and_its_t_interval() -> None:
    found = estimate([1.0, 2.0, 4.0, 5.0])
    reach = 3.18245 * statistics.stdev([1.0, 2.0, 4.0, 5.0]) / 2
    assert (found.mean, found.n) == (3.0, 4)
    assert found.low == pytest.approx(3 - reach, abs=1e-5)
    assert found.high == pytest.approx(3 + reach, rel=1e-5)


def test_one_value_has_no_interval_and_none_is_refused() -> None:
    assert (estimate([2.0]).low, estimate([2.0]).high, estimate([2.0]).sign) == (None, None, 0)
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_a_difference_has_welchs_interval() -> None:
    """By hand: means 2 and 6, s^2/n 1/3 and 4/3, so freedom (25/9) / (17/18) is cut to 2."""
    found = difference([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    assert found.mean == pytest.approx(-4)
    assert found.high == pytest.approx(-4 + 4.30265 * math.sqrt(5 / 3), rel=1e-5)
    assert found.sign == 0
    assert difference([1.0, 1.0], [2.0, 2.0]).sign == -1


@given(VALUES, VALUES)
def test_a_difference_changes_sign_with_its_sides(a: list[float], b: list[float]) -> None:
    there, back = difference(a, b), difference(b, a)
    assert there.mean == pytest.approx(-back.mean)
    assert there.low is not None and back.high is not None
    assert there.low == pytest.approx(-back.high, abs=1e-6)
    assert there.low - 1e-9 <= there.mean


def test_ranks_that_agree_have_tau_one_and_constant_ones_none() -> None:
    assert rank_agreement([1, 2, 3, 4], [10, 20, 40, 80]).tau == pytest.approx(1)
    assert rank_agreement([1, 2, 3, 4], [4, 3, 2, 1]).tau == pytest.approx(-1)
    assert rank_agreement([1, 2], [5, 5]).tau is None


def test_an_interval_of_tau_holds_it_and_needs_four_pairs() -> None:
    found = rank_agreement([1, 2, 3, 4, 5, 6], [2, 1, 3, 4, 6, 5])
    assert found.low is not None and found.high is not None and found.tau is not None
    assert found.low < found.tau <= found.high
    assert rank_agreement([1, 2, 3], [1, 2, 3]).low is None


def test_points_on_a_line_are_predicted_without_error() -> None:
    assert line_error([1e6, 2e6, 5e6, 9e6], [3, 5, 11, 19]) == pytest.approx(0, abs=1e-9)
    assert line_error([1, 2, 3], [1, 2, 3]) is None


def test_each_point_is_predicted_by_the_others_alone() -> None:
    """The outlier at x = 0 does not draw its own line: the other three say 10 there."""
    assert line_error([1, 1, 1, 1], [10, 10, 10, 20]) == pytest.approx(0.25 / 0.75)


def past(tmp_path: Path, records: Sequence[tuple[Picks, dict[str, float]]]) -> Run:
    problem = Problem(SPACE, (Objective("error"),), {}, 9, 1)
    store = Store(tmp_path)
    store.close()
    run = Run(store, problem, Evaluate(digits()))
    for i, (picks, metrics) in enumerate(records):
        run.records[i] = Record(Trial(i, picks, 1), Result("ok", metrics))
    return run


SPACE = mlp((1, 8, 8), 10, depths=(1,), widths=(16, 32, 64), sparsities=("dense", "0.5"))


def closed(width: int, sparsity: str = "dense") -> dict[str, Any]:
    return {"depth": 1, "layer0/width": width, "layer0/sparsity": sparsity}


def test_a_supernets_ranking_pairs_inherited_and_trained_values(tmp_path: Path) -> None:
    said = {
        "supernet_error/0": 0.5,
        "supernet_error/1": 0.6,
        "supernet_error/7": 0.9,
        "error": 0.4,
    }
    run = past(
        tmp_path,
        [(closed(16), {"error": 0.2}), (closed(32), {"error": 0.1}), ({}, said)],
    )
    found = supernet_ranking(run)
    assert found is not None
    assert (found.supernet, found.trials) == (2, [0, 1])
    assert found.pairs == [(0.5, 0.2), (0.6, 0.1)]
    assert found.tau.tau == pytest.approx(-1)


def test_a_run_without_a_supernet_has_no_ranking(tmp_path: Path) -> None:
    assert supernet_ranking(past(tmp_path, [(closed(16), {"error": 0.2})])) is None


def test_predictions_compare_costs_with_measured_latencies(tmp_path: Path) -> None:
    picks = [closed(w, s) for w in (16, 32, 64) for s in ("dense", "0.5")]
    latencies = [1 + 1e-3 * Flops().value(SPACE, p) for p in picks]
    run = past(tmp_path, [(p, {"latency_ms": t}) for p, t in zip(picks, latencies, strict=True)])
    flops, nonzeros = latency_predictions(run)
    assert (flops.cost, flops.tau.n, nonzeros.cost) == ("flops", 6, "nonzeros")
    assert flops.tau.tau == pytest.approx(1)
    assert flops.error == pytest.approx(0, abs=1e-9)
    counted = [NonZeros().value(SPACE, p) for p in picks]
    assert nonzeros.tau.tau == rank_agreement(counted, latencies).tau


def test_a_run_without_latencies_predicts_nothing(tmp_path: Path) -> None:
    assert latency_predictions(past(tmp_path, [(closed(16), {"error": 0.2})])) == []
