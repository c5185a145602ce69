"""Trials give the same results wherever they train, and no trial can end a search."""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.costs import Latency
from nas.evaluate import Evaluate
from nas.executors import Executor, InProcess, cores
from nas.executors import processes as home
from nas.executors.processes import Processes
from nas.store import State
from nas.trial import Trial
from tests import executor_helpers as helpers
from tests.executor_helpers import (
    Counts,
    Fails,
    Measuring,
    Surroundings,
    evaluate,
    picks,
    run_search,
    small_space,
    told,
    train_one,
)

several_cores = pytest.mark.skipif(len(cores.available()) < 2, reason="needs 2 cores")


@pytest.fixture(scope="module")
def worker() -> Iterator[Processes]:
    """One worker for all tests that leave it alive."""
    executor = Processes(1)
    executor.start(small_space(), evaluate(), helpers.SEED)
    yield executor
    executor.close()


@pytest.fixture(params=["in process", "processes"])
def either(request: pytest.FixtureRequest, worker: Processes) -> Executor:
    if request.param == "processes":
        return worker
    executor = InProcess()
    executor.start(small_space(), evaluate(), helpers.SEED)
    return executor


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What a search in this process tells, on one thread."""
    folder = tmp_path_factory.mktemp("here")
    with cores.on(cores.available()[:1]):
        run_search(folder, InProcess())
    return told(folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_finds_the_same_wherever_its_trials_train(
    workers: int, here: dict[int, dict[str, Any]], tmp_path: Path
) -> None:
    run_search(tmp_path, Processes(workers, threads=1))
    there = told(tmp_path)
    assert there == here
    assert workers > 1 or list(there) == list(here)


def test_a_trial_goes_on_from_its_parents_state(either: Executor) -> None:
    first = Trial(0, picks(), budget=2)
    either.submit(first, None)
    _, begun = either.next(helpers.go_on)
    assert isinstance(begun.state, State)
    either.submit(replace(first, number=1, parent=0, budget=4), begun.state)
    _, ended = either.next(helpers.go_on)
    assert ended.state is not None
    steps = [int(o.state.tensors["training#step"]) for o in (begun, ended) if o.state]
    assert steps[1] == 2 * steps[0] > 0


def test_states_come_back_whole(worker: Processes) -> None:
    here = InProcess()
    here.start(small_space(), evaluate(), helpers.SEED)
    states = []
    for executor in (here, worker):
        executor.submit(Trial(5, picks(), budget=1), None)
        state = executor.next(helpers.go_on)[1].state
        assert state is not None
        states.append(state)
    assert states[0].meta == states[1].meta
    torch.testing.assert_close(states[0].tensors, states[1].tensors, rtol=0, atol=0)


def test_reports_are_heard_in_order_and_answered(either: Executor) -> None:
    heard: list[tuple[int, int, Mapping[str, float]]] = []

    def until_two(trial: Trial, step: int, metrics: Mapping[str, float]) -> bool:
        heard.append((trial.number, step, dict(metrics)))
        return step < 2

    outcome = train_one(either, Counts(), until_two, number=4)
    assert heard == [(4, 1, {"rmse": 1.0}), (4, 2, {"rmse": 2.0})]
    assert (outcome.status, outcome.metrics) == ("stopped", {"rmse": 2.0})
    assert outcome.state is not None


@pytest.mark.parametrize(
    ("how", "error"),
    [("raises", "ZeroDivisionError: no such luck"), ("nan", "ArithmeticError: rmse is nan")],
)
def test_a_failure_of_training_fails_the_trial_alone(
    either: Executor, how: str, error: str
) -> None:
    outcome = train_one(either, Fails(how))
    assert (outcome.status, outcome.error, outcome.state) == ("failed", error, None)
    assert train_one(either, Counts()).status == "ok"


def test_a_mistake_of_the_driver_ends_the_search(either: Executor) -> None:
    def mistaken(trial: Trial, step: int, metrics: Mapping[str, float]) -> bool:
        raise LookupError("the strategy's own")

    executor = either if isinstance(either, InProcess) else Processes(1)
    executor.start(small_space(), evaluate(), helpers.SEED)
    with pytest.raises(LookupError, match="the strategy's own"):
        train_one(executor, Counts(), mistaken)
    executor.close()


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
    driver = helpers.interrupt(tmp_path, made)
    _, errors = driver.communicate(timeout=60)
    assert (driver.returncode, errors) == (0, "")
    assert helpers.left_running(driver.pid) == []
    assert 1 <= len(told(tmp_path)) < 8
    run = helpers.interruptible_search(tmp_path, InProcess(), resume=True)
    assert not run.interrupted
    assert sorted(told(tmp_path)) == list(range(8))
