import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nas.choices import Picks
from nas.costs import Flops, Parameters
from nas.evaluate import Evaluate, restore
from nas.masks import sparse_weights, training_state, weights
from nas.recipes import LearnedScores
from nas.tasks import Metric, Task
from nas.training import Training
from nas.trial import Report, Trial
from tests.search_for_tests import small_evaluate, small_space, small_task, without_test

PICKS: Picks = {"depth": 1, "layer0/width": 16, "layer0/sparsity": "0.5"}
SPACE = small_space()


def go_on(step: int, metrics: Any) -> bool:
    return True


def trial(number: int = 0, picks: Picks | None = None, **fields: Any) -> Trial:
    return Trial(number, PICKS if picks is None else picks, **{"budget": 1, **fields})


@dataclass(frozen=True)
class Mixed:
    """Leaves the mixture that it is given."""

    weight: float = 0.25

    def fit(self, network: nn.Module, task: Task, budget: int, report: Report) -> dict[str, float]:
        mixture: Any = network.mixture
        mixture["depth"] = torch.tensor([self.weight, 1 - self.weight], requires_grad=True)
        mixture.add("of the strategy", 3)
        return {"rmse": 1.0}


def test_a_trained_trial_leaves_what_the_network_can_be_built_from_again() -> None:
    evaluate = small_evaluate()
    outcome = evaluate.train(SPACE, trial(), 0, go_on)
    assert outcome.status == "ok" and outcome.state is not None
    assert outcome.metrics.keys() == {"train_loss", "rmse", "r2", "loss"}
    net = evaluate.rebuild(SPACE, PICKS, outcome.state)
    assert not net.training
    assert (weights(net)["layer0.linear.weight"] != 0).sum() == 16 * 6 / 2
    found = small_task().evaluate(net)
    assert found["rmse"] == pytest.approx(outcome.metrics["rmse"], rel=1e-5)


def test_learned_scores_come_back_with_their_masks() -> None:
    evaluate = small_evaluate()
    evaluate.training = Training(recipe=LearnedScores())
    state = evaluate.train(SPACE, trial(), 0, go_on).state
    assert state is not None
    net = evaluate.rebuild(SPACE, PICKS, state)
    (sparse,) = sparse_weights(net).values()
    assert sparse.scores is not None
    assert torch.equal(sparse.masks, state.tensors["layer0.linear.weight#masks"])
    assert (weights(net)["layer0.linear.weight"] != 0).sum() == 16 * 6 / 2


def test_the_seed_decides_the_training() -> None:
    outcomes = [small_evaluate().train(SPACE, trial(), seed, go_on) for seed in (1, 1, 2)]
    first, same, other = (o.metrics["rmse"] for o in outcomes)
    assert first == same != other


def test_costs_are_named_and_have_units() -> None:
    evaluate = small_evaluate()
    assert evaluate.analytic(SPACE, PICKS) == {
        "parameters": 6 * 16 + 16 + 16 * 2 + 2,
        "flops": 6 * 16 / 2 + 16 * 2,
    }
    assert [evaluate.unit(n) for n in ("rmse", "r2", "flops", "what")] == ["V", "", "", ""]


def test_a_task_or_both_functions_are_needed_and_costs_have_one_name_each() -> None:
    for wrong in ({}, {"train": print}, {"task": small_task(), "train": print, "validate": print}):
        with pytest.raises(ValueError, match="give a task, or both train= and validate="):
            Evaluate(**wrong)
    with pytest.raises(ValueError, match="costs must have different names, got"):
        Evaluate(small_task(), costs=(Flops(), Flops()))


def test_a_fit_of_the_strategy_trains_instead_and_its_mixture_is_kept() -> None:
    evaluate = small_evaluate()
    outcome = evaluate.train(SPACE, trial(picks={}, fit=Mixed()), 0, go_on)
    assert outcome.metrics == {"rmse": 1.0}
    assert outcome.mixture["depth"] == [0.25, 0.75]
    assert len(outcome.mixture["of the strategy"]) == 3


def test_a_supernet_is_restored_with_its_mixture() -> None:
    evaluate = small_evaluate()
    state = evaluate.train(SPACE, trial(picks={}, fit=Mixed()), 0, go_on).state
    assert state is not None
    again = SPACE.build({})
    restore(again, state, list(SPACE.open({})))
    mixture: Any = again.mixture
    assert mixture["depth"].tolist() == [0.25, 0.75]
    assert len(mixture["of the strategy"]) == 3
    assert torch.equal(weights(again)["classifier.weight"], state.tensors["classifier.weight"])


@pytest.mark.parametrize("fit", [None, Mixed()])
def test_a_closed_trial_inherits_from_a_supernet_and_trains_anew(fit: Any) -> None:
    evaluate = small_evaluate()
    parent = evaluate.train(SPACE, trial(picks={}, fit=fit), 0, go_on).state
    assert parent is not None
    still = Evaluate(small_task(), training=Training(lr=1e-12))
    child = still.train(SPACE, trial(1, parent=0, budget=2), 0, go_on, parent)
    assert child.state is not None and int(child.state.tensors["training#step"]) == 2
    name = "layer0.linear.weight"
    torch.testing.assert_close(child.state.tensors[name], parent.tensors[name])


def test_a_promotion_trains_only_the_epochs_that_are_left() -> None:
    evaluate, steps = small_evaluate(), []

    def report(step: int, metrics: Any) -> bool:
        steps.append(step)
        return True

    first = evaluate.train(SPACE, trial(budget=2), 0, report).state
    evaluate.train(SPACE, trial(1, budget=5, parent=0), 0, report, first)
    assert steps == [1, 2, 3, 4, 5]


def own(validate: Any, epochs: list[int] | None = None) -> Evaluate:
    def train(module: nn.Module, budget: int) -> None:
        assert module.training
        (epochs if epochs is not None else []).append(budget)

    return Evaluate(train=train, validate=validate, costs=(Parameters(),))


@pytest.mark.parametrize(
    ("given", "metrics"),
    [
        (0.25, {"error": 0.25}),
        (np.float32(0.5), {"error": 0.5}),
        (torch.tensor(0.5), {"error": 0.5}),
        ({"bits": 2, "depth": np.float32(1)}, {"bits": 2.0, "depth": 1.0}),
    ],
)
def test_functions_of_your_own_give_a_number_or_numbers_by_name(
    given: Any, metrics: dict[str, float]
) -> None:
    def validate(module: nn.Module) -> Any:
        assert not module.training and not torch.is_grad_enabled()
        assert isinstance(module(torch.zeros(1, 6)), Tensor)
        return given

    epochs: list[int] = []
    seen: list[Any] = []

    def report(step: int, metrics: Any) -> bool:
        seen.append((step, metrics))
        return True

    outcome = own(validate, epochs).train(SPACE, trial(budget=3), 0, report)
    assert outcome.metrics == metrics and epochs == [3] and seen == [(3, metrics)]
    assert all(type(value) is float for value in outcome.metrics.values())


def test_functions_of_your_own_train_the_epochs_that_a_promotion_has_left() -> None:
    epochs: list[int] = []
    evaluate = own(lambda module: 0.5, epochs)
    first = evaluate.train(SPACE, trial(budget=2), 0, go_on).state
    evaluate.train(SPACE, trial(1, budget=6, parent=0), 0, go_on, first)
    assert epochs == [2, 4]


def test_an_open_trial_or_one_with_its_own_training_needs_a_task() -> None:
    evaluate = own(lambda module: 0.5)
    with pytest.raises(ValueError, match=r"trial 3 leaves 'depth' open, .* give Evaluate a task"):
        evaluate.check(SPACE, trial(3, picks={}))
    with pytest.raises(ValueError, match=r"trial 4 has a training of its own, .* a task"):
        evaluate.check(SPACE, trial(4, fit=Mixed()))
    evaluate.check(SPACE, trial(5))
    small_evaluate().check(SPACE, trial(6, picks={}))


def test_directions_are_those_of_the_metrics_and_unknown_of_a_function() -> None:
    assert small_evaluate().directions == {
        "rmse": "minimize",
        "r2": "maximize",
        "loss": "minimize",
    }
    assert own(lambda module: 0.5).directions is None
    named = Evaluate(
        train=print, validate=lambda m: 0.0, metrics=(Metric("bits", direction="maximize"),)
    )
    assert named.directions == {"bits": "maximize"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(ArithmeticError, match=f"error is {value}"):
        own(lambda module: value).train(SPACE, trial(), 0, go_on)


def test_an_example_is_of_the_task_or_given_or_of_the_space() -> None:
    task = small_task()
    assert torch.equal(Evaluate(task).example(SPACE, 3), task.train.inputs[:3])
    given = torch.arange(6.0)[None]
    evaluate = Evaluate(train=print, validate=lambda m: 0.0, example=given)
    assert torch.equal(evaluate.example(SPACE, 4), given.expand(4, 6))
    assert own(lambda m: 0.0).example(SPACE, 2).shape == (2, 6)


def test_training_and_measuring_never_read_the_test_part() -> None:
    evaluate = small_evaluate(without_test(small_task()))
    outcome = evaluate.train(SPACE, trial(), 0, go_on)
    assert outcome.state is not None
    evaluate.measure(SPACE, PICKS, outcome.state)


def test_a_measured_cost_gets_the_trained_network_and_its_dense_twin() -> None:
    seen: list[Any] = []

    @dataclass(frozen=True)
    class Counted:
        name = "counted"
        unit = "u"
        batch: int = 3

        def measure(self, network: nn.Module, twin: nn.Module, example: Tensor) -> dict[str, Any]:
            seen.append((network, twin, example))
            return {"value": 7.0, "kind": "measured"}

    counted: Any = Counted()
    evaluate = small_evaluate(costs=(counted, Parameters()))
    outcome = evaluate.train(SPACE, trial(), 0, go_on)
    assert outcome.state is not None
    found = evaluate.measure(SPACE, PICKS, outcome.state)
    assert found == {"counted": {"value": 7.0, "kind": "measured"}}
    ((network, twin, example),) = seen
    assert example.shape == (3, 6) and not network.training and not twin.training
    assert sparse_weights(network) and not sparse_weights(twin)
    assert torch.equal(
        training_state(network)["classifier.weight"], outcome.state.tensors["classifier.weight"]
    )


def test_a_state_that_does_not_fit_is_refused_by_name() -> None:
    state = small_evaluate().train(SPACE, trial(), 0, go_on).state
    assert state is not None
    other = SPACE.build({**PICKS, "layer0/width": 8})
    with pytest.raises(ValueError, match=r"layer0.linear.weight needs shape"):
        restore(other, replace(state), [])
