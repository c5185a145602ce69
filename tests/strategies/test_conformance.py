import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from nas.trial import Objective, Problem, Result, Strategy, Trial
from search_spaces.cell import cell
from search_spaces.mlp import mlp
from strategies.darts import Darts
from strategies.evolution import Evolution
from strategies.optuna_search import OptunaSearch
from strategies.random_search import RandomSearch
from tests.strategies.conformance import described, drive, result_of
from tests.strategies.demonstrations import EdgeWeights, Halving, ThreePhases

Make = Callable[[int], Strategy]
STRATEGIES: dict[str, Make] = {
    "random": lambda seed: RandomSearch(seed),
    "evolution": lambda seed: Evolution(seed, population=4, sample=2),
    "darts": lambda seed: Darts(seed),
    "optuna-tpe": lambda seed: OptunaSearch(seed, "tpe"),
    "optuna-nsga2": lambda seed: OptunaSearch(seed, "nsga2"),
    "edges": lambda seed: EdgeWeights(seed),
    "phases": lambda seed: ThreePhases(seed),
    "halving": lambda seed: Halving(seed),
}
OBJECTIVES = (Objective("error"), Objective("nonzeros"))


def problem(trials: int = 12, **limits: float) -> Problem:
    space = cell((3, 16, 16), 10, cells=3, channels=4)
    return Problem(space, OBJECTIVES, limits, trials, budget=9)


@pytest.fixture(params=STRATEGIES)
def make(request: pytest.FixtureRequest) -> Make:
    return STRATEGIES[request.param]


def test_the_same_seed_asks_for_the_same_trials(make: Make) -> None:
    first, again = (described(drive(make(3), problem())) for _ in range(2))
    assert first == again


def test_another_seed_asks_for_others(make: Make) -> None:
    assert described(drive(make(3), problem())) != described(drive(make(4), problem()))


@pytest.mark.parametrize("in_flight", [1, 3])
def test_replaying_the_log_leads_to_the_same_next_trials(make: Make, in_flight: int) -> None:
    whole: list[tuple[str, Trial, Result | None]] = []
    strategy = _listening(make(5), whole)
    drive(strategy, problem(), in_flight)
    again = make(5)
    again.start(problem())
    for kind, trial, result in whole:
        if kind == "ask":
            asked = again.ask()
            assert asked is not None and asked.to_json() == trial.to_json()
        elif result is not None:
            again.tell(trial, result)
    assert [kind for kind, _, _ in whole].count("ask") >= 2


def _listening(strategy: Strategy, into: list[tuple[str, Trial, Result | None]]) -> Strategy:
    ask, tell = strategy.ask, strategy.tell

    def heard_ask() -> Trial | None:
        trial = ask()
        if trial is not None:
            into.append(("ask", trial, None))
        return trial

    def heard_tell(trial: Trial, result: Result) -> None:
        into.append(("tell", trial, result))
        tell(trial, result)

    strategy.ask, strategy.tell = heard_ask, heard_tell  # type: ignore[method-assign]
    strategy.report = lambda *_: True  # type: ignore[method-assign]
    return strategy


def test_numbers_count_and_picks_are_canonical_json(make: Make) -> None:
    asked = drive(make(0), problem(), in_flight=3)
    choices = problem().space.choices
    assert sorted(t.number for t, _ in asked) == list(range(len(asked)))
    for trial, _ in asked:
        assert list(choices.partial(trial.picks)) == list(trial.picks)
        assert json.loads(json.dumps(trial.to_json())) == trial.to_json()


def test_results_out_of_order_and_failures_are_survived(make: Make) -> None:
    def judge(asked: Problem, trial: Trial) -> Result:
        failed = Result("failed", error="RuntimeError: out of luck")
        return failed if trial.number % 3 == 1 else result_of(asked, trial)

    asked = drive(make(1), problem(), in_flight=3, judge=judge)
    assert {r.status for _, r in asked} >= {"ok"}


def test_it_ends_when_every_trial_fails(make: Make) -> None:
    asked = drive(make(1), problem(), judge=lambda *_: Result("failed", error="always"))
    assert len(asked) <= 40


def test_refused_trials_do_not_stop_it(make: Make) -> None:
    asked = drive(make(2), problem(6, nonzeros=6000.0))
    assert all(
        r.metrics["nonzeros"] <= 6000
        for _, r in asked
        if r.status == "ok" and "nonzeros" in r.metrics
    )


@pytest.mark.parametrize("name", ["random", "evolution", "optuna-tpe"])
def test_a_small_space_is_searched_without_repeating(name: str) -> None:
    space = mlp((4,), 2, depths=(1,), widths=(4, 8), sparsities=("dense", "0.5"))
    small = replace(problem(), space=space, trials=4)
    asked = drive(STRATEGIES[name](0), small)
    found = {json.dumps(t.picks) for t, _ in asked}
    assert len(found) == len(asked) == 4 or name == "optuna-tpe"


def test_random_search_ends_when_the_space_is_used_up() -> None:
    space = mlp((4,), 2, depths=(1,), widths=(4, 8), sparsities=("dense", "0.5"))
    asked = drive(RandomSearch(0), replace(problem(), space=space, trials=100))
    assert len(asked) == space.size() == 4


@pytest.mark.parametrize("objectives", [OBJECTIVES, OBJECTIVES[:1]])
def test_the_gaussian_process_searches_a_space_without_conditions(
    objectives: tuple[Objective, ...],
) -> None:
    space = mlp((4,), 2, depths=(1,), widths=(4, 8, 16), sparsities=("dense", "0.5", "0.8"))
    plain = replace(problem(), space=space, trials=12, objectives=objectives)
    first, again = (described(drive(OptunaSearch(0, "gp"), plain)) for _ in range(2))
    assert len(first) == 12 and first == again
