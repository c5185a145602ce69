import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau  # type: ignore[import-untyped]

from nas.front import crowding, dominates, fronts, kendall_tau, pareto, ranking

values = st.integers(0, 4).map(float)


def points(size: int = 2) -> st.SearchStrategy[list[tuple[float, ...]]]:
    return st.lists(st.tuples(*[values] * size), max_size=9)


def beaten(losses: list[tuple[float, ...]], i: int) -> bool:
    """Written as the definition is: some other is nowhere worse and is not the same."""
    return any(
        o != losses[i] and all(x <= y for x, y in zip(o, losses[i], strict=True)) for o in losses
    )


@given(st.tuples(values, values, values), st.tuples(values, values, values))
def test_domination_is_nowhere_worse_and_somewhere_better(
    a: tuple[float, ...], b: tuple[float, ...]
) -> None:
    assert dominates(a, b) == (bool(np.all(np.array(a) <= b)) and a != b)
    assert not (dominates(a, b) and dominates(b, a))


@given(points(2) | points(3))
def test_the_pareto_front_is_what_nothing_beats_each_value_once(
    losses: list[tuple[float, ...]],
) -> None:
    found = pareto(losses, [{}] * len(losses))
    assert {losses[i] for i in found} == {p for i, p in enumerate(losses) if not beaten(losses, i)}
    assert [losses[i] for i in found] == sorted({losses[i] for i in found})
    assert all(losses.index(losses[i]) == i for i in found)


@given(points(2), st.data())
def test_what_breaks_a_limit_is_not_on_the_front_and_hides_nothing(
    losses: list[tuple[float, ...]], data: st.DataObject
) -> None:
    broken = [data.draw(st.booleans()) for _ in losses]
    found = pareto(losses, [{"flops": 0.1} if b else {} for b in broken])
    feasible = [p for p, b in zip(losses, broken, strict=True) if not b]
    best = {p for i, p in enumerate(feasible) if not beaten(feasible, i)}
    assert {losses[i] for i in found} == best
    assert not any(broken[i] for i in found)


@given(points(2) | points(3))
def test_each_front_is_the_best_of_what_the_fronts_before_left(
    losses: list[tuple[float, ...]],
) -> None:
    sorted_ = fronts(losses)
    assert sorted(i for front in sorted_ for i in front) == list(range(len(losses)))
    left = list(range(len(losses)))
    for front in sorted_:
        rest = [losses[i] for i in left]
        assert front == [i for i in left if not beaten(rest, left.index(i))]
        left = [i for i in left if i not in front]


@given(
    st.lists(
        st.tuples(*[st.floats(-5, 5)] * 2), max_size=8, unique_by=(lambda p: p[0], lambda p: p[1])
    )
)
def test_crowding_is_the_summed_relative_distance_of_the_neighbours(
    losses: list[tuple[float, float]],
) -> None:
    found = crowding(losses)
    for i, point in enumerate(losses):
        expected = 0.0
        for k in range(2):
            column = sorted(p[k] for p in losses)
            at = column.index(point[k])
            if at in (0, len(column) - 1):
                expected = math.inf
            else:
                expected += (column[at + 1] - column[at - 1]) / (column[-1] - column[0])
        assert found[i] == pytest.approx(expected)


def test_crowding_of_equal_points_is_finite_or_infinite_but_never_nan() -> None:
    assert not any(map(math.isnan, crowding([(1.0, 2.0)] * 4)))
    assert crowding([]) == []


def test_ranking_puts_feasible_first_then_fronts_then_the_lonely_then_the_least_violation() -> (
    None
):
    losses = [(0.0, 4.0), (2.0, 2.0), (2.1, 1.9), (4.0, 0.0), (5.0, 5.0), (0.0, 0.0), (0.0, 0.0)]
    violations: list[dict[str, float]] = [{}, {}, {}, {}, {}, {"a": 0.5, "b": 0.6}, {"a": 1.0}]
    order = ranking(losses, violations)
    assert set(order[:2]) == {0, 3}
    assert set(order[2:4]) == {1, 2}
    assert order[4:] == [4, 6, 5]


series = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12)


@given(series)
def test_kendall_tau_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    a, b = zip(*pairs, strict=True)
    found, expected = kendall_tau(a, b), float(kendalltau(a, b).statistic)
    assert found == pytest.approx(expected, nan_ok=True)


def test_kendall_tau_of_a_constant_is_not_a_number() -> None:
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
