import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nas
from nas.choices import Picks
from nas.graph import INPUT, Graph
from nas.masks import sparse_weights
from nas.operations import SparseLinear
from nas.run import Run, make_space
from nas.space import GraphSpace
from nas.training import Training
from nas.trial import Objective
from tests.search_for_tests import A, B, C, Listed, small_evaluate, small_search, small_task

WIDE: Picks = {"depth": 2, **{f"layer{i}/width": 16 for i in range(2)}}
D: Picks = {**WIDE, "layer0/sparsity": "dense", "layer1/sparsity": "0.5"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    how = small_evaluate(training=Training(batch_size=16, lr=0.02))
    given = Listed(given=[A, B, C, D, A])
    return small_search(folder, strategy=given, evaluate=how, trials=5, epochs=12)


def test_the_front_is_what_no_usable_network_beats_best_first(run: Run) -> None:
    losses = {n: run.problem.losses(r.result) for n, r in run.records.items()}
    beaten = {
        n
        for n, loss in losses.items()
        if any(o != loss and o[0] <= loss[0] and o[1] <= loss[1] for o in losses.values())
    }
    expected = sorted(set(losses) - beaten - {4}, key=lambda n: losses[n])
    assert [p.number for p in run.front()] == expected
    assert len(expected) >= 2


def test_the_best_is_the_best_of_the_front_within_limits(run: Run) -> None:
    assert run.best().number == run.front()[0].number
    assert run.best("parameters").number == run.front()[-1].number
    least = run.best("parameters").metrics["parameters"]
    assert run.best(parameters=least).number == run.front()[-1].number
    with pytest.raises(LookupError, match=r"no network of the front has .*parameters"):
        run.best(parameters=3)
    with pytest.raises(ValueError, match="'flops' is not an objective of this run"):
        run.best("flops")


def test_a_point_is_its_trained_network_masked(run: Run) -> None:
    for point in run.front():
        net = point.module()
        assert not net.training
        found = small_task().evaluate(net)
        assert found["rmse"] == pytest.approx(point.metrics["rmse"], rel=1e-5)
        tested = small_task().evaluate(net, "test")
        assert point.record.test == pytest.approx(tested, rel=1e-5)


def test_pareto_json_holds_the_front_with_all_that_makes_it_again(run: Run) -> None:
    held = json.loads((run.folder / "pareto.json").read_text())
    assert held["objectives"] == [
        {"name": "rmse", "direction": "minimize"},
        {"name": "parameters", "direction": "minimize"},
    ]
    assert [p["trial"] for p in held["points"]] == [p.number for p in run.front()]
    first, point = held["points"][0], run.front()[0]
    assert first["picks"] == point.picks and first["metrics"] == point.metrics
    assert first["test"].keys() == {"rmse", "r2", "loss"} and first["budget"] == 12
    assert first["architecture"] == run.problem.space.architecture(point.picks).id
    assert make_space(first["space"]["origin"]).fingerprint == first["space"]["fingerprint"]


def test_the_best_network_is_loaded_as_a_plain_module_that_computes_the_same(run: Run) -> None:
    net, x = nas.load(run.folder / "best"), torch.randn(4, 6)
    assert not sparse_weights(net) and not net.training
    with torch.no_grad():
        torch.testing.assert_close(net(x), run.best().module()(x))
    zeros = [(p == 0).float().mean().item() for p in net.parameters() if p.ndim == 2]
    assert any(share == 0.5 for share in zeros) == ("0.5" in run.best().picks.values())


def changed(folder: Path, to: Path, **fields: Any) -> Path:
    described = json.loads((folder / "best" / "architecture.json").read_text())
    described["space"].update(fields)
    to.mkdir()
    (to / "architecture.json").write_text(json.dumps(described))
    weights = (folder / "best" / "weights.safetensors").read_bytes()
    (to / "weights.safetensors").write_bytes(weights)
    return to


def test_a_network_of_another_space_is_refused(run: Run, tmp_path: Path) -> None:
    folder = changed(run.folder, tmp_path / "a", fingerprint="0" * 16)
    with pytest.raises(ValueError, match=f"its space is {'0' * 16}, search_spaces makes"):
        nas.load(folder)


@pytest.mark.parametrize("function", ["os:system", "search_spaces_of_mine:mlp", "nas.run:load"])
def test_a_file_calls_no_function_but_those_of_search_spaces(
    run: Run, tmp_path: Path, function: str
) -> None:
    origin = {"function": function, "arguments": {}}
    folder = changed(run.folder, tmp_path / "a", origin=origin)
    with pytest.raises(ValueError, match=f"made by search_spaces only, got '{function}'"):
        nas.load(folder)


def test_a_network_of_your_own_needs_the_model(run: Run, tmp_path: Path) -> None:
    folder = changed(run.folder, tmp_path / "a", origin=None)
    with pytest.raises(ValueError, match=r"nas.load\(..., model=...\)"):
        nas.load(folder)
    model = run.problem.space.build(run.best().picks, masked=False)
    x = torch.randn(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(nas.load(folder, model=model)(x), run.best().module()(x))


def test_a_space_of_your_own_is_searched_and_says_so_when_it_is_loaded(tmp_path: Path) -> None:
    graph = Graph((6,))
    graph.add("out", SparseLinear(2), INPUT)
    small_search(tmp_path, space=GraphSpace(graph), strategy=Listed(given=[{}]))
    with pytest.raises(ValueError, match="of a model of your own"):
        nas.load(tmp_path / "best")


def test_a_large_metric_may_be_what_is_wanted(tmp_path: Path) -> None:
    run = small_search(tmp_path, strategy=Listed(given=[A, B, C]), objectives=("r2",), epochs=1)
    assert run.problem.objectives == (Objective("r2", "maximize"),)
    most = max(r.result.metrics["r2"] for r in run.records.values())
    assert run.best().metrics["r2"] == most
