"""What tests of executors send to other processes: it must be importable there."""

import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nas.callbacks import Callback
from nas.choices import Picks
from nas.evaluate import Evaluate, Outcome
from nas.executors import Executor, OnReport
from nas.loop import search
from nas.run import Run
from nas.space import GraphSpace
from nas.store import Store
from nas.tasks import Task
from nas.trial import Report, Result, Trial
from search_spaces.mlp import mlp
from strategies.random_search import RandomSearch
from tests.tasks_for_tests import regression_task

SEED = 6  # the first networks are shallow, the third is deep


def small_space() -> GraphSpace:
    return mlp((6,), 2, depths=(1, 2), widths=(8, 16), sparsities=("dense", "0.5"))


def picks() -> Picks:
    return small_space().smallest()


def evaluate(**settings: Any) -> Evaluate:
    return Evaluate(regression_task(n=100), **settings)


def run_search(folder: Path, executor: Executor) -> Run:
    return search(
        small_space(),
        RandomSearch(seed=SEED),
        evaluate(),
        out=folder,
        objectives=["rmse"],
        trials=4,
        epochs=2,
        executor=executor,
    )


def told(folder: Path) -> dict[int, dict[str, Any]]:
    """What a log says of each trial that has ended, but for how long it took."""
    store = Store(folder)
    events = [e for e in store.events() if e["event"] == "tell"]
    store.close()
    for event in events:
        del event["seconds"]
    assert len({e["trial"] for e in events}) == len(events)
    return {e["trial"]: e for e in events}


def train_one(
    executor: Executor, fit: Any, on_report: OnReport | None = None, number: int = 0
) -> Outcome:
    """Train one trial with a fit of its own, on an executor that has been started."""
    executor.submit(Trial(number, picks(), budget=4, fit=fit), None)
    trial, outcome = executor.next(on_report or go_on)
    assert trial.number == number
    return outcome


def go_on(trial: Trial, step: int, metrics: Mapping[str, float]) -> bool:
    return True


@dataclass(frozen=True)
class Counts:
    """Reports each step, and gives the number of the last one."""

    def fit(self, network: nn.Module, task: Task, budget: int, report: Report) -> dict[str, float]:
        for step in range(1, budget + 1):
            if not report(step, {"rmse": float(step)}):
                break
        return {"rmse": float(step)}


@dataclass(frozen=True)
class Fails:
    """Ends as `how` says, after one report."""

    how: str

    def fit(self, network: nn.Module, task: Task, budget: int, report: Report) -> dict[str, float]:
        report(1, {"rmse": 1.0})
        return getattr(self, self.how)()

    def raises(self) -> dict[str, float]:
        raise ZeroDivisionError("no such luck")

    def nan(self) -> dict[str, float]:
        return {"rmse": float("nan")}

    def killed(self) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    def exits(self) -> dict[str, float]:
        os._exit(7)

    def late(self) -> dict[str, float]:
        time.sleep(600)
        return {}

    def deaf(self) -> dict[str, float]:
        """Late, and in no state to be told so."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        return self.late()


@dataclass(frozen=True)
class Surroundings:
    """Tells in which process, with how many threads and on which cores it trains."""

    def fit(self, network: nn.Module, task: Task, budget: int, report: Report) -> dict[str, float]:
        cores = os.sched_getaffinity(0)
        return {
            "process": float(os.getpid()),
            "threads": float(torch.get_num_threads()),
            "cores": float(len(cores)),
            "last_core": float(max(cores)),
        }


@dataclass(frozen=True)
class Measuring:
    """A measured cost that tells in which process it was measured."""

    name: ClassVar[str] = "measuring"
    unit: ClassVar[str] = ""
    batch: int = 1

    def measure(self, network: nn.Module, twin: nn.Module, example: Tensor) -> dict[str, Any]:
        return {"value": 1.0, "process": os.getpid()}


class Unwelcome:
    """Can be sent, and not be received."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise ImportError("not on this machine")


def untrained(**settings: Any) -> Evaluate:
    """Judges networks as they are made."""
    return Evaluate(train=train_shallow, validate=mean_weight, **settings)


class Announces(Callback):
    """Prints a line for each trial that has ended, for who waits to interrupt the search."""

    def told(self, run: Run, trial: Trial, result: Result) -> None:
        print("told", trial.number, flush=True)


def train_shallow(module: nn.Module, epochs: int) -> None:
    """Never comes to an end with a deep network, if the environment says so."""
    if os.environ.get("HANG_ON_DEEP") and len(list(module.parameters())) > 4:
        time.sleep(600)


def mean_weight(module: nn.Module) -> float:
    return float(torch.cat([p.detach().flatten() for p in module.parameters()]).abs().mean())


def search_untrained(folder: Path, executor: Executor, how: Evaluate, **settings: Any) -> Run:
    return search(
        small_space(), RandomSearch(seed=SEED), how, out=folder, executor=executor, **settings
    )


def interruptible_search(folder: Path, executor: Executor, resume: bool = False) -> Run:
    calls = [Announces()]
    return search_untrained(
        folder, executor, untrained(), trials=8, callbacks=calls, resume=resume
    )


@contextmanager
def interrupted(
    folder: Path, make_executor: str, by: signal.Signals = signal.SIGINT
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a search in a process of its own, and press Ctrl-C when a trial has ended.

    Args:
        folder: Of the run.
        make_executor: Python that imports what it needs and sets `executor`.
        by: Ctrl-C goes to all of the driver's process group, another signal to it alone.

    Yields:
        The driver's process, and the mark in the environment of all that it starts.
    """
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pathlib import Path; from tests.executor_helpers import interruptible_search; "
        f"{make_executor}; run = interruptible_search(Path({str(folder)!r}), executor); "
        "assert run.interrupted"
    )
    mark = f"MARK={uuid.uuid4().hex}"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | dict([mark.split("=")]) | {"HANG_ON_DEEP": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline().startswith("told")
        (os.killpg if by == signal.SIGINT else os.kill)(driver.pid, by)
        yield driver, mark


def left_running(mark: str, patience_s: float = 10.0) -> list[str]:
    """Command lines of processes with a mark in their environment that do not end by themselves.

    Args:
        mark: `name=value`.
        patience_s: How long each may take to end.
    """
    return [command for pid, command in _marked(mark) if not _ends(pid, patience_s) and command]


def _marked(mark: str) -> Iterator[tuple[int, str]]:
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended meanwhile, or is another's
            if mark.encode() in environment.read_bytes():
                command = environment.with_name("cmdline").read_text().replace("\0", " ")
                yield int(environment.parent.name), command


def _ends(pid: int, patience_s: float) -> bool:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], patience_s)[0])
    finally:
        os.close(process)
