"""How well networks do on the test part: each trained anew over seeds, dense ones too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from nas.choices import Pick, Picks
from nas.costs import NonZeros, Parameters
from nas.evaluate import Outcome
from nas.reporting.intervals import Estimate, estimate
from nas.run import Point, Record, Run
from nas.space import Space
from nas.tasks import Metric, binomial_interval, classification_error
from nas.worker import run_trial, trial_seed


class Unmasked(Space):
    """A space whose networks carry no masks: it builds the dense twins of another's.

    Args:
        space: The other.
    """

    def __init__(self, space: Space) -> None:
        super().__init__(space.choices, space.input_shape, ["unmasked", space.fingerprint])
        self.space = space

    def build(self, picks: Mapping[str, Pick], masked: bool = True) -> nn.Module:
        """The dense twin, whatever `masked` says."""
        return self.space.build(picks, masked=False)


@dataclass(frozen=True)
class Judged:
    """One network, trained anew over seeds and judged.

    Attributes:
        picks: Its architecture.
        parameters: Weights, zeros included.
        nonzeros: Weights that its masks keep.
        seeds: Of the trainings that succeeded.
        values: The metric of each.
        estimate: Their mean and interval; None where all trainings failed.
        binomial: The Wilson interval of each value by itself, where the metric is an error rate
            over independent examples.
        failures: Why trainings failed, by seed.
    """

    picks: Picks
    parameters: int
    nonzeros: int
    seeds: list[int]
    values: list[float]
    estimate: Estimate | None
    binomial: list[tuple[float, float]] | None
    failures: dict[int, str] = field(default_factory=dict)


class Judge:
    """Trains networks of a run anew and judges them by one metric.

    Networks with a task are judged on its test part, which a search never reads; those trained by
    functions of the user's own by what their `validate` gives.

    Args:
        run: An opened run.
        seed: Of the run.

    Attributes:
        metric: The first objective if the task measures it, else the task's first metric.
        part: `test`, or `validation` without a task.
    """

    def __init__(self, run: Run, seed: int) -> None:
        self.run, self.seed = run, seed
        self.metric = _metric(run)
        self.part = "test" if run.evaluate.task is not None else "validation"

    def own(self, point: Point) -> Judged:
        """A point of the front as the search left it: one sample, its own training."""
        seed = trial_seed(self.seed, source(point).trial.number)
        value = self.value(point.module(), point.metrics)
        return self._judged(self.run.problem.space, point.picks, {seed: value}, {})

    def again(self, point: Point, seeds: int) -> Judged:
        """A point over seeds; its own training counts as the first where it can be repeated.

        A trial that had a training of its strategy's own or a parent, or was stopped early, was
        not trained as the others here are: all its samples are then trained from scratch.
        """
        own = self.own(point) if is_plain(point) else None
        first = dict(zip(own.seeds, own.values, strict=True)) if own else {}
        return self.over_seeds(self.run.problem.space, point.picks, point, seeds, first)

    def dense(self, picks: Picks, point: Point, seeds: int) -> Judged:
        """An architecture without masks, trained as long as a point and from the same seeds."""
        return self.over_seeds(Unmasked(self.run.problem.space), picks, point, seeds)

    def validated_again(self, point: Point) -> float | None:
        """The validation metric of a point, from its weights; None without a task."""
        task = self.run.evaluate.task
        return None if task is None else task.evaluate(point.module())[self.metric.name]

    def over_seeds(
        self,
        space: Space,
        picks: Picks,
        point: Point,
        seeds: int,
        known: Mapping[int, float] | None = None,
    ) -> Judged:
        """Train picks as long as a point, from the seeds that the point gets.

        Args:
            space: Builds the network.
            picks: Its architecture.
            point: Gives the budget, and the number that its seeds come from.
            seeds: How many.
            known: Values that need no training, by seed.
        """
        values, failures = dict(known or {}), {}
        trial = replace(source(point).trial, picks=picks, parent=None, fit=None)
        for i in range(seeds):
            seed = trial_seed(self.seed + i, trial.number)
            if seed in values:
                continue
            outcome = run_trial(self.run.evaluate, space, trial, self.seed + i, _go_on)
            if outcome.state is None:
                failures[seed] = outcome.error or outcome.status
            else:
                values[seed] = self._value(space, picks, outcome)
        return self._judged(space, picks, values, failures)

    def value(self, network: nn.Module, validated: Mapping[str, float]) -> float:
        """The metric of a trained network."""
        task = self.run.evaluate.task
        judged = validated if task is None else task.evaluate(network, self.part)
        return judged[self.metric.name]

    def _value(self, space: Space, picks: Picks, outcome: Outcome) -> float:
        assert outcome.state is not None
        network = self.run.evaluate.rebuild(space, picks, outcome.state)
        return self.value(network, outcome.metrics)

    def _judged(
        self, space: Space, picks: Picks, values: Mapping[int, float], failures: dict[int, str]
    ) -> Judged:
        found = list(values.values())
        n = self.examples()
        binomial = [binomial_interval(v, n) for v in found] if n is not None else None
        mean = estimate(found) if found else None
        sizes = sizes_of(space, picks)
        return Judged(picks, *sizes, list(values), found, mean, binomial, failures)

    def examples(self) -> int | None:
        """Independent examples that an error rate is counted on; None: it is no error rate."""
        task = self.run.evaluate.task
        if task is None or task.measures.get(self.metric.name) is not classification_error:
            return None
        return len(task.test) if task.test.targets.ndim == 1 else None


def source(point: Point) -> Record:
    """The record of the trial whose training a point has: its own, or that of its equal."""
    same_as = point.record.result.same_as
    return point.record if same_as is None else point.run.records[same_as]


def is_plain(point: Point) -> bool:
    """Whether a point was trained from scratch, to the end, by the task's own training."""
    trial = source(point).trial
    return trial.fit is None and trial.parent is None and source(point).result.status == "ok"


def sizes_of(space: Space, picks: Mapping[str, Pick]) -> tuple[int, int]:
    """Parameters and non-zeros of an architecture."""
    if isinstance(space, Unmasked):
        parameters = int(Parameters().value(space.space, picks))
        return parameters, parameters
    return int(Parameters().value(space, picks)), int(NonZeros().value(space, picks))


def _metric(run: Run) -> Metric:
    first = run.problem.objectives[0]
    known = {m.name: m for m in run.evaluate.metrics}
    if first.name in known:
        return known[first.name]
    return next(iter(known.values()), Metric("error"))


def _go_on(step: int, metrics: Mapping[str, Any]) -> bool:
    return True
