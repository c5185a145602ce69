"""The same search on Ray: the same trials and results, whatever happens to workers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from nas.executors import InProcess, cores
from nas.executors import ray_tune as home
from nas.executors.ray_tune import RayTune
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

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A cluster that executors find, and leave as it is."""
    with home.quiet():
        ray.init("local", num_cpus=4, num_gpus=0, include_dashboard=False, **home.QUIET)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def worker(cluster: None) -> Iterator[RayTune]:
    """One worker for all tests that leave it alive."""
    executor = RayTune(1, threads=1)
    executor.start(small_space(), evaluate(), helpers.SEED)
    yield executor
    executor.close()
    assert ray.is_initialized()


class TestRayTune(ExecutorSuite):
    @pytest.fixture
    def executor(self, worker: RayTune) -> RayTune:
        return worker


def test_two_workers_find_what_one_process_does(
    found_here: dict[int, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = os.listdir()
    run_search(tmp_path, RayTune(2, threads=1))
    assert told(tmp_path) == found_here
    assert capfd.readouterr() == ("", "") and os.listdir() == before


def test_a_dead_worker_fails_its_trial_alone(worker: RayTune) -> None:
    before = train_one(worker, Surroundings()).metrics["process"]
    outcome = train_one(worker, Fails("killed"), number=1)
    assert (outcome.status, outcome.state) == ("failed", None)
    assert str(outcome.error).startswith("worker died (")
    assert train_one(worker, Surroundings(), number=2).metrics["process"] != before


def test_workers_are_used_again_with_the_threads_that_they_were_given(worker: RayTune) -> None:
    found = [train_one(worker, Surroundings(), number=n).metrics for n in range(3)]
    assert len({f["process"] for f in found}) == 1 and found[0]["threads"] == 1


def test_a_late_trial_fails_and_one_that_cannot_be_told_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(home, "GRACE_S", 0.3)
    executor = RayTune(1, threads=1)
    executor.start(small_space(), evaluate(time_limit_s=0.3), helpers.SEED)
    late, deaf = train_one(executor, Fails("late")), train_one(executor, Fails("deaf"), number=1)
    executor.close()
    assert (late.status, late.error) == ("failed", "TimeLimit: passed its time limit of 0.3 s")
    assert deaf.status == "failed"
    assert deaf.error == "TimeLimit: went on for 0.3 s after its limit of 0.3 s"


@pytest.mark.skipif(len(cores.available()) < 2, reason="needs 2 cores")
def test_workers_beside_the_driver_leave_a_core_for_measuring() -> None:
    before = os.sched_getaffinity(0)
    executor = RayTune(2, threads=1)
    executor.start(small_space(), evaluate(costs=[Measuring()]), helpers.SEED)
    kept = os.sched_getaffinity(0)
    trained = train_one(executor, Surroundings()).metrics
    executor.close()
    assert kept == {max(before)} and os.sched_getaffinity(0) == before
    assert trained["cores"] == len(before) - 1 and trained["last_core"] not in kept


def test_workers_that_cannot_start_end_the_search() -> None:
    unwelcome: Any = helpers.Unwelcome()
    executor = RayTune(1, threads=1)
    executor.start(unwelcome, evaluate(), 0)
    with pytest.raises(RuntimeError, match=r"could not start \(ImportError: not on this machine"):
        train_one(executor, Counts())
    executor.close()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0 and None"):
        RayTune(0)
    with pytest.raises(ValueError, match="trials train on cuda, Ray has no GPU"):
        RayTune(1).start(small_space(), evaluate(device="cuda"), 0)


def test_ctrl_c_leaves_no_process_and_a_log_that_can_be_resumed(tmp_path: Path) -> None:
    made = "from nas.executors.ray_tune import RayTune; executor = RayTune(2)"
    with helpers.interrupted(tmp_path, made) as (driver, mark):
        _, errors = driver.communicate(timeout=60)
        assert (driver.returncode, errors) == (0, "")
        assert helpers.left_running(mark) == []
    assert 1 <= len(told(tmp_path)) < 8
    helpers.interruptible_search(tmp_path, InProcess(), resume=True)
    assert sorted(told(tmp_path)) == list(range(8))
