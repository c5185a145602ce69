"""Trials give the same results wherever they train, and no trial can end a search."""

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nas.costs import Latency
from nas.evaluate import Evaluate
from nas.executors import InProcess, cores
from nas.executors import processes as home
from nas.executors.processes import Processes
from nas.trial import Trial
from tests import executor_helpers as helpers
from tests.executor_helpers import (
    Counts,
    Fails,
    Measuring,
    Surroundings,
    evaluate,
    run_search,
    small_space,
    told,
    train_one,
)
from tests.executor_suite import ExecutorSuite

several_cores = pytest.mark.skipif(len(cores.available()) < 2, reason="needs 2 cores")


@pytest.fixture(scope="module")
def worker() -> Iterator[Processes]:
    """One worker for all tests that leave it alive."""
    executor = Processes(1)
    executor.start(small_space(), evaluate(), helpers.SEED)
    yield executor
    executor.close()


class TestInProcess(ExecutorSuite):
    @pytest.fixture
    def executor(self) -> InProcess:
        executor = InProcess()
        executor.start(small_space(), evaluate(), helpers.SEED)
        return executor


class TestProcesses(ExecutorSuite):
    @pytest.fixture
    def executor(self, worker: Processes) -> Processes:
        return worker


@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_finds_the_same_wherever_its_trials_train(
    workers: int, found_here: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    run_search(tmp_path, Processes(workers, threads=1))
    there = told(tmp_path)
    assert there == found_here
    assert workers > 1 or list(there) == list(found_here)


@pytest.mark.parametrize(
    ("how", "error"),
    [("killed", "worker died (signal 9)"), ("exits", "worker died (exit code 7)")],
)
def test_a_dead_worker_fails_its_trial_and_is_replaced(
    worker: Processes, how: str, error: str
) -> None:
    before = train_one(worker, Surroundings()).metrics["process"]
    outcome = train_one(worker, Fails(how), number=1)
    assert (outcome.status, outcome.error, outcome.state) == ("failed", error, None)
    assert train_one(worker, Surroundings(), number=2).metrics["process"] != before


def test_a_worker_that_died_while_it_had_nothing_to_do_costs_no_trial(worker: Processes) -> None:
    process = int(train_one(worker, Surroundings()).metrics["process"])
    os.kill(process, 9)
    outcome = train_one(worker, Surroundings())
    assert outcome.status == "ok" or outcome.error == "worker died (signal 9)"
    assert train_one(worker, Surroundings()).metrics["process"] != process


def test_a_late_trial_fails_and_one_that_cannot_be_told_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(home, "GRACE_S", 0.3)
    executor = Processes(1)
    executor.start(small_space(), evaluate(time_limit_s=0.3), helpers.SEED)
    late, deaf = train_one(executor, Fails("late")), train_one(executor, Fails("deaf"))
    executor.close()
    assert (late.status, late.error) == ("failed", "TimeLimit: passed its time limit of 0.3 s")
    assert deaf.status == "failed"
    assert deaf.error == "TimeLimit: went on for 0.3 s after its limit of 0.3 s"


def test_the_time_of_the_driver_is_not_the_trials(worker: Processes) -> None:
    """A slow answer (measuring, say) must not use up a trial's time."""
    executor = InProcess()
    executor.start(small_space(), evaluate(time_limit_s=0.5), helpers.SEED)

    def slow(trial: Trial, step: int, metrics: Mapping[str, float]) -> bool:
        train_one(worker, Counts())
        return busy_for(0.2)

    outcome = train_one(executor, Counts(), slow)
    assert (outcome.status, outcome.metrics) == ("ok", {"rmse": 4.0})


def busy_for(seconds: float) -> bool:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
    return True


def test_workers_share_the_threads_out(worker: Processes) -> None:
    whole = len(cores.available())
    assert train_one(worker, Surroundings()).metrics["threads"] == whole
    assert cores.share_out(2, evaluate()).threads(2) == max(1, whole // 2)
    assert cores.Cores((0, 1, 2)).threads(workers=8) == 1


@several_cores
def test_a_core_is_kept_for_measuring_where_several_train() -> None:
    before = os.sched_getaffinity(0)
    executor = Processes(2)
    executor.start(small_space(), evaluate(costs=[Measuring()]), helpers.SEED)
    kept = os.sched_getaffinity(0)
    trained = train_one(executor, Surroundings()).metrics
    executor.close()
    assert kept == {max(before)} and os.sched_getaffinity(0) == before
    assert trained["cores"] == len(before) - 1 and trained["last_core"] not in kept


def test_measuring_happens_in_the_driver(tmp_path: Path) -> None:
    measured = helpers.untrained(costs=[Measuring()])
    run = helpers.search_untrained(tmp_path, Processes(1), measured, trials=2)
    found = [r.result.details["measuring"]["process"] for r in run.records.values()]
    assert found == [os.getpid()] * 2


def test_one_worker_measures_on_all_cores_since_nothing_trains_then() -> None:
    shared = cores.share_out(1, evaluate(costs=[Measuring()]))
    assert shared == cores.Cores(cores.available())


def test_measuring_beside_training_is_refused_where_it_would_disturb() -> None:
    with cores.on(cores.available()[:1]):
        with pytest.raises(ValueError, match=r"more than 1 cores.*this process may use 1"):
            Processes(2).start(small_space(), evaluate(costs=[Measuring()]), 0)
    on_gpu = evaluate(device="cuda", costs=[Latency(device="cuda")])
    with pytest.raises(ValueError, match="latency_ms: is measured on cuda"):
        Processes(2).start(small_space(), on_gpu, 0)


def test_what_cannot_travel_is_refused_by_name() -> None:
    local: Any = Evaluate(train=lambda *_: None, validate=helpers.mean_weight)
    with pytest.raises(ValueError, match=r"evaluate cannot travel.*lambda.*can be imported"):
        Processes(1).start(small_space(), local, 0)


def test_a_worker_that_cannot_start_ends_the_search() -> None:
    unwelcome: Any = helpers.Unwelcome()
    with pytest.raises(RuntimeError, match=r"could not start .*ImportError: not on this machine"):
        Processes(1).start(unwelcome, evaluate(), 0)


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0 and None"):
        Processes(0)


def test_ctrl_c_leaves_no_process_and_a_log_that_can_be_resumed(tmp_path: Path) -> None:
    made = "from nas.executors.processes import Processes; executor = Processes(2)"
    with helpers.interrupted(tmp_path, made) as (driver, mark):
        _, errors = driver.communicate(timeout=60)
        assert (driver.returncode, errors) == (0, "")
        assert helpers.left_running(mark) == []
    assert 1 <= len(told(tmp_path)) < 8
    run = helpers.interruptible_search(tmp_path, InProcess(), resume=True)
    assert not run.interrupted
    assert sorted(told(tmp_path)) == list(range(8))


def test_workers_end_with_a_driver_that_is_killed(tmp_path: Path) -> None:
    made = "from nas.executors.processes import Processes; executor = Processes(1)"
    with helpers.interrupted(tmp_path, made, by=signal.SIGKILL) as (driver, mark):
        assert driver.wait(timeout=60) == -signal.SIGKILL
        assert helpers.left_running(mark) == []
