"""The report of a run: its front beside what it must beat, measured and trained anew."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nas.provenance import provenance
from nas.reporting.accuracy import Judge, Judged, is_plain, source
from nas.reporting.agreement import (
    Prediction,
    Ranking,
    latency_predictions,
    supernet_ranking,
)
from nas.reporting.baseline import Baseline, compare_with_random
from nas.reporting.intervals import Estimate, difference
from nas.reporting.speed import Speed, measure_speed
from nas.run import Point, Run
from nas.tasks import Metric

log = logging.getLogger("nas")


@dataclass(frozen=True)
class Plan:
    """What to spend on a report.

    Args:
        seeds: Trainings of each point of the front, of its dense twin and of the dense parent.
        networks: Random networks of the baseline; 0 for none.
        baseline_seeds: Trainings of each of them.
        batches: Samples in a call, for each measurement of speed.
        compiled: Whether to measure `torch.compile` too, tens of seconds a point and batch.
    """

    seeds: int = 5
    networks: int = 5
    baseline_seeds: int = 3
    batches: tuple[int, ...] = (1, 64)
    compiled: bool = True

    def __post_init__(self) -> None:
        least = min(self.seeds, self.baseline_seeds, *self.batches)
        if not self.batches or least < 1 or self.networks < 0:
            raise ValueError(
                "Plan: seeds, baseline_seeds and batches must be at least 1, networks at least "
                f"0, got {self.seeds}, {self.baseline_seeds}, {self.batches} and {self.networks}"
            )


@dataclass(frozen=True)
class Row:
    """One point of the front.

    Attributes:
        trial: Its number.
        architecture: Its id.
        validation: What the search logged of it, costs too.
        test: What the search read from the test part when it ended.
        own: The very network that the search left, judged here.
        judged: Over seeds.
        patterns: How many weight tensors (of two dimensions or more) have which sparsity.
        notes: Where the data or the trainings here differ from the search's.
        speeds: One for each batch size.
    """

    trial: int
    architecture: str
    validation: dict[str, float]
    test: dict[str, float]
    own: Judged
    judged: Judged
    patterns: dict[str, int]
    notes: list[str]
    speeds: list[Speed]


@dataclass(frozen=True)
class DenseNetwork:
    """A dense network to compare the best point with.

    Attributes:
        judged: Trained without masks, over seeds.
        difference: The best point's metric less this one's.
    """

    judged: Judged
    difference: Estimate | None


@dataclass(frozen=True)
class Report:
    """All that a report says; docs/report.md describes its JSON.

    Attributes:
        run: Name of the run's folder.
        search: The run's description, as its `run.json` has it.
        made: Where the report was made: versions, device, threads, git, kernels' instructions.
        plan: What was spent.
        metric: What networks are judged by.
        part: `test`, or `validation` for a run without a task.
        examples: Independent examples in that part, for an error rate.
        points: The front, best in the first objective first.
        twin: The dense twin of the first point.
        parent: The dense parent, the largest architecture without masks.
        baseline: Random networks of as many non-zeros as the first point; None: not asked for.
        ranking: How the supernet ranked networks; None where the run has none.
        predictions: How well analytic costs tell the latency; empty where none was measured.
    """

    run: str
    search: dict[str, Any]
    made: dict[str, Any]
    plan: Plan
    metric: Metric
    part: str
    examples: int | None
    points: list[Row]
    twin: DenseNetwork
    parent: DenseNetwork
    baseline: Baseline | None
    ranking: Ranking | None
    predictions: list[Prediction]

    @property
    def best(self) -> Row:
        """The point of the front that is best in the first objective."""
        return self.points[0]


def make_report(run: Run, plan: Plan | None = None) -> Report:
    """Train and measure what a run's report needs; minutes, if not more.

    Args:
        run: Opened by `nas.reopen.open_run`.
        plan: What to spend.

    Raises:
        ValueError: The run has found no network within its limits.
    """
    plan, search = plan or Plan(), run.store.read("run.json")
    front = run.front()
    if not front:
        raise ValueError(f"{run.folder}: no trial is within the limits, there is no front")
    judge = Judge(run, search["strategy"]["seed"])
    points = [_row(judge, point, plan) for point in front]
    log.info("dense twin and dense parent: training %d times each", plan.seeds)
    largest = run.problem.space.largest()
    twin, parent = (_dense(judge, front[0], p, points[0], plan) for p in (front[0].picks, largest))
    return Report(
        run=run.folder.resolve().name,
        search=search,
        made={**provenance(run.evaluate.device), "isa": _isa()},
        plan=plan,
        metric=judge.metric,
        part=judge.part,
        examples=judge.examples(),
        points=points,
        twin=twin,
        parent=parent,
        baseline=_baseline(judge, front[0], plan),
        ranking=supernet_ranking(run),
        predictions=latency_predictions(run),
    )


def _row(judge: Judge, point: Point, plan: Plan) -> Row:
    log.info("trial %d: measuring at batch %s", point.number, plan.batches)
    speeds = [measure_speed(point, batch, plan.compiled) for batch in plan.batches]
    log.info("trial %d: training over %d seeds", point.number, plan.seeds)
    return Row(
        trial=point.number,
        architecture=point.run.problem.space.architecture(point.picks).id,
        validation=point.metrics,
        test=point.record.test,
        own=judge.own(point),
        judged=judge.again(point, plan.seeds),
        patterns=_patterns(point),
        notes=[*_other_data(judge, point), *_other_training(point)],
        speeds=speeds,
    )


def _patterns(point: Point) -> dict[str, int]:
    layers = point.run.problem.space.layers(point.picks)
    return dict(Counter(layer.sparsity.label for layer in layers if len(layer.shape) > 1))


def _other_data(judge: Judge, point: Point) -> Iterator[str]:
    name, now = judge.metric.name, judge.validated_again(point)
    before = point.metrics.get(name)
    if now is not None and before is not None and not math.isclose(now, before, rel_tol=1e-3):
        yield (
            f"its validation {name} is {now:.4g} here, it was {before:.4g} in the search: the "
            "machine or the data are others"
        )


def _other_training(point: Point) -> Iterator[str]:
    if is_plain(point):
        return
    trial, status = source(point).trial, source(point).result.status
    fit = f" by {getattr(trial.fit, 'name', type(trial.fit).__name__)}" if trial.fit else ""
    parent = f" from the state of trial {trial.parent}" if trial.parent is not None else ""
    yield (
        f"the search trained it{fit}{parent} (status {status}); here it is trained from scratch "
        f"for {trial.budget} epochs by the task's own training"
    )


def _dense(
    judge: Judge, point: Point, picks: Mapping[str, Any], best: Row, plan: Plan
) -> DenseNetwork:
    judged = judge.dense(dict(picks), point, plan.seeds)
    both = best.judged.values and judged.values
    return DenseNetwork(judged, difference(best.judged.values, judged.values) if both else None)


def _baseline(judge: Judge, point: Point, plan: Plan) -> Baseline | None:
    if not plan.networks:
        return None
    log.info("baseline: %d random networks over %d seeds", plan.networks, plan.baseline_seeds)
    return compare_with_random(judge, point, plan.networks, plan.baseline_seeds)


def _isa() -> str:
    from kernels.native.library import library

    core = library()
    return core.isa if core is not None else "torch"
