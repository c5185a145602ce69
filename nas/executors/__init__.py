"""Executors: in which process a trial is trained. Measuring is the driver's, alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from nas.evaluate import Evaluate, Outcome
from nas.space import Space
from nas.store import State
from nas.trial import Trial

OnReport = Callable[[Trial, int, Mapping[str, float]], bool]


class Executor(Protocol):
    """Trains trials, `workers` at a time."""

    workers: int

    def start(self, space: Space, evaluate: Evaluate, seed: int) -> None:
        """Get ready to train trials of this space."""
        ...

    def submit(self, trial: Trial, start: State | None) -> None:
        """Hand in a trial, and its parent's state; at most `workers` are out at once."""
        ...

    def next(self, on_report: OnReport) -> tuple[Trial, Outcome]:
        """Wait for the next trial that ends, answering reports meanwhile."""
        ...

    def close(self) -> None:
        """Give up what is out and let go of all processes."""
        ...


class InProcess:
    """Trains in this process, one trial at a time."""

    workers = 1

    def start(self, space: Space, evaluate: Evaluate, seed: int) -> None:
        """See `Executor.start`."""
        self._how = (evaluate, space, seed)
        self._waiting: list[tuple[Trial, State | None]] = []

    def submit(self, trial: Trial, start: State | None) -> None:
        """See `Executor.submit`."""
        self._waiting.append((trial, start))

    def next(self, on_report: OnReport) -> tuple[Trial, Outcome]:
        """See `Executor.next`."""
        from nas.worker import run_trial

        (trial, start), (evaluate, space, seed) = self._waiting.pop(0), self._how

        def report(step: int, metrics: Mapping[str, float]) -> bool:
            return on_report(trial, step, metrics)

        return trial, run_trial(evaluate, space, trial, seed, report, start)

    def close(self) -> None:
        """See `Executor.close`."""
        self._waiting.clear()
