"""Trains trials on Ray: Ray Tune starts, reuses and watches the workers, and asks us for trials.

Tune's own loop runs in a thread. Its searcher hands on what `submit` is given; what comes back
(reports, outcomes, news of dead workers) comes by way of an actor, the desk, to the thread that
searches, so that strategies and callbacks run there and an exception of theirs is its own.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import ray
from ray import cloudpickle, tune

from nas.evaluate import Evaluate, Outcome
from nas.executors import NoWorkers, OnReport, packed
from nas.executors.cores import on, share_out
from nas.executors.ray_worker import Asker, Coroner, Desk, Event, Kit, Worker
from nas.space import Space
from nas.store import State
from nas.trial import Trial

dumps: Any = cloudpickle.dumps
GRACE_S = 5.0
PATIENCE_S = 30.0
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints at any verbosity
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}
QUIET: dict[str, Any] = {"logging_level": logging.CRITICAL + 1, "log_to_driver": False}


class RayTune:
    """Trains in actors of a Ray cluster, each with the same number of threads.

    Inside a Ray job, or with RAY_ADDRESS set, it is that cluster; else one is started on this
    machine, and ended with the search. A worker that dies, or does not end soon after its time
    limit, makes a failed trial. Measuring is the driver's: where a cost is measured, workers on
    the driver's machine leave cores to it.

    Args:
        workers: How many trials train at once.
        address: Of a running cluster.
        threads: Of torch in each, and so the CPUs that Ray is asked for; by default the
            cluster's are shared out evenly.

    Raises:
        ValueError: No worker, or no thread.
    """

    def __init__(
        self, workers: int, address: str | None = None, threads: int | None = None
    ) -> None:
        if workers < 1 or (threads is not None and threads < 1):
            raise ValueError(
                f"RayTune: workers and threads must be at least 1, got {workers} and {threads}"
            )
        self.workers, self._threads, self._address = workers, threads, address
        self._held = ExitStack()

    def start(self, space: Space, evaluate: Evaluate, seed: int) -> None:
        """See `Executor.start`.

        Raises:
            ValueError: Something cannot travel to a worker, there are too few cores, or trials
                are to train on a GPU and Ray has none.
            ConnectionError: There is no cluster at the address.
        """
        self._limit_s, self._left_s = evaluate.time_limit_s, dict[int, float]()
        self._out: dict[int, Trial] = {}
        self._pending: Any = None
        self._proven = False
        parts = packed(dumps, space=space, evaluate=evaluate, seed=seed)
        with ExitStack() as held:
            self._cores = share_out(self.workers, evaluate)
            self._cores.keep()
            held.callback(self._cores.give_back)
            held.enter_context(quiet())
            with on(self._cores.training):
                self._open(held, parts, evaluate)
            self._held = held.pop_all()

    def submit(self, trial: Trial, start: State | None) -> None:
        """See `Executor.submit`."""
        self._out[trial.number] = trial
        packed = ray.put(dumps((trial, start)))
        ray.get(self._desk.lay.remote(trial.number, [packed]))
        self._asker.offer(trial)

    def next(self, on_report: OnReport) -> tuple[Trial, Outcome]:
        """See `Executor.next`.

        Raises:
            NoWorkers: None could start.
            RuntimeError: Ray Tune has ended.
        """
        while True:
            kind, number, *said = self._event()
            if kind == "broken":
                raise RuntimeError(f"RayTune: {number}")
            if number not in self._out:
                continue  # the rest of what a trial that has ended had to say
            if kind == "taken":
                self._proven = True
                self._left_s[number] = (self._limit_s or math.inf) + GRACE_S
            elif kind == "report":
                go = on_report(self._out[number], *said)
                self._desk.answer.remote(number, go)
            else:
                return self._ended(number, *said)

    def close(self) -> None:
        """See `Executor.close`."""
        self._held.close()

    def _open(self, held: ExitStack, parts: dict[str, bytes], evaluate: Evaluate) -> None:
        """Join or start the cluster, set up the desk, and set Tune to work."""
        if not ray.is_initialized():
            held.callback(ray.shutdown)
            self._join(evaluate)
        cpus, driver = self._cpus(), ray.get_runtime_context().get_node_id()
        kit, name = Kit(parts, cpus, self._cores, driver), f"sparse-nas-{uuid.uuid4().hex}"
        self._desk = _desk(name, [ray.put(dumps(kit))])
        held.callback(ray.kill, self._desk)
        self._asker = Asker(name)
        storage = held.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        tuner = self._tuner({"cpu": cpus, **_gpus(evaluate, self.workers)}, storage)
        thread = threading.Thread(target=_fit, args=(tuner, self._desk), daemon=True)
        thread.start()
        held.callback(self._end, thread)

    def _tuner(self, resources: dict[str, float], storage: str) -> tune.Tuner:
        return tune.Tuner(
            tune.with_resources(Worker, resources),
            tune_config=tune.TuneConfig(search_alg=self._asker, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(
                name="search",
                storage_path=storage,
                verbose=0,
                callbacks=[Coroner(self._desk)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )

    def _join(self, evaluate: Evaluate) -> None:
        address = self._address or os.environ.get("RAY_ADDRESS")
        if address:
            _check_address(address)
            ray.init(address, **QUIET)
            return
        cpus = self.workers * (self._threads or self._cores.threads(self.workers))
        gpus = None if evaluate.device.startswith("cuda") else 0
        ray.init("local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, **QUIET)

    def _cpus(self) -> int:
        """CPUs of a trial: an even share of all that there are, if a machine has as many."""
        if self._threads:
            return self._threads
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes if node["Alive"]]
        return max(1, min(sum(cpus) // self.workers, max(cpus)))

    def _event(self) -> Event:
        """The next thing said at the desk; ends trials whose time is up while it waits."""
        while True:
            self._pending = self._pending or self._desk.next.remote()
            left, begun = min(self._left_s.values(), default=math.inf), time.monotonic()
            timeout = None if left == math.inf else max(0.0, left)
            ready, _ = ray.wait([self._pending], timeout=timeout)
            waited = time.monotonic() - begun
            self._left_s = {number: s - waited for number, s in self._left_s.items()}
            if ready:
                event, self._pending = ray.get(self._pending), None
                return event
            self._end_late()

    def _end_late(self) -> None:
        late = [number for number, left in self._left_s.items() if left <= 0]
        error = f"TimeLimit: went on for {GRACE_S:g} s after its limit of {self._limit_s} s"
        for number in late:
            del self._left_s[number]
            self._desk.end.remote(number, error)

    def _ended(self, number: int, found: bytes | str) -> tuple[Trial, Outcome]:
        trial = self._out.pop(number)
        self._left_s.pop(number, None)
        if isinstance(found, bytes):
            return trial, cloudpickle.loads(found)
        if not self._proven:
            raise NoWorkers(f"RayTune: no worker could start ({found})")
        return trial, Outcome("failed", error=found)

    def _end(self, thread: threading.Thread) -> None:
        """Let Tune's loop come to an end: no more trials, and none that is out."""
        self._asker.offer(None)
        ray.get(self._desk.close.remote())
        thread.join(PATIENCE_S)


def _desk(name: str, kit: list[Any]) -> Any:
    actor: Any = ray.remote(num_cpus=0)(Desk)
    return actor.options(name=name).remote(kit)


def _fit(tuner: tune.Tuner, desk: Any) -> None:
    """Run Tune's loop; it is to end last, and if it does not, the driver must know."""
    try:
        tuner.fit()
        why = "Ray Tune has ended before the search"
    except Exception as error:  # to be raised where the search runs
        why = f"Ray Tune has failed ({type(error).__name__}: {error})"
    desk.say.remote("broken", why)


def _gpus(evaluate: Evaluate, workers: int) -> dict[str, float]:
    if not evaluate.device.startswith("cuda"):
        return {}
    gpus: float = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    if gpus < 1:
        raise ValueError(f"RayTune: trials train on {evaluate.device}, Ray has no GPU")
    return {"gpu": 1 / math.ceil(workers / gpus)}


@contextmanager
def quiet() -> Iterator[None]:
    """Let Ray print, log and send home nothing: what there is to say of a trial is in our log."""
    logger = logging.getLogger("ray")
    before, level = {name: os.environ.get(name) for name in ENVIRONMENT}, logger.level
    os.environ.update(ENVIRONMENT)
    logger.setLevel(QUIET["logging_level"])
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _check_address(address: str) -> None:
    """Raise ConnectionError where nothing listens: Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), GRACE_S).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"no Ray cluster at {address}: {error}") from None
