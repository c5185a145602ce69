"""What every executor runs, wherever its workers are: one trial, and whatever goes wrong in it."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from nas.evaluate import Evaluate, Outcome
from nas.space import Space
from nas.store import State
from nas.trial import Report, Trial


class TimeLimit(Exception):
    """A trial has used up its time."""


def run_trial(
    evaluate: Evaluate,
    space: Space,
    trial: Trial,
    seed: int,
    report: Report,
    start: State | None = None,
) -> Outcome:
    """Train a trial; an exception, NaN, too little memory or time make a failed outcome.

    Args:
        evaluate: How to train.
        space: Where the picks are from.
        trial: What to train.
        seed: Of the run; the trial's own randomness comes from (seed, number).
        report: Called as training goes.
        start: The parent's state.
    """
    limited = _Reporter(report, evaluate.time_limit_s, time.perf_counter())
    try:
        with _alarm(evaluate.time_limit_s):
            outcome = evaluate.train(space, trial, trial_seed(seed, trial.number), limited, start)
    except (Exception, MemoryError) as error:  # anything may go wrong in a trial
        outcome = Outcome("failed", limited.last, error=_line(error))
    if limited.stopped and outcome.status == "ok":
        outcome = replace(outcome, status="stopped")
    return replace(outcome, seconds=time.perf_counter() - limited.begun)


def trial_seed(seed: int, number: int) -> int:
    """The seed of a trial's training, from the run's seed and its number."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big") >> 1


@dataclass
class _Reporter:
    """A report that keeps the time limit, the last metrics and whether the answer was stop.

    The time that the driver takes to answer is not the trial's: `begun` moves on by it.
    """

    report: Report
    limit_s: float | None
    begun: float
    stopped: bool = False

    def __post_init__(self) -> None:
        self.last: dict[str, float] = {}

    def __call__(self, step: int, metrics: Mapping[str, float]) -> bool:
        if self.limit_s is not None and time.perf_counter() - self.begun > self.limit_s:
            raise TimeLimit(f"passed its time limit of {self.limit_s:g} s")
        self.last = dict(metrics)
        asked, timer = time.perf_counter(), signal.setitimer(signal.ITIMER_REAL, 0)
        self.stopped = not self.report(step, metrics)
        self.begun += time.perf_counter() - asked
        signal.setitimer(signal.ITIMER_REAL, *timer)
        return not self.stopped


@contextmanager
def _alarm(limit_s: float | None) -> Iterator[None]:
    """Raise TimeLimit inside, even in code that never reports; in a main thread only.

    It is raised again each second, for code that swallows exceptions and goes on.
    """
    if limit_s is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: object) -> None:
        raise TimeLimit(f"passed its time limit of {limit_s:g} s")

    before = signal.signal(signal.SIGALRM, over)
    try:
        signal.setitimer(signal.ITIMER_REAL, limit_s, 1.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _line(error: BaseException) -> str:
    """The error in one line, its kind first; running out of memory by that name."""
    text = " ".join(str(error).split())
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    kind = "out of memory" if memory or "can't allocate memory" in text else type(error).__name__
    return f"{kind}: {text}"[:500]
