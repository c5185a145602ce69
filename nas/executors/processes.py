"""Trains trials in processes of this machine, which are started once and reused."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

import torch

from nas.evaluate import Evaluate, Outcome
from nas.executors import NoWorkers, OnReport, packed
from nas.executors.cores import Cores, available, on, share_out
from nas.space import Space
from nas.store import State
from nas.trial import Trial
from nas.worker import run_trial

GRACE_S = 5.0
SPAWN = multiprocessing.get_context("spawn")
Message = tuple[Any, ...]


class Processes:
    """Trains in worker processes of this machine, each with the same number of threads.

    A worker that dies, or does not end soon after its time limit, makes a failed trial, and
    another takes its place. Where a cost is measured, cores are kept for that.

    Args:
        workers: How many trials train at once.
        threads: Of torch in each; by default the cores are shared out evenly.

    Raises:
        ValueError: No worker, or no thread.
    """

    def __init__(self, workers: int, threads: int | None = None) -> None:
        if workers < 1 or (threads is not None and threads < 1):
            raise ValueError(
                f"Processes: workers and threads must be at least 1, got {workers} and {threads}"
            )
        self.workers, self._threads = workers, threads
        self._staff: list[_Worker] = []
        self._cores = Cores(available())

    def start(self, space: Space, evaluate: Evaluate, seed: int) -> None:
        """See `Executor.start`.

        Raises:
            ValueError: Something cannot travel to a worker, or there are too few cores.
            NoWorkers: A worker could not start.
        """
        parts = packed(pickle.dumps, space=space, evaluate=evaluate, seed=seed)
        self._package = pickle.dumps(parts)
        self._cores, self._limit_s = share_out(self.workers, evaluate), evaluate.time_limit_s
        try:
            self._staff = [self._hire() for _ in range(self.workers)]
            for worker in self._staff:
                worker.brief(self._package)
        except BaseException:
            self.close()
            raise
        self._cores.keep()

    def submit(self, trial: Trial, start: State | None) -> None:
        """See `Executor.submit`."""
        worker = next(w for w in self._staff if w.trial is None)
        if not worker.process.is_alive():
            worker = self._replace(worker)
        worker.take(trial, start, self._limit_s)

    def next(self, on_report: OnReport) -> tuple[Trial, Outcome]:
        """See `Executor.next`."""
        while True:
            for worker in self._wait():
                outcome = self._heard(worker, on_report)
                if outcome is not None:
                    trial, worker.trial = worker.trial, None
                    assert trial is not None
                    return trial, outcome

    def close(self) -> None:
        """See `Executor.close`."""
        for worker in self._staff:
            worker.end()
        self._staff = []
        self._cores.give_back()

    def _hire(self) -> _Worker:
        threads = self._threads or self._cores.threads(self.workers)
        with on(self._cores.training):
            return _Worker(threads)

    def _replace(self, worker: _Worker) -> _Worker:
        worker.end()
        fresh = self._hire()
        self._staff[self._staff.index(worker)] = fresh
        fresh.brief(self._package)
        return fresh

    def _wait(self) -> list[_Worker]:
        """Busy workers, once one of them has something to say, is dead or is out of time."""
        busy, begun = [w for w in self._staff if w.trial is not None], time.monotonic()
        left = min(w.left_s for w in busy)
        sources = [s for w in busy for s in (w.pipe, w.process.sentinel)]
        connection.wait(sources, None if left == math.inf else max(0.0, left))
        for worker in busy:
            worker.left_s -= time.monotonic() - begun
        return busy

    def _heard(self, worker: _Worker, on_report: OnReport) -> Outcome | None:
        """Answer a report, or give the outcome of a trial that has ended."""
        try:
            message = worker.hear()
        except (EOFError, OSError):
            return self._lost(worker, f"worker died ({worker.end(patience_s=1.0)})")
        if message is None:
            late = f"TimeLimit: went on for {GRACE_S:g} s after its limit of {self._limit_s} s"
            return self._lost(worker, late) if worker.left_s <= 0 else None
        if message[0] == "done":
            return message[1]
        assert worker.trial is not None
        worker.tell(on_report(worker.trial, *message[1:]))
        return None

    def _lost(self, worker: _Worker, error: str) -> Outcome:
        self._replace(worker)
        return Outcome("failed", seconds=time.monotonic() - worker.begun, error=error)


class _Worker:
    """The driver's side of a worker process."""

    def __init__(self, threads: int) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=work, args=(theirs, threads))
        with _interrupts_held():
            self.process.start()
        theirs.close()
        self.trial: Trial | None = None
        self.begun, self.left_s = 0.0, math.inf

    def brief(self, package: bytes) -> None:
        """Hand over space and evaluate, and wait until the worker has them."""
        try:
            self.pipe.send_bytes(package)
            (problem,) = _receive(self.pipe)
        except (EOFError, OSError):
            problem = f'{self.end(patience_s=1.0)}; a script needs `if __name__ == "__main__":`'
        if problem:
            raise NoWorkers(f"Processes: a worker could not start ({problem})")

    def take(self, trial: Trial, start: State | None, limit_s: float | None) -> None:
        """Begin a trial."""
        self.trial, self.begun = trial, time.monotonic()
        self.left_s = math.inf if limit_s is None else limit_s + GRACE_S
        self.tell((trial, start))

    def tell(self, message: Any) -> None:
        """Send; a worker that has died meanwhile is found out when it is heard next."""
        with suppress(BrokenPipeError, ConnectionResetError):
            _send(self.pipe, message)

    def hear(self) -> Message | None:
        """What it said, None for nothing. Raises EOFError or OSError if it is dead."""
        alive = self.process.is_alive()
        if self.pipe.poll():
            return _receive(self.pipe)
        if not alive:
            raise EOFError
        return None

    def end(self, patience_s: float = 0.0) -> str:
        """End the process, by force if it does not by itself, and say how it ended."""
        if self.pipe.closed:
            return "ended before"
        self.pipe.close()
        self.process.join(patience_s)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        self.process.close()
        return f"signal {-code}" if code < 0 else f"exit code {code}"


def work(pipe: Connection, threads: int) -> None:
    """What a worker process does, until the driver lets go of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    threading.Thread(target=_end_with_driver, daemon=True).start()
    torch.set_num_threads(threads)
    with suppress(EOFError, OSError):
        _work(pipe)


def _work(pipe: Connection) -> None:
    try:
        parts = {name: pickle.loads(part) for name, part in _receive(pipe).items()}
    except Exception as error:  # whatever importing the user's modules brings
        _send(pipe, (f"{type(error).__name__}: {error}",))
        return
    _send(pipe, (None,))

    def report(step: int, metrics: Mapping[str, float]) -> bool:
        _send(pipe, ("report", step, dict(metrics)))
        return _receive(pipe)

    while True:
        trial, start = _receive(pipe)
        outcome = run_trial(**parts, trial=trial, report=report, start=start)
        _send(pipe, ("done", outcome))


def _end_with_driver() -> None:
    driver = multiprocessing.parent_process()
    assert driver is not None
    connection.wait([driver.sentinel])
    os._exit(1)


def _send(pipe: Connection, message: Any) -> None:
    """Send as plain bytes: `pipe.send` would pass tensors on as open files."""
    pipe.send_bytes(pickle.dumps(message))


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back, so that a process started inside is born deaf to it."""
    resource_tracker.ensure_running()  # starting it lifts the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
