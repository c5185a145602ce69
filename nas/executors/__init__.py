"""Executors: in which process a trial is trained. Measuring is the driver's, alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pickle import PicklingError
from typing import Any, Protocol

from nas.evaluate import Evaluate, Outcome
from nas.space import Space
from nas.store import State
from nas.trial import Trial

OnReport = Callable[[Trial, int, Mapping[str, float]], bool]


class NoWorkers(RuntimeError):
    """No worker process could start."""


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


def packed(dumps: Callable[[Any], bytes], **parts: Any) -> dict[str, bytes]:
    """Pickle what workers need. Raises ValueError naming the part that cannot be pickled."""
    found = {}
    for name, part in parts.items():
        try:
            found[name] = dumps(part)
        except (PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{name} cannot travel to worker processes ({error}): "
                "make it of functions and classes that can be imported"
            ) from None
    return found


class InProcess:
    """Trains in this process, one trial at a time, on all cores that it may use."""

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
        from nas.executors.cores import available
        from nas.latency import using_threads
        from nas.worker import run_trial

        (trial, start), (evaluate, space, seed) = self._waiting.pop(0), self._how
        mistakes: list[Exception] = []

        def report(step: int, metrics: Mapping[str, float]) -> bool:
            try:
                return on_report(trial, step, metrics)
            except Exception as mistake:  # the driver's, so no failure of the trial
                mistakes.append(mistake)
                raise

        with using_threads(len(available())):
            outcome = run_trial(evaluate, space, trial, seed, report, start)
        if mistakes:
            raise mistakes[0]
        return trial, outcome

    def close(self) -> None:
        """See `Executor.close`."""
        self._waiting.clear()
