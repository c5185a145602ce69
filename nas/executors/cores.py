"""Which cores train and which measure: measuring runs beside nothing else on its cores."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from nas.evaluate import Evaluate


@dataclass(frozen=True)
class Cores:
    """A machine's cores, shared out.

    Attributes:
        training: Where trials train.
        measuring: What is kept for measuring; empty where nothing trains beside it.
    """

    training: tuple[int, ...]
    measuring: tuple[int, ...] = ()

    def threads(self, workers: int) -> int:
        """Threads of torch for each of `workers` that train at once."""
        return max(1, len(self.training) // workers)

    def keep(self) -> None:
        """Move this process to the cores kept for measuring, if any are."""
        if self.measuring:
            pin_process(self.measuring)

    def give_back(self) -> None:
        """Let this process use all cores again."""
        if self.measuring:
            pin_process(self.training + self.measuring)


def share_out(workers: int, evaluate: Evaluate) -> Cores:
    """Keep cores for measuring where several workers train and a cost is measured.

    Raises:
        ValueError: Too few cores, or a cost that is measured on the GPU that trials train on.
    """
    cores = available()
    if workers < 2 or not evaluate.measured:
        return Cores(cores)
    for cost in evaluate.measured:
        if evaluate.device != "cpu" and getattr(cost, "device", "cpu") == evaluate.device:
            raise ValueError(
                f"cost {cost.name}: is measured on {evaluate.device}, where nothing may train "
                f"beside it; needs 1 worker, got {workers}"
            )
    kept = max(getattr(cost, "threads", 1) for cost in evaluate.measured)
    if len(cores) <= kept:
        raise ValueError(
            f"{workers} workers beside a measured cost need more than {kept} cores, that being "
            f"kept for measuring; this process may use {len(cores)}"
        )
    return Cores(cores[:-kept], cores[-kept:])


def available() -> tuple[int, ...]:
    """The cores that the calling thread may use."""
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(os.cpu_count() or 1))
    return tuple(sorted(os.sched_getaffinity(0)))


@contextmanager
def on(cores: Collection[int]) -> Iterator[None]:
    """Run the calling thread, and so the processes and threads that it starts, on these cores."""
    before = available()
    pin_thread(cores)
    try:
        yield
    finally:
        pin_thread(before)


def pin_thread(cores: Collection[int], thread: int = 0) -> None:
    """Keep a thread on these cores, 0 being the calling one; does nothing without affinity."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(thread, cores)


def pin_process(cores: Collection[int]) -> None:
    """Keep every thread of this process on these cores, pools of threads of old included."""
    if hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it has ended meanwhile
                pin_thread(cores, int(thread))
