import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nas.choices import Picks
from nas.evaluate import Evaluate, Outcome
from nas.trial import Trial
from nas.worker import run_trial, trial_seed
from tests.search_for_tests import small_evaluate, small_space

PICKS: Picks = {"depth": 1, "layer0/width": 8, "layer0/sparsity": "dense"}
SPACE = small_space()


def run(
    train: Callable[[nn.Module, int], Any],
    report: Callable[..., bool] = lambda step, metrics: True,
    validate: Callable[[nn.Module], Any] = lambda module: 0.5,
    **fields: Any,
) -> Outcome:
    evaluate = Evaluate(train=train, validate=validate, **fields)
    return run_trial(evaluate, SPACE, Trial(0, PICKS, 1), 0, report)


def nothing(module: nn.Module, epochs: int) -> None:
    pass


def raising(error: BaseException) -> Callable[[nn.Module, int], None]:
    def train(module: nn.Module, epochs: int) -> None:
        raise error

    return train


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RuntimeError("shapes do\nnot fit"), "RuntimeError: shapes do not fit"),
        (MemoryError("too big"), "out of memory: too big"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: CUDA out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
            "out of memory: DefaultCPUAllocator: can't allocate memory: 9 bytes",
        ),
        (StopIteration(), "StopIteration: "),
        (AssertionError("x" * 900), "AssertionError: " + "x" * 484),
    ],
)
def test_whatever_a_trial_raises_makes_it_fail_with_one_line(
    error: BaseException, line: str
) -> None:
    outcome = run(raising(error))
    assert (outcome.status, outcome.error) == ("failed", line)
    assert outcome.state is None


def test_a_space_that_cannot_be_built_makes_a_trial_fail() -> None:
    evaluate = Evaluate(train=nothing, validate=lambda module: 0.5)
    outcome = run_trial(evaluate, SPACE, Trial(0, {"depth": 7}, 1), 0, lambda s, m: True)
    assert (outcome.status, outcome.error) == ("failed", "ValueError: depth: 7 is none of [1, 2]")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_metric_that_is_not_finite_makes_a_trial_fail_and_is_kept(value: float) -> None:
    outcome = run(nothing, validate=lambda module: value)
    assert outcome.status == "failed"
    assert outcome.error == f"ArithmeticError: error is {value}"
    assert outcome.metrics["error"] == pytest.approx(value, nan_ok=True)


def test_weights_that_become_nan_make_a_trial_fail() -> None:
    evaluate = small_evaluate()

    def poisoned(step: int, metrics: Any) -> bool:
        return True

    with torch.no_grad():
        evaluate.task.train.inputs[0] = math.nan  # type: ignore[union-attr]
    outcome = run_trial(evaluate, SPACE, Trial(0, PICKS, 2), 0, poisoned)
    assert outcome.status == "failed" and outcome.state is None


def test_ctrl_c_is_no_failure_of_a_trial() -> None:
    with pytest.raises(KeyboardInterrupt):
        run(raising(KeyboardInterrupt()))


def spin(module: nn.Module, epochs: int) -> None:
    while True:
        sum(range(100))


def sleep(module: nn.Module, epochs: int) -> None:
    time.sleep(60)


def swallow(module: nn.Module, epochs: int) -> None:
    while True:
        try:
            spin(module, epochs)
        except Exception:
            if swallowed:
                raise
            swallowed.append(1)


swallowed: list[int] = []


@pytest.mark.parametrize("train", [spin, sleep, swallow])
def test_a_trial_that_never_reports_is_given_up_after_its_time(train: Any) -> None:
    swallowed.clear()
    outcome = run(train, time_limit_s=0.2)
    assert outcome.status == "failed"
    assert outcome.error == "TimeLimit: passed its time limit of 0.2 s"
    assert 0.2 <= outcome.seconds < 30


def test_the_alarm_is_put_back_as_it_was() -> None:
    before = signal.getsignal(signal.SIGALRM)
    for train in (nothing, sleep):
        run(train, time_limit_s=0.1)
        assert signal.getsignal(signal.SIGALRM) is before
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_trial_in_another_thread_is_given_up_when_it_reports() -> None:
    outcomes: list[Outcome] = []
    evaluate = small_evaluate(time_limit_s=1e-9)

    def body() -> None:
        outcomes.append(run_trial(evaluate, SPACE, Trial(0, PICKS, 2), 0, lambda s, m: True))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert outcomes[0].error == "TimeLimit: passed its time limit of 1e-09 s"


def test_a_trial_within_its_time_is_unharmed() -> None:
    assert run(nothing, time_limit_s=60).status == "ok"


def test_a_trial_that_is_told_to_stop_has_stopped_and_keeps_its_state() -> None:
    steps: list[int] = []

    def report(step: int, metrics: Any) -> bool:
        steps.append(step)
        return step < 2

    outcome = run_trial(small_evaluate(), SPACE, Trial(0, PICKS, 5), 0, report)
    assert (outcome.status, steps) == ("stopped", [1, 2])
    assert outcome.state is not None


def test_a_trial_that_fails_after_it_was_told_to_stop_has_failed() -> None:
    outcome = run(nothing, report=lambda s, m: False, validate=lambda module: math.nan)
    assert outcome.status == "failed"


def test_a_failed_trial_keeps_the_last_metrics_that_it_reported() -> None:
    def report(step: int, metrics: Any) -> bool:
        if step == 2:
            raise RuntimeError("the disk is full")
        return True

    outcome = run_trial(small_evaluate(), SPACE, Trial(0, PICKS, 5), 0, report)
    assert outcome.status == "failed" and outcome.metrics.keys() >= {"rmse"}
    assert outcome.error == "RuntimeError: the disk is full"


def test_seeds_differ_by_run_and_by_trial_and_are_always_the_same() -> None:
    seeds = {trial_seed(seed, number) for seed in range(20) for number in range(20)}
    assert len(seeds) == 400 and all(0 <= s < 2**31 for s in seeds)
    assert trial_seed(0, 0) == trial_seed(0, 0)
    assert trial_seed(1, 11) != trial_seed(11, 1)
