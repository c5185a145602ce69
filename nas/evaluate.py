"""Evaluating an architecture: `train`, and then `measure`, beside which nothing else may run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nas.choices import Picks
from nas.costs import Analytic, Cost, Measured
from nas.masks import load_training_state, sparse_weights, training_state
from nas.network import inherit
from nas.problem import Direction
from nas.space import Space
from nas.store import State
from nas.tasks import Metric, Task
from nas.training import Training
from nas.trial import Report, Status, Trial

Train = Callable[[nn.Module, int], Any]
Validate = Callable[[nn.Module], "float | Mapping[str, float]"]


@dataclass(frozen=True)
class Outcome:
    """What training a trial gave: this travels back from a worker.

    Args:
        status: As of a `Result`.
        metrics: The task's metrics.
        mixture: Learned mixture weights of open choices.
        state: Weights and all else that the trial can be continued from; None if it failed.
        seconds: How long it took.
        error: Why it failed, in a line.
    """

    status: Status
    metrics: dict[str, float] = field(default_factory=dict)
    mixture: dict[str, list[float]] = field(default_factory=dict)
    state: State | None = None
    seconds: float = 0.0
    error: str | None = None


class Evaluate:
    """How an architecture is trained and judged, and what it costs.

    Either a task, or functions of your own on a plain `nn.Module`:

    Args:
        task: Data, loss and metrics; every strategy can use it.
        train: `train(module, epochs)` trains in place; closed trials only.
        validate: `validate(module)` gives a number, taken as `error`, or numbers by name.
        costs: What else is wanted of a network; analytic ones are checked before training.
        training: How a task is trained on.
        example: Inputs (1, ...) to pack and measure with; by default the task's or the space's.
        metrics: Directions and units of what `validate` gives; to be minimised by default.
        device: Where trials train.
        time_limit_s: Seconds after which a trial is given up as failed.

    Raises:
        ValueError: Neither a task nor both functions, or two costs of one name.
    """

    def __init__(
        self,
        task: Task | None = None,
        *,
        train: Train | None = None,
        validate: Validate | None = None,
        costs: Sequence[Cost] = (),
        training: Training | None = None,
        example: Tensor | None = None,
        metrics: Sequence[Metric] = (),
        device: str = "cpu",
        time_limit_s: float | None = None,
    ) -> None:
        if (task is None) != (train is not None and validate is not None):
            raise ValueError("Evaluate: give a task, or both train= and validate=")
        names = [cost.name for cost in costs]
        if len(set(names)) != len(names):
            raise ValueError(f"Evaluate: costs must have different names, got {names}")
        self.task, self.costs, self.training = task, tuple(costs), training or Training()
        self._train, self._validate, self._example = train, validate, example
        self.metrics = tuple(task.metrics) if task is not None else tuple(metrics)
        self.device, self.time_limit_s = device, time_limit_s

    @property
    def measured(self) -> list[Measured]:
        """The costs that run the packed network."""
        return [c for c in self.costs if isinstance(c, Measured)]

    @property
    def directions(self) -> dict[str, Direction] | None:
        """Which way each metric is better; None if only your function knows their names."""
        known: dict[str, Direction] = {m.name: m.direction for m in self.metrics}
        if self.task is not None:
            return {**known, "loss": "minimize"}
        return known or None

    def unit(self, name: str) -> str:
        """The unit of a metric or cost; empty for none."""
        units = {m.name: m.unit for m in self.metrics} | {c.name: c.unit for c in self.costs}
        return units.get(name, "")

    def analytic(self, space: Space, picks: Picks) -> dict[str, float]:
        """The costs that need no training."""
        return {c.name: c.value(space, picks) for c in self.costs if isinstance(c, Analytic)}

    def train(
        self, space: Space, trial: Trial, seed: int, report: Report, start: State | None = None
    ) -> Outcome:
        """Build and train a trial, from `start` if it has a parent. Raises whatever goes wrong."""
        torch.manual_seed(seed)
        network = space.build(trial.picks).to(self.device)
        still_open = list(space.open(trial.picks))
        if start is not None:
            restore(network, start, still_open)
        same = start is not None and start.meta["open"] == still_open
        metrics, extra = self._fit(network, trial, report, seed, start if same else None)
        _refuse_nan(metrics)
        mixture = _mixture(network)
        meta = {"open": still_open, "mixture": mixture, "budget": trial.budget}
        state = State({**_cpu(training_state(network)), **_cpu(extra)}, meta)
        return Outcome("ok", metrics, mixture, state)

    def _fit(
        self, network: nn.Module, trial: Trial, report: Report, seed: int, start: State | None
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        if self.task is None:
            return self._own(network, trial, report, start), {}
        if trial.fit is not None:
            return trial.fit.fit(network, self.task, trial.budget, report), {}
        goes_on = start is not None and "training#step" in start.tensors
        return self.training(
            network, self.task, trial.budget, report, seed, start if goes_on else None
        )

    def check(self, space: Space, trial: Trial) -> None:
        """Raise ValueError for a trial that functions of your own cannot train."""
        still_open = space.open(trial.picks)
        if self.task is None and (still_open or trial.fit is not None):
            what = f"leaves {still_open[0]!r} open" if still_open else "has a training of its own"
            raise ValueError(
                f"trial {trial.number} {what}, and train= and validate= can only train closed "
                "networks: give Evaluate a task"
            )

    def _own(
        self, network: nn.Module, trial: Trial, report: Report, start: State | None
    ) -> dict[str, float]:
        assert self._train is not None and self._validate is not None
        done = 0 if start is None else start.meta["budget"]
        self._train(network, max(0, trial.budget - done))
        network.eval()
        with torch.no_grad():
            found = self._validate(network)
        given = found if isinstance(found, Mapping) else {"error": found}
        metrics = {name: float(value) for name, value in given.items()}
        report(trial.budget, metrics)
        return metrics

    def measure(self, space: Space, picks: Picks, state: State) -> dict[str, dict[str, Any]]:
        """Run the packed network beside its dense twin: by cost, its `value` and provenance."""
        return {
            cost.name: cost.measure(
                self.rebuild(space, picks, state),
                space.build(picks, masked=False).eval(),
                self.example(space, cost.batch),
            )
            for cost in self.measured
        }

    def rebuild(self, space: Space, picks: Picks, state: State) -> nn.Module:
        """The trained network of a state, masked, in eval mode, on the CPU."""
        network = space.build(picks)
        restore(network, state, list(space.open(picks)))
        return network.eval()

    def example(self, space: Space, batch: int) -> Tensor:
        """Inputs for packing and measuring, (batch, ...)."""
        if self.task is not None:
            return self.task.example_input(batch)
        given = self._example if self._example is not None else getattr(space, "example", None)
        if given is None:
            given = torch.randn(1, *space.input_shape)
        return given[:1].expand(batch, *given.shape[1:]).contiguous()


def restore(network: nn.Module, state: State, still_open: list[str]) -> None:
    """Put a state into a network: as it is, or inherited where fewer choices are open now."""
    weights = {
        k: v for k, v in state.tensors.items() if not k.startswith(("optimizer#", "training#"))
    }
    if state.meta.get("open", []) != still_open:
        inherit(network, {k: v for k, v in weights.items() if "#" not in k})
        return
    for path, sparse in sparse_weights(network).items():
        if f"{path}#scores" in weights:
            sparse.learn(weights[path])
    load_training_state(network, weights)
    mixture: Any = getattr(network, "mixture", None)
    for name, values in state.meta.get("mixture", {}).items():
        mixture.add(name, len(values))
        mixture[name] = torch.tensor(values)


def _mixture(network: nn.Module) -> dict[str, list[float]]:
    mixture = getattr(network, "mixture", None)
    if mixture is None:
        return {}
    return {name: mixture[name].detach().cpu().tolist() for name in mixture.names()}


def _refuse_nan(metrics: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ArithmeticError(f"{name} is {value}")


def _cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
