"""What travels: a trial to train, the result of it, and the strategy that asks and is told.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from nas.choices import Picks
from nas.space import Space

if TYPE_CHECKING:
    from torch import nn

    from nas.tasks import Task

Status = Literal["ok", "failed", "stopped", "refused"]


class Report(Protocol):
    """What training calls as it goes: after `step` epochs these are the metrics; go on?"""

    def __call__(self, step: int, metrics: Mapping[str, float]) -> bool:
        """True: go on. False: stop here and return."""
        ...


@runtime_checkable
class Fit(Protocol):
    """A training of a strategy's own: a frozen dataclass of plain values."""

    def fit(self, network: nn.Module, task: Task, budget: int, report: Report) -> dict[str, float]:
        """Train the network in place for `budget` epochs and return metrics.

        Mixture weights that it learned are left in `network.mixture`.
        """
        ...


@dataclass(frozen=True)
class Trial:
    """One thing to train.

    Args:
        number: Counts from 0, in the order of asking.
        picks: Picks of the space; left open, the supernet of what is open is trained.
        budget: Epochs in all, those of the parent included if it is continued.
        parent: The trial whose state it starts from.
        fit: A training of the strategy's own; None: the task's.
    """

    number: int
    picks: Picks
    budget: int
    parent: int | None = None
    fit: Fit | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; of `fit` its name and its fields."""
        name = {"name": type(self.fit).__name__, **_plain(self.fit)} if self.fit else None
        rest = {"budget": self.budget, "parent": self.parent, "fit": name}
        return {"trial": self.number, "picks": self.picks, **rest}


@dataclass(frozen=True)
class Result:
    """What became of a trial.

    Args:
        status: `ok`, `failed` (it raised, gave NaN, ran out of memory or time), `stopped` (a
            report was answered so) or `refused` (a cheap cost broke a limit; nothing was trained).
        metrics: Numbers by name: the task's metrics and the costs.
        violations: By how much each broken limit is broken.
        mixture: Learned mixture weights by choice, where choices were open.
        seconds: How long training took.
        error: Why it failed or was refused, in a line.
        details: Provenance of measured costs, by cost.
        same_as: Number of the trial of the same architecture and budget that this one repeats.
    """

    status: Status
    metrics: dict[str, float] = field(default_factory=dict)
    violations: dict[str, float] = field(default_factory=dict)
    mixture: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    details: dict[str, Any] = field(default_factory=dict)
    same_as: int | None = None

    @property
    def usable(self) -> bool:
        """Whether its metrics count."""
        return self.status in ("ok", "stopped")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Objective:
    """A metric or cost to make small, or large."""

    name: str
    direction: Literal["minimize", "maximize"] = "minimize"

    def loss(self, metrics: Mapping[str, float]) -> float:
        """The value to minimise."""
        value = metrics[self.name]
        return value if self.direction == "minimize" else -value


@dataclass(frozen=True)
class Problem:
    """What a strategy is to solve.

    Args:
        space: Where it searches.
        objectives: What is wanted; the first is the main one.
        limits: Upper bounds of costs.
        trials: How many closed trials may be trained.
        budget: Epochs of one.
    """

    space: Space
    objectives: tuple[Objective, ...]
    limits: Mapping[str, float]
    trials: int
    budget: int

    def losses(self, result: Result) -> tuple[float, ...]:
        """The objectives of a usable result, each to minimise."""
        return tuple(o.loss(result.metrics) for o in self.objectives)


@dataclass
class Strategy:
    """Asks for trials and is told results; it never owns the loop.

    A strategy is a dataclass: its fields are its settings. `start` is called once, before all
    else; then `ask`, `report` and `tell` in any order that the executor brings about. The same
    calls must always lead to the same answers: that is how a run is resumed from its log.

    Args:
        seed: Randomness of trial n comes from (seed, n) alone.
    """

    seed: int = 0
    problem: Problem = field(init=False, repr=False)
    asked: int = field(init=False, default=0, repr=False)
    continues = False  # whether trials start from others' states, so that all are kept
    ends_itself = False  # whether it may ask for more once the closed trials are used up

    def start(self, problem: Problem) -> None:
        """Take the problem. Raises ValueError if this strategy cannot solve it."""
        self.problem, self.asked = problem, 0

    def ask(self) -> Trial | None:
        """The next trial. None: wait for results while trials are out, else finished."""
        raise NotImplementedError

    def tell(self, trial: Trial, result: Result) -> None:
        """Take a result, in whatever order results come."""

    def report(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> bool:
        """Answer a report of a trial that is training: go on, or stop?"""
        return True

    def rng(self, number: int | None = None) -> np.random.Generator:
        """The randomness of a trial; of the next one to be asked by default."""
        return np.random.default_rng([self.seed, self.asked if number is None else number])

    def trial(self, picks: Picks, **fields_: Any) -> Trial:
        """The next trial, with the problem's budget unless another is given."""
        budget = fields_.pop("budget", self.problem.budget)
        self.asked += 1
        return Trial(self.asked - 1, picks, budget, **fields_)

    def settings(self) -> dict[str, Any]:
        """Its settings as plain JSON."""
        return {"name": type(self).__name__, **_plain(self)}


def _plain(value: Any) -> dict[str, Any]:
    import json

    names = [f.name for f in fields(value) if f.init]
    return json.loads(json.dumps({name: getattr(value, name) for name in names}))
