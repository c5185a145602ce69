import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from torch import nn

from nas.tasks import Task
from nas.trial import Fit, Objective, Problem, Report, Result, Strategy, Trial
from search_spaces.mlp import mlp


@dataclass(frozen=True)
class Pretrain:
    """A strategy's own training."""

    order: int = 2
    rate: float = 0.1
    parts: tuple[str, ...] = ("weights", "scores")

    def fit(self, network: nn.Module, task: Task, budget: int, report: Report) -> dict[str, float]:
        return {}


@dataclass
class Settled(Strategy):
    """A strategy with a setting of its own."""

    population: int = 8


def problem(*objectives: Objective) -> Problem:
    return Problem(mlp((4,), 2), objectives, {}, trials=3, budget=5)


def test_a_trial_is_plain_json_with_the_name_and_the_fields_of_its_fit() -> None:
    trial = Trial(3, {"depth": 1}, 7, parent=1, fit=Pretrain(order=1))
    assert json.loads(json.dumps(trial.to_json())) == {
        "trial": 3,
        "picks": {"depth": 1},
        "budget": 7,
        "parent": 1,
        "fit": {"name": "Pretrain", "order": 1, "rate": 0.1, "parts": ["weights", "scores"]},
    }
    assert Trial(0, {}, 1).to_json()["fit"] is None


def test_what_the_log_keeps_of_a_fit_makes_it_again() -> None:
    made = Pretrain(order=1, rate=0.3)
    kept: dict[str, Any] = json.loads(json.dumps(Trial(0, {}, 1, fit=made).to_json()))["fit"]
    assert kept.pop("name") == "Pretrain"
    again = Pretrain(**{**kept, "parts": tuple(kept["parts"])})
    assert again == made and isinstance(again, Fit)
    assert Trial(0, {}, 1, fit=again).to_json() == Trial(0, {}, 1, fit=made).to_json()


def test_a_result_is_plain_json_and_comes_back() -> None:
    result = Result("ok", {"error": 0.1}, {"flops": 0.2}, {"op": [0.5, 0.5]}, 1.5, same_as=2)
    assert Result(**json.loads(json.dumps(result.to_json()))) == result


@pytest.mark.parametrize(
    ("status", "usable"),
    [("ok", True), ("stopped", True), ("failed", False), ("refused", False)],
)
def test_metrics_count_of_what_was_trained(status: Any, usable: bool) -> None:
    assert Result(status).usable == usable


def test_what_is_to_be_large_is_a_loss_with_the_other_sign() -> None:
    both = problem(Objective("error"), Objective("r2", "maximize"))
    assert both.losses(Result("ok", {"error": 0.3, "r2": 0.9})) == (0.3, -0.9)


def test_trials_are_numbered_in_the_order_of_asking_with_randomness_of_their_own() -> None:
    strategy = Settled(seed=5)
    strategy.start(problem(Objective("error")))
    first = strategy.rng().integers(1 << 30)
    trials = [strategy.trial({"depth": 1}), strategy.trial({"depth": 1}, budget=9, parent=0)]
    assert [t.number for t in trials] == [0, 1]
    assert [t.budget for t in trials] == [5, 9]
    assert strategy.rng(0).integers(1 << 30) == first
    assert strategy.rng().integers(1 << 30) == np.random.default_rng([5, 2]).integers(1 << 30)


def test_a_strategy_that_is_started_again_begins_anew() -> None:
    strategy = Settled()
    for _ in range(2):
        strategy.start(problem(Objective("error")))
        assert strategy.trial({}).number == 0


def test_the_settings_of_a_strategy_are_its_fields() -> None:
    assert Settled(seed=3, population=4).settings() == {
        "name": "Settled",
        "seed": 3,
        "population": 4,
    }
