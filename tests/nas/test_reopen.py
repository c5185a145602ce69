from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nas.costs import Cost, Flops, Latency, NonZeros, Parameters
from nas.evaluate import Evaluate
from nas.loop import search
from nas.module_space import sparsify
from nas.recipes import OneShot
from nas.reopen import open_run
from nas.run import Run
from nas.tasks import digits
from nas.training import Training
from nas.trial import Objective
from search_spaces.mlp import mlp
from strategies.random_search import RandomSearch


def small_search(folder: Path) -> Run:
    space = mlp((1, 8, 8), 10, depths=(1, 2), widths=(16, 32), sparsities=("dense", "0.8"))
    training = Training(batch_size=128, lr=1e-2, recipe=OneShot())
    costs: list[Cost] = [Parameters(), NonZeros(), Flops(), Latency(batch=2)]
    evaluate = Evaluate(digits(), costs=costs, training=training)
    objectives = ("error", Objective("nonzeros"))
    return search(
        space,
        RandomSearch(seed=3),
        evaluate,
        out=folder,
        objectives=objectives,
        limits={"nonzeros": 3000},
        trials=3,
        epochs=1,
    )


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_search(tmp_path_factory.mktemp("reopen") / "run")


def edit(run: Run, folder: Path, change: Callable[[dict[str, object]], object]) -> Path:
    """A run's description and log in another folder, its description changed."""
    described = json.loads((run.folder / "run.json").read_text())
    change(described)
    (folder / "run.json").write_text(json.dumps(described))
    (folder / "trials.jsonl").write_bytes((run.folder / "trials.jsonl").read_bytes())
    return folder


def test_an_opened_run_holds_what_the_search_left(searched: Run) -> None:
    run = open_run(searched.folder)
    assert run.problem.space.fingerprint == searched.problem.space.fingerprint
    assert dataclasses.replace(run.problem, space=searched.problem.space) == searched.problem
    assert run.evaluate.training == searched.evaluate.training
    assert run.evaluate.costs == searched.evaluate.costs
    assert {n: r.trial for n, r in run.records.items()} == {
        n: r.trial for n, r in searched.records.items()
    }
    assert [r.result for r in run.records.values()] == [
        r.result for r in searched.records.values()
    ]


def test_an_opened_run_has_the_same_front_and_networks(searched: Run) -> None:
    ours, theirs = open_run(searched.folder).front(), searched.front()
    assert [p.number for p in ours] == [p.number for p in theirs]
    assert [p.record.test for p in ours] == [p.record.test for p in theirs]
    assert all(p.record.test for p in ours)
    x = torch.randn(3, 1, 8, 8)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.module()(x), b.module()(x))


def test_opening_a_run_changes_nothing_and_leaves_it_free(searched: Run) -> None:
    before = {p: p.read_bytes() for p in searched.folder.rglob("*") if p.is_file()}
    first, second = open_run(searched.folder), open_run(searched.folder)
    assert list(first.records) == list(second.records)
    assert {p: p.read_bytes() for p in searched.folder.rglob("*") if p.is_file()} == before


def test_the_data_are_split_as_the_searching_script_split_them(
    searched: Run, tmp_path: Path
) -> None:
    seed = {"arguments": {"seed": 5, "data": None}}
    task = open_run(edit(searched, tmp_path, lambda d: d.update(seed))).evaluate.task
    assert task is not None
    assert torch.equal(task.test.targets, digits(5).test.targets)
    assert not torch.equal(task.test.targets, digits(0).test.targets)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        open_run(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "format 0"),
        ({"task": "mine"}, "task 'mine'"),
        ({"task": None}, "task None"),
        ({"costs": [{"name": "price"}]}, "cost 'price' is your own"),
        ({"space": {"fingerprint": "x", "origin": None}}, "model of your own"),
    ],
)
def test_what_cannot_be_made_again_is_named(
    searched: Run, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        open_run(edit(searched, tmp_path, lambda d: d.update(change)))


def test_another_space_is_refused(searched: Run) -> None:
    with pytest.raises(ValueError, match="the run's space is"):
        open_run(searched.folder, space=mlp((1, 8, 8), 10))


def test_what_is_given_is_taken(searched: Run, tmp_path: Path) -> None:
    evaluate = Evaluate(digits())
    folder = edit(searched, tmp_path, lambda d: d.update(task="mine"))
    assert open_run(folder, evaluate).evaluate is evaluate


def test_a_training_of_the_strategys_own_is_known_by_name_and_not_run(
    searched: Run, tmp_path: Path
) -> None:
    log = edit(searched, tmp_path, lambda d: None) / "trials.jsonl"
    log.write_text(log.read_text().replace('"fit":null', '"fit":{"name":"Bilevel","lr":0.1}'))
    fit = open_run(tmp_path).records[0].trial.fit
    assert getattr(fit, "name", None) == "Bilevel"
    with pytest.raises(ValueError, match="Bilevel"):
        fit.fit(nn.Identity(), digits(), 1, lambda step, metrics: True)  # type: ignore[union-attr]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 20), nn.Linear(20, 10)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsities": ("dense", "2:4", "0.5", "5:10"), "skip": ("4.weight",)},
        {"sparsities": ("dense", "0.5", "0.9"), "per": "model"},
    ],
)
def test_a_space_of_ones_own_module_is_made_again_from_the_module(
    tmp_path: Path, options: dict[str, object]
) -> None:
    task = digits()
    space = sparsify(make_model, task.example_input(), **options)  # type: ignore[arg-type]
    search(space, RandomSearch(), Evaluate(task), out=tmp_path, trials=1, epochs=1)
    again = open_run(tmp_path, model=make_model).problem.space
    assert again.fingerprint == space.fingerprint
    assert again.choices.describe() == space.choices.describe()
