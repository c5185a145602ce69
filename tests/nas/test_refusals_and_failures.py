import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from nas.costs import Parameters
from nas.evaluate import Evaluate
from nas.loop import MOST_REFUSALS, violations
from nas.store import Store
from nas.trial import Trial
from strategies.random_search import RandomSearch
from tests.search_for_tests import (
    A,
    Always,
    B,
    C,
    Fails,
    Heard,
    Listed,
    cut,
    small_evaluate,
    small_search,
    small_space,
    small_task,
    told,
    trained,
)

# Refused and failed trials


def test_a_refused_trial_is_logged_and_told_and_does_not_count(tmp_path: Path) -> None:
    strategy = Listed(given=[B, A, B, A])
    limit = 6 * 8 + 8 + 8 * 2 + 2
    run = small_search(tmp_path, strategy=strategy, trials=2, limits={"parameters": limit})
    assert [r.result.status for r in run.records.values()] == ["refused", "ok", "refused", "ok"]
    assert run.counted() == 2 and trained(tmp_path) == [1]
    told_of = strategy.results[0][1]
    over = (6 * 16 + 16 + 16 * 2 + 2) / limit - 1
    assert told_of.violations == pytest.approx({"parameters": over})
    assert told_of.error == f"refused: parameters 146 over {limit}"
    assert told(tmp_path)[0]["status"] == "refused"


def test_so_many_refusals_in_a_row_end_the_search_with_one_line(tmp_path: Path) -> None:
    limits = {"parameters": 100.0}
    run = small_search(tmp_path, strategy=Always(given=[B, B, A, B]), limits=limits)
    assert len(run.records) == 3 + MOST_REFUSALS
    assert run.note.startswith(f"ended: {MOST_REFUSALS} trials in a row were refused")
    assert "\n" not in run.note and "parameters 146 over 100" in run.note


def test_a_search_that_refusals_ended_or_nearly_ended_goes_on_counting_them(
    tmp_path: Path,
) -> None:
    limits, lines = {"parameters": 100.0}, 2 * (MOST_REFUSALS - 50)
    run = small_search(tmp_path, strategy=Always(given=[B]), limits=limits)
    again = small_search(tmp_path, strategy=Always(given=[B]), limits=limits, resume=True)
    assert len(again.records) == len(run.records) == MOST_REFUSALS
    cut(tmp_path, lines)
    again = small_search(tmp_path, strategy=Always(given=[B]), limits=limits, resume=True)
    assert len(again.records) == MOST_REFUSALS and again.note == run.note


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("raises", "RuntimeError: the data are gone"),
        ("memory", "out of memory: "),
        ("time", "TimeLimit: passed its time limit of 0.3 s"),
        ("nan", "ArithmeticError: error is nan"),
        ("other names", "ValueError: objective 'error' is none of ['accuracy', 'parameters']"),
    ],
)
def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(
    tmp_path: Path, how: str, error: str
) -> None:
    wrong = Fails(how)
    limit = 0.3 if how == "time" else None
    evaluate = Evaluate(
        train=wrong.train, validate=wrong.validate, costs=(Parameters(),), time_limit_s=limit
    )
    strategy = Listed(given=[A, B, C])
    run = small_search(
        tmp_path, strategy=strategy, evaluate=evaluate, objectives=("error",), trials=3
    )
    assert [r.result.status for r in run.records.values()] == ["failed", "ok", "ok"]
    assert run.records[0].result.error == told(tmp_path)[0]["error"] == error
    assert strategy.results[0][1].status == "failed"
    assert [p.number for p in run.front()] == [1]


@dataclass(frozen=True)
class Broken:
    """A cost whose device is gone."""

    name = "broken"
    unit = ""
    batch: int = 1

    def measure(self, network: nn.Module, twin: nn.Module, example: Tensor) -> dict[str, Any]:
        raise OSError("no such device")


def test_a_cost_that_cannot_be_measured_makes_the_trial_fail(tmp_path: Path) -> None:
    broken: Any = Broken()
    run = small_search(
        tmp_path,
        evaluate=small_evaluate(costs=(broken,)),
        strategy=Listed(given=[A]),
        objectives=("rmse",),
    )
    assert run.records[0].result.error == "OSError: no such device"
    assert run.front() == []
    assert json.loads((tmp_path / "pareto.json").read_text())["points"] == []


@dataclass(frozen=True)
class Width:
    """A measured cost whose values are known: the size of the hidden layer."""

    name = "width"
    unit = "neurons"
    batch: int = 1

    def measure(self, network: nn.Module, twin: nn.Module, example: Tensor) -> dict[str, Any]:
        return {"value": float(network.get_submodule("layer0.linear")(example).shape[1])}


def test_a_limit_on_a_measured_cost_gives_violations_and_keeps_off_the_front(
    tmp_path: Path,
) -> None:
    width: Any = Width()
    run = small_search(
        tmp_path,
        evaluate=small_evaluate(costs=(width,)),
        strategy=Listed(given=[B, A]),
        objectives=("rmse", "width"),
        limits={"width": 10.0},
    )
    wide, narrow = (r.result for r in run.records.values())
    assert wide.status == narrow.status == "ok" and run.counted() == 2
    assert wide.violations == pytest.approx({"width": 0.6}) and not narrow.violations
    assert wide.details == {"width": {"value": 16.0}} and wide.metrics["width"] == 16
    assert told(tmp_path)[0]["units"] == {"rmse": "V", "width": "neurons"}
    assert [p.number for p in run.front()] == [1]


def test_a_violation_is_the_share_by_which_a_limit_is_passed() -> None:
    assert violations({"a": 3.0, "b": 1.0}, {"a": 2.0, "b": 1.0, "c": 5.0}) == {"a": 0.5}


# What is refused before any work


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"objectives": ()}, r"objectives: at least one, each once, got \[\]"),
        ({"objectives": ("rmse", "rmse")}, "objectives: at least one, each once"),
        ({"objectives": ("accuracy",)}, "objective 'accuracy' is none of"),
        ({"objectives": ("latency_ms",)}, "objective 'latency_ms' is none of"),
        ({"trials": 0}, "trials and epochs must be at least 1, got 0 and 2"),
        ({"epochs": 0}, "trials and epochs must be at least 1, got 4 and 0"),
        ({"limits": {"rmse": 0.5}}, "limit rmse: only a cost can be limited"),
        ({"limits": {"flops": 0}}, "limit flops: must be positive, got 0"),
        ({"limits": {"flops": 30}}, "limit flops=30.*the smallest architecture has 40"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    tmp_path: Path, changes: dict[str, Any], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        small_search(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    small_search(tmp_path, trials=1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.json*")}
    with pytest.raises(ValueError, match="holds a run already; resume it, or choose another"):
        small_search(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.json*")} == before


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run to resume"):
        small_search(tmp_path, resume=True)


def test_a_second_search_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    def second(trial: Trial) -> None:
        with pytest.raises(ValueError, match="another search is writing to this folder"):
            small_search(tmp_path, resume=True)

    run = small_search(tmp_path, strategy=Listed(given=[A]), callbacks=[Heard(second)])
    assert len(run.records) == 1
    Store(tmp_path).close()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"space": small_space(widths=(8, 32))}, "space"),
        ({"strategy": RandomSearch(seed=8)}, "strategy"),
        ({"objectives": ("rmse",)}, "objectives"),
        ({"limits": {"flops": 1000.0}}, "limits"),
        ({"epochs": 3}, "epochs"),
        ({"evaluate": small_evaluate(costs=(Parameters(),))}, "costs"),
        ({"evaluate": small_evaluate(replace(small_task(), name="other"))}, "task"),
    ],
)
def test_a_log_written_for_something_else_is_refused(
    tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    small_search(tmp_path, trials=1)
    with pytest.raises(ValueError, match=f"run.json: {key} was"):
        small_search(tmp_path, resume=True, **changes)


def test_a_log_that_the_strategy_would_not_write_again_is_refused(tmp_path: Path) -> None:
    small_search(tmp_path, strategy=Listed(given=[A, B]))
    lines = (
        (tmp_path / "trials.jsonl").read_text().replace('"layer0/width":8', '"layer0/width":16')
    )
    (tmp_path / "trials.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=r"trials.jsonl: trial 0 was .* the strategy now asks"):
        small_search(tmp_path, strategy=Listed(given=[A, B]), resume=True)
