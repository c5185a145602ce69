"""A search small enough to run many times, and parts that go wrong on purpose."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.callbacks import Callback
from nas.choices import Picks
from nas.evaluate import Evaluate, Outcome
from nas.executors import OnReport
from nas.latency import using_threads
from nas.loop import search
from nas.run import Run
from nas.space import GraphSpace
from nas.store import State
from nas.tasks import Task
from nas.training import Training
from nas.trial import Report, Result, Strategy, Trial
from nas.worker import run_trial
from search_spaces.mlp import mlp
from strategies.random_search import RandomSearch
from tests.tasks_for_tests import regression_task

OBJECTIVES = ("rmse", "parameters")
A: Picks = {"depth": 1, "layer0/width": 8, "layer0/sparsity": "0.5"}
B: Picks = {"depth": 1, "layer0/width": 16, "layer0/sparsity": "dense"}
C: Picks = {"depth": 1, "layer0/width": 16, "layer0/sparsity": "0.5"}


def small_task() -> Task:
    return regression_task(n=100)


def small_space(**changes: Any) -> GraphSpace:
    sizes: dict[str, Any] = {"depths": (1, 2), "widths": (8, 16), "sparsities": ("dense", "0.5")}
    return mlp((6,), 2, **{**sizes, **changes})


def small_evaluate(task: Task | None = None, **changes: Any) -> Evaluate:
    from nas.costs import Flops, Parameters

    costs = changes.pop("costs", (Parameters(), Flops()))
    training = changes.pop("training", Training(batch_size=64))
    return Evaluate(task or small_task(), costs=costs, training=training, **changes)


def small_search(out: Path, **changes: Any) -> Run:
    space, evaluate = changes.pop("space", small_space()), changes.pop("evaluate", None)
    strategy = changes.pop("strategy", RandomSearch(seed=3))
    given = {"objectives": OBJECTIVES, "trials": 4, "epochs": 2, **changes}
    with on_one_core():
        return search(space, strategy, evaluate or small_evaluate(), out=out, **given)


@contextmanager
def on_one_core() -> Iterator[None]:
    """Networks this small train several times slower on threads that wait for each other."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


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


@dataclass(frozen=True)
class LearnDepth:
    """Learns a mixture: mostly the deeper."""

    rate: float = 0.5

    def fit(self, network: nn.Module, task: Task, budget: int, report: Report) -> dict[str, float]:
        mixture: Any = network.mixture
        mixture["depth"] = torch.tensor([0.25, 0.75])
        return {"rmse": 1.0, "nothing": math.nan} if self.rate > 1 else {"rmse": 1.0}


@dataclass
class OpenThenClosed(Listed):
    """A differentiable strategy in small: a supernet, then what it prefers, from its weights."""

    continues = True

    def ask(self) -> Trial | None:
        if self.asked == 0:
            return self.trial({}, fit=LearnDepth())
        if self.asked == 1 and self.results:
            deep = self.results[0][1].mixture["depth"]
            depth = 1 + deep.index(max(deep))
            picks = self.problem.space.sample(self.rng(), {"depth": depth})
            return self.trial(picks, parent=0)
        return None


@dataclass
class Successive(Listed):
    """Two at a small budget, then the better of them at a larger: it continues a state."""

    continues = True

    def ask(self) -> Trial | None:
        if self.asked < 2:
            return self.trial([A, C][self.asked], budget=1)
        if self.asked == 2 and len(self.results) == 2:
            best = min(self.results, key=lambda r: r[1].metrics["rmse"])[0]
            return self.trial(best.picks, budget=3, parent=best.number)
        return None


@dataclass
class Always(Listed):
    """Asks for the same forever."""

    def ask(self) -> Trial | None:
        return self.trial(self.given[min(self.asked, len(self.given) - 1)])


@dataclass
class Fails:
    """Functions of one's own; the first trial goes wrong, the others do not."""

    how: str
    calls: int = 0

    def train(self, module: nn.Module, epochs: int) -> None:
        self.calls += 1
        if self.calls == 1:
            {"raises": self.raises, "memory": self.memory, "time": self.time}.get(
                self.how, lambda: None
            )()

    def validate(self, module: nn.Module) -> Any:
        wrong = self.calls == 1
        if wrong and self.how == "other names":
            return {"accuracy": 0.1}
        return math.nan if wrong and self.how == "nan" else 0.25

    def raises(self) -> None:
        raise RuntimeError("the data are gone")

    def memory(self) -> None:
        raise MemoryError

    def time(self) -> None:
        while True:
            time.sleep(0.01)


@dataclass
class Shuffled:
    """Three workers, of which the last to begin ends first."""

    workers: int = 3
    most: int = 0
    out: list[tuple[Trial, State | None]] = field(default_factory=list)

    def start(self, space: Any, evaluate: Evaluate, seed: int) -> None:
        self.how = (evaluate, space, seed)

    def submit(self, trial: Trial, start: State | None) -> None:
        self.out.append((trial, start))
        self.most = max(self.most, len(self.out))

    def next(self, on_report: OnReport) -> tuple[Trial, Outcome]:
        (trial, start), (evaluate, space, seed) = self.out.pop(), self.how

        def report(step: int, metrics: Mapping[str, float]) -> bool:
            return on_report(trial, step, metrics)

        with using_threads(1):
            return trial, run_trial(evaluate, space, trial, seed, report, start)

    def close(self) -> None:
        self.out.clear()


def cut(folder: Path, lines: int, more: int = 0) -> None:
    """Leave the log's first lines, and some characters of the next."""
    whole = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    torn = whole[lines][:more] if lines < len(whole) else ""
    (folder / "trials.jsonl").write_text("".join(whole[:lines]) + torn)


def trained(folder: Path) -> list[int]:
    return sorted({e["trial"] for e in log(folder) if e["event"] == "report"})
