"""What every executor must do, one worker being enough to show it."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from nas.executors import Executor, InProcess
from nas.store import State
from nas.trial import Trial
from tests import executor_helpers as helpers
from tests.executor_helpers import Counts, Fails, evaluate, picks, small_space, train_one


class ExecutorSuite:
    """Tests of an executor; a class of tests for one gives `executor`, started, as a fixture."""

    def test_a_trial_goes_on_from_its_parents_state(self, executor: Executor) -> None:
        first = Trial(0, picks(), budget=2)
        executor.submit(first, None)
        _, begun = executor.next(helpers.go_on)
        assert isinstance(begun.state, State)
        executor.submit(replace(first, number=1, parent=0, budget=4), begun.state)
        _, ended = executor.next(helpers.go_on)
        steps = [int(o.state.tensors["training#step"]) for o in (begun, ended) if o.state]
        assert steps == [steps[0], 2 * steps[0]] and steps[0] > 0

    def test_states_come_back_whole(self, executor: Executor) -> None:
        here = InProcess()
        here.start(small_space(), evaluate(), helpers.SEED)
        states = []
        for one in (here, executor):
            one.submit(Trial(5, picks(), budget=1), None)
            state = one.next(helpers.go_on)[1].state
            assert state is not None
            states.append(state)
        assert states[0].meta == states[1].meta
        torch.testing.assert_close(states[0].tensors, states[1].tensors, rtol=0, atol=0)

    def test_reports_are_heard_in_order_and_answered(self, executor: Executor) -> None:
        heard: list[tuple[int, int, Mapping[str, float]]] = []

        def until_two(trial: Trial, step: int, metrics: Mapping[str, float]) -> bool:
            heard.append((trial.number, step, dict(metrics)))
            return step < 2

        outcome = train_one(executor, Counts(), until_two, number=4)
        assert heard == [(4, 1, {"rmse": 1.0}), (4, 2, {"rmse": 2.0})]
        assert (outcome.status, outcome.metrics) == ("stopped", {"rmse": 2.0})
        assert outcome.state is not None

    @pytest.mark.parametrize(
        ("how", "error"),
        [("raises", "ZeroDivisionError: no such luck"), ("nan", "ArithmeticError: rmse is nan")],
    )
    def test_a_failure_of_training_fails_the_trial_alone(
        self, executor: Executor, how: str, error: str
    ) -> None:
        outcome = train_one(executor, Fails(how))
        assert (outcome.status, outcome.error, outcome.state) == ("failed", error, None)
        assert outcome.metrics == {"rmse": 1.0}
        assert train_one(executor, Counts()).status == "ok"

    def test_a_mistake_of_the_driver_ends_the_search_and_not_the_trial(
        self, executor: Executor
    ) -> None:
        """Leaves the executor as good as new, since closing ends what hangs on the answer."""

        def mistaken(trial: Trial, step: int, metrics: Mapping[str, float]) -> bool:
            raise LookupError("the strategy's own")

        with pytest.raises(LookupError, match="the strategy's own"):
            train_one(executor, Counts(), mistaken)
        executor.close()
        executor.start(small_space(), evaluate(), helpers.SEED)
        assert train_one(executor, Counts()).status == "ok"
