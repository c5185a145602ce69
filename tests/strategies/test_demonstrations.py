import inspect
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nas import Evaluate, NonZeros, Parameters, search
from nas.choices import Subset
from nas.executors import Executor, InProcess
from nas.executors.processes import Processes
from nas.run import Run
from nas.store import State
from nas.tasks import Task, digits
from nas.trial import Strategy
from search_spaces.cell import cell
from search_spaces.mlp import mlp
from tests.strategies import demonstrations
from tests.strategies.demonstrations import EdgeWeights, Halving, ThreePhases


@pytest.fixture(scope="module")
def task() -> Task:
    return digits()


def _run(
    folder: Path, task: Task, strategy: Strategy, executor: Executor | None = None, **options: int
) -> Run:
    space = mlp((1, 8, 8), 10, depths=(1, 2), widths=(32, 64), sparsities=("dense", "0.5", "0.9"))
    evaluate = Evaluate(task, costs=[Parameters(), NonZeros()])
    return search(
        space,
        strategy,
        evaluate,
        out=folder,
        objectives=["error", "nonzeros"],
        executor=executor or InProcess(),
        **options,  # type: ignore[arg-type]
    )


def test_each_demonstration_has_at_most_sixty_lines() -> None:
    parts = inspect.getsource(demonstrations).split("\n# ")[1:]
    assert len(parts) == 3
    assert max(len(part.strip().splitlines()) for part in parts) <= 60


def test_subsets_have_weights_of_their_own_that_choose_the_edges(
    tmp_path: Path, task: Task
) -> None:
    space = cell((1, 8, 8), 10, cells=1, channels=4, nodes=2, sparsities=("dense", "0.5"))
    strategy = EdgeWeights(seed=0)
    few = replace(task, train=task.train.subset(torch.arange(128)))
    evaluate = Evaluate(few, costs=[NonZeros()])
    run = search(space, strategy, evaluate, out=tmp_path / "run", trials=1, epochs=1)
    mixture = run.records[0].result.mixture
    subset = next(c for c in space.choices if isinstance(c, Subset) and len(c.items) == 3)
    strongest = sorted(subset.items, key=lambda x: -mixture[subset.name][subset.items.index(x)])
    assert sum(mixture[subset.name]) == pytest.approx(1, abs=1e-5)
    assert len(set(mixture[subset.name])) == 3
    assert run.records[1].trial.picks[subset.name] == sorted(strongest[:2])
    assert run.records[1].result.status == "ok"


def test_three_fits_go_on_from_one_set_of_weights(tmp_path: Path, task: Task) -> None:
    run = _run(tmp_path / "run", task, ThreePhases(seed=0), trials=1, epochs=4)
    assert [r.result.status for r in run.records.values()] == ["ok"] * 4
    dense, scored, tuned = (State.load(run.store.checkpoint(n)).tensors for n in range(3))
    key = "layer0.linear.weight"
    assert (dense[key] == scored[key]).all() and f"{key}#scores" in scored
    assert (scored[f"{key}#masks"] == tuned[f"{key}#masks"]).all()
    assert (scored[key] != tuned[key]).any()
    errors = [r.result.metrics["error"] for r in run.records.values()]
    assert errors[2] < 0.5 and errors[3] < 0.5


def test_halving_promotes_the_best_asynchronously(tmp_path: Path, task: Task) -> None:
    run = _run(tmp_path / "run", task, Halving(seed=0), Processes(2), trials=14, epochs=9)
    budgets = [r.trial.budget for r in run.records.values()]
    assert set(budgets) >= {1, 3}
    for record in run.records.values():
        if record.trial.parent is not None:
            parent = run.records[record.trial.parent]
            assert parent.trial.picks == record.trial.picks
            assert record.trial.budget == 3 * parent.trial.budget
    promoted = [r.trial.parent for r in run.records.values() if r.trial.parent is not None]
    first = {n: r.result.metrics["error"] for n, r in run.records.items() if r.trial.budget == 1}
    assert min(first[n] for n in promoted if n in first) <= sorted(first.values())[1]
    events = run.store.events()
    steps = [e["step"] for e in events if e["event"] == "report" and e["trial"] in _continued(run)]
    assert steps and min(steps) > 1  # a promotion goes on; it does not start again


def _continued(run: Run) -> set[int]:
    return {n for n, r in run.records.items() if r.trial.parent is not None}
