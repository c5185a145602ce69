import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nas.callbacks import Callback
from nas.costs import Flops, Parameters
from nas.evaluate import Evaluate
from nas.loop import search
from nas.run import Run
from nas.store import Store
from nas.tasks import Metric, Task
from nas.trial import Objective, Result, Trial
from strategies.random_search import RandomSearch
from tests.search_for_tests import (
    A,
    B,
    C,
    Listed,
    OpenThenClosed,
    Shuffled,
    Successive,
    facts,
    log,
    small_evaluate,
    small_search,
    small_space,
    small_task,
    told,
    trained,
    without_test,
)


def test_a_search_is_the_same_every_time_by_its_seed(tmp_path: Path) -> None:
    first = small_search(tmp_path / "a")
    assert facts(small_search(tmp_path / "b")) == facts(first)
    other = small_search(tmp_path / "c", strategy=RandomSearch(seed=4))
    assert facts(other) != facts(first)
    assert [r.trial.number for r in first.records.values()] == [0, 1, 2, 3]


def test_the_log_holds_every_ask_report_and_tell_in_the_order_of_events(tmp_path: Path) -> None:
    small_search(tmp_path, trials=2)
    events = [(e["event"], e["trial"]) for e in log(tmp_path)]
    one = ["ask", "report", "report", "tell"]
    assert events == [(name, trial) for trial in (0, 1) for name in one]
    asked, first, _, last = log(tmp_path)[:4]
    assert asked["budget"] == 2 and asked["parent"] is None and asked["fit"] is None
    assert first["step"] == 1 and first["go"] is True and first["metrics"]["rmse"] > 0
    assert last["status"] == "ok" and last["units"] == {"rmse": "V"}
    assert last["metrics"].keys() >= {"rmse", "parameters", "flops"}


def test_only_what_was_asked_for_is_trained(tmp_path: Path) -> None:
    run = small_search(tmp_path, strategy=Listed(given=[A, B, C]), trials=2)
    assert [r.trial.picks for r in run.records.values()] == [A, B]


def test_a_strategy_that_is_through_ends_the_search(tmp_path: Path) -> None:
    run = small_search(tmp_path, strategy=Listed(given=[A]), trials=9)
    assert len(run.records) == 1 and not run.note and not run.interrupted


# Duplicates


def test_an_equal_architecture_takes_the_first_one_s_result(tmp_path: Path) -> None:
    run = small_search(tmp_path, strategy=Listed(given=[A, B, dict(reversed(A.items())), A]))
    assert trained(tmp_path) == [0, 1]
    assert [r.result.same_as for r in run.records.values()] == [None, None, 0, 0]
    assert run.records[2].result.metrics == run.records[0].result.metrics
    assert run.counted() == 4


def test_an_equal_architecture_is_trained_again_where_that_is_wanted(tmp_path: Path) -> None:
    run = small_search(tmp_path, strategy=Listed(given=[A, A]), repeat=True)
    assert trained(tmp_path) == [0, 1]
    first, second = (r.result.metrics for r in run.records.values())
    assert first["rmse"] != second["rmse"]


def test_a_larger_budget_is_no_duplicate(tmp_path: Path) -> None:
    @dataclass
    class Growing(Listed):
        def ask(self) -> Trial | None:
            return self.trial(A, budget=self.asked + 1) if self.asked < 2 else None

    run = small_search(tmp_path, strategy=Growing())
    assert [r.result.same_as for r in run.records.values()] == [None, None]


def test_a_trial_that_took_another_s_result_goes_on_from_its_weights(tmp_path: Path) -> None:
    @dataclass
    class Continued(Listed):
        continues = True

        def ask(self) -> Trial | None:
            again = [(2, None), (2, None), (4, 1)]  # budgets and parents
            if self.asked == len(again):
                return None
            budget, parent = again[self.asked]
            return self.trial(A, budget=budget, parent=parent)

    run = small_search(tmp_path, strategy=Continued())
    assert [r.result.same_as for r in run.records.values()] == [None, 0, None]
    steps = [e["step"] for e in log(tmp_path) if e["event"] == "report" and e["trial"] == 2]
    assert steps == [3, 4]


# What is told


def test_a_strategy_is_told_reports_and_may_stop_a_trial(tmp_path: Path) -> None:
    strategy = Listed(given=[A], stop_at=2)
    run = small_search(tmp_path, strategy=strategy, epochs=5)
    assert [(number, step) for number, step, _ in strategy.reports] == [(0, 1), (0, 2)]
    assert run.records[0].result.status == "stopped" and run.records[0].result.usable
    assert [e["go"] for e in log(tmp_path) if e["event"] == "report"] == [True, False]
    assert [p.number for p in run.front()] == [0]


def test_callbacks_hear_all_that_happens(tmp_path: Path) -> None:
    heard: list[str] = []

    class Listens(Callback):
        def start(self, run: Run) -> None:
            heard.append(f"start {len(run.records)}")

        def asked(self, trial: Trial) -> None:
            heard.append(f"asked {trial.number}")

        def reported(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> None:
            heard.append(f"reported {step}")

        def told(self, run: Run, trial: Trial, result: Result) -> None:
            heard.append(f"told {trial.number} {len(run.records)}")

        def end(self, run: Run) -> None:
            heard.append(f"end {(run.folder / 'pareto.json').exists()}")

    small_search(tmp_path, strategy=Listed(given=[A]), callbacks=[Listens()])
    assert heard == ["start 0", "asked 0", "reported 1", "reported 2", "told 0 1", "end True"]


def test_a_supernet_is_trained_and_the_closed_trial_starts_from_it(tmp_path: Path) -> None:
    run = small_search(tmp_path, strategy=OpenThenClosed(), trials=1)
    assert [run.is_closed(r) for r in run.records.values()] == [False, True]
    assert run.counted() == 1
    assert log(tmp_path)[0]["fit"] == {"name": "LearnDepth", "rate": 0.5}
    assert run.records[1].trial.picks["depth"] == 2
    assert [p.number for p in run.front()] == [1]
    assert told(tmp_path)[0]["mixture"]["depth"] == [0.25, 0.75]


# Functions of one's own


def own_functions(validate: Any) -> Evaluate:
    return Evaluate(train=lambda module, epochs: None, validate=validate, costs=(Parameters(),))


def test_functions_of_your_own_may_give_one_number_called_error(tmp_path: Path) -> None:
    evaluate = own_functions(lambda module: float(module(torch.zeros(1, 6)).square().sum()))
    run = small_search(tmp_path, evaluate=evaluate, objectives=("error", "parameters"))
    assert len(run.usable()) == 4 and "error" in run.best().metrics
    assert run.best().record.test == {}


def test_functions_of_your_own_may_give_numbers_by_name(tmp_path: Path) -> None:
    evaluate = own_functions(lambda module: {"bits": 2.0, "gain": 1.0})
    objectives = ("bits", Objective("gain", "maximize"))
    run = small_search(tmp_path, evaluate=evaluate, objectives=objectives, trials=2)
    assert run.best().metrics == {**run.best().metrics, "bits": 2.0, "gain": 1.0}


def test_functions_of_your_own_cannot_train_an_open_trial(tmp_path: Path) -> None:
    evaluate = own_functions(lambda module: 0.5)
    with pytest.raises(ValueError, match=r"leaves 'depth' open, .* give Evaluate a task") as error:
        small_search(
            tmp_path, evaluate=evaluate, objectives=("error",), strategy=Listed(given=[{}])
        )
    assert "\n" not in str(error.value)


def test_a_metric_that_is_better_large_is_maximised(tmp_path: Path) -> None:
    def width(module: nn.Module) -> dict[str, float]:
        return {"width": float(len(next(p for p in module.parameters() if p.ndim == 1)))}

    evaluate = Evaluate(
        train=lambda module, epochs: None,
        validate=width,
        metrics=(Metric("width", direction="maximize"),),
    )
    run = small_search(
        tmp_path, evaluate=evaluate, objectives=("width",), strategy=Listed(given=[A, B])
    )
    assert [p.number for p in run.front()] == [1]


# The test part


def test_the_test_part_is_read_at_the_end_and_for_the_front_alone(tmp_path: Path) -> None:
    task = small_task()
    read: list[str] = []

    class Watched(Task):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            part = args[1] if len(args) > 1 else kwargs.get("part", "validation")
            read.append(part)
            return super().evaluate(*args, **kwargs)

    watched = Watched(**{f: getattr(task, f) for f in Task.__dataclass_fields__})
    run = small_search(tmp_path, evaluate=small_evaluate(watched))
    front = run.front()
    assert read[-len(front) :] == ["test"] * len(front)
    assert "test" not in read[: -len(front)]
    tested = [number for number, r in run.records.items() if r.test]
    assert sorted(tested) == sorted(p.number for p in front)


def test_a_search_never_touches_the_test_part(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the test part was read"):
        small_search(tmp_path, evaluate=small_evaluate(without_test(small_task())))
    assert [e["status"] for e in told(tmp_path)] == ["ok"] * 4


# Several workers


def test_results_may_come_in_any_order_and_no_more_is_trained_than_asked(tmp_path: Path) -> None:
    executor = Shuffled()
    run = small_search(tmp_path / "three", executor=executor, trials=5)
    assert executor.most == 3
    assert facts(run) == facts(small_search(tmp_path / "one", trials=5))
    assert [e["trial"] for e in told(tmp_path / "three")] != [0, 1, 2, 3, 4]


def test_a_duplicate_waits_for_the_one_that_is_training(tmp_path: Path) -> None:
    run = small_search(
        tmp_path, executor=Shuffled(), strategy=Listed(given=[A, A, B, A]), trials=4
    )
    assert trained(tmp_path) == [0, 2]
    assert {n: r.result.same_as for n, r in run.records.items()} == {0: None, 1: 0, 2: None, 3: 0}


# States


def test_only_the_front_s_states_are_kept_unless_trials_continue(tmp_path: Path) -> None:
    run = small_search(tmp_path / "a")
    kept = sorted(int(p.name) for p in (tmp_path / "a" / "checkpoints").iterdir())
    assert kept == sorted(p.number for p in run.front())
    small_search(tmp_path / "b", strategy=Successive())
    assert len(list((tmp_path / "b" / "checkpoints").iterdir())) == 3


def test_a_mistake_of_the_strategy_is_raised_and_lets_go_of_the_folder(tmp_path: Path) -> None:
    @dataclass
    class Wrong(Listed):
        def tell(self, trial: Trial, result: Result) -> None:
            raise KeyError("forgotten")

    with pytest.raises(KeyError, match="forgotten"):
        small_search(tmp_path, strategy=Wrong(given=[A]))
    assert len(told(tmp_path)) == 1
    Store(tmp_path).close()


def test_what_ran_is_described_in_full(tmp_path: Path) -> None:
    space = small_space()
    search(
        space,
        RandomSearch(seed=1),
        small_evaluate(costs=(Flops(),)),
        out=tmp_path,
        objectives=("rmse",),
        trials=1,
        epochs=1,
        arguments={"device": "cpu"},
    )
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["space"]["fingerprint"] == space.fingerprint
    assert described["space"]["origin"]["function"] == "search_spaces.mlp:mlp"
    assert described["strategy"] == {"name": "RandomSearch", "seed": 1}
    assert described["size"] == str(space.size()) and described["arguments"] == {"device": "cpu"}
    assert described["made"]["versions"].keys() >= {"python", "torch"}
    assert described["training"]["recipe"]["name"] == "Magnitude"
