import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nas.evaluate import restore
from nas.latency import using_threads
from nas.masks import training_state, weights
from nas.recipes import LearnedScores, Magnitude, OneShot, RandomMask, Recipe
from nas.store import State
from nas.tasks import Task
from nas.training import Training
from tests.search_for_tests import small_space, small_task
from tests.tasks_for_tests import regression_task


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by more."""
    with using_threads(1):
        yield


PICKS: dict[str, Any] = {"depth": 1, "layer0/width": 16, "layer0/sparsity": "0.5"}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return small_space().build(PICKS)


@dataclass
class Reports:
    """Keeps what it is told, and answers stop after a step."""

    stop_after: int | None = None
    seen: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    def __call__(self, step: int, metrics: Any) -> bool:
        self.seen.append((step, dict(metrics)))
        return step != self.stop_after


@dataclass(frozen=True)
class Recorded:
    """A recipe that does nothing but keep its calls."""

    calls: list[tuple[str, int, int]] = field(default_factory=list)

    def start(self, module: nn.Module, generator: torch.Generator) -> None:
        self.calls.append(("start", 0, 0))

    def step(self, module: nn.Module, step: int, last: int) -> None:
        self.calls.append(("step", step, last))

    def finish(self, module: nn.Module) -> None:
        self.calls.append(("finish", 0, 0))


def state_of(net: nn.Module, extra: dict[str, Tensor], scores: bool = False) -> State:
    return State({**training_state(net), **extra}, {"open": []})


def continued(how: Training, first: int, whole: int, stop: int | None) -> nn.Module:
    """Train for a while, carry the state into a new module, and go on."""
    net = network()
    _, extra = how(net, small_task(), first, Reports(stop), seed=7)
    state = state_of(net, extra)
    again = network(seed=99)
    restore(again, state, [])
    torch.manual_seed(1234)
    how(again, small_task(), whole, Reports(), seed=7, start=state)
    return again


def test_what_is_drawn_while_training_goes_on_where_it_broke_off() -> None:
    def dropping() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 2))

    second, whole = dropping(), dropping()
    Training(batch_size=16)(whole, small_task(), 4, Reports())
    first = dropping()
    _, extra = Training(batch_size=16)(first, small_task(), 4, Reports(stop_after=2))
    second.load_state_dict(first.state_dict())
    torch.manual_seed(1234)
    Training(batch_size=16)(second, small_task(), 4, Reports(), start=state_of(first, extra))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True)
    )


RECIPES: list[Recipe] = [Magnitude(), OneShot(), RandomMask(), LearnedScores()]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: type(r).__name__)
def test_a_training_that_is_interrupted_goes_on_as_if_it_had_not_been(
    recipe: Recipe, optimizer: Any
) -> None:
    how = Training(batch_size=16, optimizer=optimizer, lr=0.01, recipe=recipe)
    whole = network()
    how(whole, small_task(), 4, Reports(), seed=7)
    parts = continued(how, first=4, whole=4, stop=2)
    assert weights(whole).keys() == weights(parts).keys()
    for key, value in weights(whole).items():
        assert torch.equal(value, weights(parts)[key]), key


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: type(r).__name__)
def test_a_training_that_is_over_goes_on_to_a_larger_budget(recipe: Recipe) -> None:
    how = Training(batch_size=16, lr=0.01, recipe=recipe)
    net = continued(how, first=2, whole=5, stop=None)
    kept = (weights(net)["layer0.linear.weight"] != 0).sum()
    assert kept == 16 * 6 // 2
    assert all(torch.isfinite(value).all() for value in weights(net).values())


def test_a_larger_budget_trains_the_epochs_that_are_left_with_their_steps() -> None:
    recipe = Recorded()
    how, per_epoch = Training(batch_size=16, recipe=recipe), 60 // 16 + 1
    continued(how, first=2, whole=3, stop=None)
    steps = [(step, last) for name, step, last in recipe.calls if name == "step"]
    assert steps[: 2 * per_epoch] == [(i, 2 * per_epoch) for i in range(2 * per_epoch)]
    assert steps[2 * per_epoch :] == [
        (i, 3 * per_epoch) for i in range(2 * per_epoch, 3 * per_epoch)
    ]
    names = [name for name, *_ in recipe.calls if name != "step"]
    assert names == ["start", "finish", "finish"]


def test_a_recipe_finishes_before_the_last_validation_only() -> None:
    recipe = Recorded()
    reports = Reports()
    Training(batch_size=16, recipe=recipe)(network(), small_task(), 3, reports)
    assert [name for name, *_ in recipe.calls].index("finish") == len(recipe.calls) - 1
    assert [step for step, _ in reports.seen] == [1, 2, 3]


def test_the_learning_rate_falls_along_half_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    real = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    Training(batch_size=30, optimizer="sgd", lr=0.1)(network(), small_task(), 2, Reports())
    expected = [0.05 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert rates == pytest.approx(expected)


def test_gradients_are_clipped_to_their_largest_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    real = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        grads = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    Training(optimizer="sgd", clip=1e-3)(network(), small_task(), 1, Reports())
    assert norms == pytest.approx([1e-3] * len(norms), rel=1e-3)


def test_a_stop_is_obeyed_at_once_and_the_last_metrics_are_returned() -> None:
    reports = Reports(stop_after=2)
    metrics, extra = Training()(network(), small_task(), 5, reports)
    assert [step for step, _ in reports.seen] == [1, 2]
    assert metrics == reports.seen[-1][1]
    assert int(extra["training#step"]) == 2
    assert metrics.keys() == {"train_loss", "rmse", "r2", "loss"}


@pytest.mark.parametrize(
    ("samples", "batch", "steps"), [(60, 16, 4), (60, 59, 1), (60, 20, 3), (3, 64, 1)]
)
def test_an_epoch_sees_every_batch_but_a_last_one_of_a_single_sample(
    samples: int, batch: int, steps: int
) -> None:
    task = small_task()
    task = with_train(task, samples)
    _, extra = Training(batch_size=batch)(network(), task, 1, Reports())
    assert int(extra["training#step"]) == steps


def with_train(task: Task, samples: int) -> Task:
    from dataclasses import replace

    return replace(task, train=task.train.subset(torch.arange(samples)))


def test_the_seed_is_all_that_the_order_of_batches_depends_on() -> None:
    def trained(seed: int, before: int) -> Tensor:
        net = network()
        torch.manual_seed(before)
        Training(batch_size=16)(net, small_task(), 1, Reports(), seed=seed)
        return weights(net)["classifier.weight"]

    assert torch.equal(trained(1, 0), trained(1, 5))
    assert not torch.equal(trained(1, 0), trained(2, 0))


def test_a_seeded_loss_that_a_refactor_may_not_change() -> None:
    torch.manual_seed(0)
    net, how = small_space().build(PICKS), Training(batch_size=32, lr=0.02)
    metrics, _ = how(net, regression_task(n=200), 3, Reports(), seed=0)
    assert (metrics["train_loss"], metrics["rmse"]) == pytest.approx(PINNED, rel=1e-4)


PINNED = (0.497759, 0.711974)


@pytest.mark.parametrize(("batch_size", "lr"), [(0, 0.1), (8, 0.0), (8, -1.0)])
def test_settings_that_cannot_be_are_refused_with_their_values(batch_size: int, lr: float) -> None:
    with pytest.raises(ValueError, match=f"must be positive, got {batch_size} and {lr}"):
        Training(batch_size=batch_size, lr=lr)
