"""A search small enough to run many times, and parts that go wrong on purpose."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nas.callbacks import Callback
from nas.choices import Picks
from nas.evaluate import Evaluate
from nas.loop import search
from nas.run import Run
from nas.space import GraphSpace
from nas.tasks import Task
from nas.training import Training
from nas.trial import Result, Strategy, Trial
from search_spaces.mlp import mlp
from strategies.random_search import RandomSearch
from tests.tasks_for_tests import regression_task

OBJECTIVES = ("rmse", "parameters")


def small_task() -> Task:
    return regression_task(n=100)


def small_space(**changes: Any) -> GraphSpace:
    sizes: dict[str, Any] = {"depths": (1, 2), "widths": (8, 16), "sparsities": ("dense", "0.5")}
    return mlp((6,), 2, **{**sizes, **changes})


def small_evaluate(task: Task | None = None, **changes: Any) -> Evaluate:
    from nas.costs import Flops, Parameters

    costs = changes.pop("costs", (Parameters(), Flops()))
    return Evaluate(task or small_task(), costs=costs, training=Training(batch_size=32), **changes)


def small_search(out: Path, **changes: Any) -> Run:
    space, evaluate = changes.pop("space", small_space()), changes.pop("evaluate", None)
    strategy = changes.pop("strategy", RandomSearch(seed=3))
    given = {"objectives": OBJECTIVES, "trials": 4, "epochs": 2, **changes}
    return search(space, strategy, evaluate or small_evaluate(), out=out, **given)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def told(folder: Path) -> list[dict[str, Any]]:
    return [event for event in log(folder) if event["event"] == "tell"]


def facts(run: Run) -> list[tuple[int, Picks, str, dict[str, float]]]:
    """What must be the same whenever a search is done again."""
    return [
        (number, record.trial.picks, record.result.status, record.result.metrics)
        for number, record in sorted(run.records.items())
    ]


@dataclass
class Listed(Strategy):
    """Asks for the picks that it is given, and keeps what it is told."""

    given: list[Picks] = field(default_factory=list)
    stop_at: int | None = None
    results: list[tuple[Trial, Result]] = field(init=False, default_factory=list)
    reports: list[tuple[int, int, float]] = field(init=False, default_factory=list)

    def ask(self) -> Trial | None:
        return self.trial(self.given[self.asked]) if self.asked < len(self.given) else None

    def tell(self, trial: Trial, result: Result) -> None:
        self.results.append((trial, result))

    def report(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> bool:
        self.reports.append((trial.number, step, metrics.get("rmse", -1.0)))
        return step != self.stop_at


@dataclass
class Heard(Callback):
    """Calls a function when a trial has ended."""

    on_told: Callable[[Trial], None]

    def told(self, run: Run, trial: Trial, result: Result) -> None:
        self.on_told(trial)


class Untouchable:
    """A part of a task that no one may read."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test part was read ({name}) during the search")

    def __len__(self) -> int:
        raise AssertionError("the test part was read during the search")


def without_test(task: Task) -> Task:
    part: Any = Untouchable()
    return replace(task, test=part)
