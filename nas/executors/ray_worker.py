"""The far side of `RayTune`: the desk, where trials and news lie, the searcher, the worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import ray
import torch
from ray import cloudpickle, tune
from ray.tune.search import Searcher

from nas.executors.cores import Cores, pin_process
from nas.trial import Trial
from nas.worker import run_trial

Event = tuple[Any, ...]


@dataclass(frozen=True)
class Kit:
    """What a worker gets once, when it starts.

    Attributes:
        parts: Space, evaluate and seed, each pickled.
        threads: Of torch.
        cores: How the driver's machine is shared out.
        driver: Ray's name of the driver's machine.
    """

    parts: dict[str, bytes]
    threads: int
    cores: Cores
    driver: str


class Desk:
    """An actor between driver and workers, who cannot call each other.

    Events are (`taken`, number), (`report`, number, step, metrics), (`done`, number, outcome as
    bytes), (`lost`, number, why) and (`broken`, why).
    """

    def __init__(self, kit: list[Any]) -> None:
        self._kit = kit
        self._trials: dict[int, list[Any]] = {}
        self._at_work: dict[int, Any] = {}
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    async def kit(self) -> list[Any]:
        """A reference to the pickled `Kit`, in a list lest Ray fetches it for the desk."""
        return self._kit

    async def lay(self, number: int, trial: list[Any]) -> None:
        """The driver lays a trial out: a reference to it pickled with its parent's state."""
        self._trials[number] = trial

    async def take(self, number: int, worker: Any) -> list[Any] | None:
        """A worker takes it; None if the search is over."""
        if number in self._trials:
            self._at_work[number] = worker
            await self.say("taken", number)
        return self._trials.pop(number, None)

    async def say(self, *event: Any) -> None:
        """Tell the driver something."""
        await self._events.put(event)

    async def next(self) -> Event:
        """The driver waits for the next event."""
        return await self._events.get()

    async def report(self, number: int, step: int, metrics: Mapping[str, float]) -> bool:
        """A worker reports, and waits for the driver's answer: go on?"""
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self.say("report", number, step, metrics)
        return await self._answers[number]

    async def answer(self, number: int, go: bool) -> None:
        """The driver answers."""
        self._answers.pop(number).set_result(go)

    async def done(self, number: int, outcome: bytes) -> None:
        """A worker has trained a trial."""
        self._at_work.pop(number, None)
        await self.say("done", number, outcome)

    async def end(self, number: int, why: str) -> None:
        """End a worker by force, unless it is done after all."""
        worker = self._at_work.pop(number, None)
        if worker is not None:
            ray.kill(worker)
            await self.say("lost", number, why)

    async def close(self) -> None:
        """Take back what lies here, and end who is at work."""
        self._trials.clear()
        for number in list(self._at_work):
            await self.end(number, "the search is over")


class Asker(Searcher):
    """Tune's searcher: it suggests what the driver offers.

    Args:
        desk: Name of the desk.
    """

    def __init__(self, desk: str) -> None:
        super().__init__()
        self._desk = desk
        self._offers: SimpleQueue[Trial | None] = SimpleQueue()
        self._running: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles what it is given, to take a search up again; we have our log

    def offer(self, trial: Trial | None) -> None:
        """Offer a trial; None when there will be no more."""
        self._offers.put(trial)

    def suggest(self, trial_id: str) -> Any:
        """See Tune. Waits where nothing runs: Tune would look again after a second only."""
        try:
            trial = self._offers.get(block=not self._running)
        except Empty:
            return None
        if trial is None:
            return Searcher.FINISHED
        self._running.add(trial_id)
        return {"desk": self._desk, "trial": trial.number, "picks": json.dumps(trial.picks)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """See Tune; outcomes come over the desk."""
        self._running.discard(trial_id)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: a search is resumed from its log."""


class Coroner(tune.Callback):
    """Tells the driver which trials have lost their worker."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as the searcher's

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Tune; the last line of what it knows tells most."""
        lines = Path(trial.error_file).read_text().strip().splitlines()
        why = f"worker died ({lines[-1].strip()[:300]})"
        self._desk.say.remote("lost", trial.config["trial"], why)


class Worker(tune.Trainable):
    """A Tune trainable whose one step trains one trial."""

    def setup(self, config: dict[str, Any]) -> None:
        """Fetch the kit, once for all trials that this worker will train."""
        self._desk = ray.get_actor(config["desk"])
        try:
            kit: Kit = _fetched(ray.get(self._desk.kit.remote()))
            self._parts = {name: cloudpickle.loads(part) for name, part in kit.parts.items()}
        except Exception as error:  # whatever importing the user's modules brings
            why = f"a worker could not start ({type(error).__name__}: {error})"
            ray.get(self._desk.say.remote("broken", why))
            raise
        torch.set_num_threads(kit.threads)
        if ray.get_runtime_context().get_node_id() == kit.driver:
            pin_process(kit.cores.training)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Ready for another trial as it is."""
        return True

    def step(self) -> dict[str, Any]:
        """Train the trial."""
        number = self.config["trial"]
        me = ray.get_runtime_context().current_actor
        laid: Any = ray.get(self._desk.take.remote(number, me))
        if laid is not None:
            trial, start = _fetched(laid)
            outcome = run_trial(**self._parts, trial=trial, report=self._report, start=start)
            ray.get(self._desk.done.remote(number, cloudpickle.dumps(outcome)))
        return {"done": True}

    def _report(self, step: int, metrics: Mapping[str, float]) -> bool:
        answer: Any = self._desk.report.remote(self.config["trial"], step, dict(metrics))
        return bool(ray.get(answer))


def _fetched(references: Any) -> Any:
    (reference,) = references
    return cloudpickle.loads(ray.get(reference))
