import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nas.recipes import RECIPES
from nas.run import load
from nas.tasks import digits
from scripts import search

SMALL = ["--trials", "2", "--epochs", "1", "--objectives", "error", "parameters"]
MLP = ["--space-option", "widths=[32,64]", "--space-option", "depths=[1,2]"]
CELL = ["--space", "cell", "--space-option", "cells=1", "--space-option", "channels=4"]


def run(folder: Path, *options: str) -> int:
    return search.main(["--out", str(folder), *SMALL, *options])


def lines(folder: Path, event: str) -> list[dict[str, object]]:
    text = (folder / "trials.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, text) if e["event"] == event]


@pytest.mark.parametrize("strategy", search.STRATEGIES)
def test_each_strategy_leaves_a_whole_folder(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--strategy", strategy, *MLP) == 0
    described = json.loads((folder / "run.json").read_text())
    assert described["strategy"]["seed"] == 0 and described["made"]["versions"]["torch"]
    assert json.loads((folder / "pareto.json").read_text())["points"]
    assert (folder / "best" / "weights.safetensors").exists()
    assert list((folder / "tensorboard").rglob("events*"))
    closed = [e for e in lines(folder, "tell") if "parameters" in e["metrics"]]  # type: ignore[operator]
    assert len(closed) == 2
    shown = capsys.readouterr().out
    assert str(folder) in shown and "tensorboard --logdir" in shown


@pytest.mark.parametrize("space", [CELL, ["--space", "sparsify", "--parent-epochs", "1"]])
def test_each_space_leaves_a_network_that_loads(space: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--strategy", "random", *space) == 0
    best = json.loads((folder / "best" / "architecture.json").read_text())
    found = digits().evaluate(load(folder / "best"), "test")
    assert found["error"] == best["test"]["error"]


WRONG = {
    "unknown space": ["--space", "resnext"],
    "unknown strategy": ["--strategy", "luck"],
    "unknown task": ["--task", "imagenet"],
    "unknown objective": ["--objectives", "error", "beauty"],
    "limit not positive": ["--limit", "latency_ms=-1"],
    "limit that the smallest misses": ["--limit", "parameters=10"],
    "limit that no sparsified module keeps": ["--space", "sparsify", "--limit", "parameters=5"],
    "limit on a metric": ["--limit", "error=0.1"],
    "limit without a number": ["--limit", "parameters=few"],
    "missing data": ["--task", "cifar10", "--data", "/nowhere"],
    "unknown strategy option": ["--strategy-option", "population_size=3"],
    "impossible strategy option": ["--strategy-option", "sample=100"],
    "unknown space option": ["--space-option", "layers=3"],
    "sampler that would fall back": ["--strategy", "optuna", "--strategy-option", "sampler=gp"],
    "no run to resume": ["--resume", "/nowhere"],
    "no epochs": ["--epochs", "0"],
    "no number": ["--trials", "many"],
    "no time": ["--time-limit", "0"],
    "no epoch of the parent": ["--space", "sparsify", "--parent-epochs", "0"],
    "seed below 0": ["--seed", "-1"],
    "rate that is no number": ["--lr", "nan"],
    "no batch": ["--batch-size", "0"],
    "strategy option of another kind": ["--strategy-option", "population=x"],
    "one number for two": ["--strategy", "darts", "--strategy-option", "penalties=3"],
    "one penalty": ["--strategy", "darts", "--strategy-option", "penalties=[1]"],
    "no epoch of a round": ["--strategy", "darts", "--strategy-option", "search_epochs=0"],
    "no number of epochs": ["--strategy", "darts", "--strategy-option", "search_epochs=x"],
    "no batch of a round": ["--strategy", "darts", "--strategy-option", "batch_size=0"],
    "space option that is no list": ["--space-option", "widths=5"],
    "space option of another kind": ["--space-option", "sparsities=[0.5]"],
    "no width": ["--space-option", "widths=[-5]"],
    "no channel": ["--space", "cell", "--space-option", "channels=0"],
    "no channel to sparsify": ["--space", "sparsify", "--space-option", "width=-1"],
    "weights that are none": ["--space", "sparsify", "--weights", "README.md"],
    "address without ray": ["--ray-address", "auto"],
    "missing weights": ["--space", "sparsify", "--weights", "/nowhere.safetensors"],
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG.keys())
def test_wrong_input_fails_with_one_line_before_any_work(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--resume" in options else ["--out", str(tmp_path / "run")]
    assert search.main([*out, *options]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
def test_an_address_without_a_cluster_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert run(tmp_path / "run", *MLP, "--executor", "ray", "--ray-address", address) == 2
    shown = capsys.readouterr().err
    assert f"no Ray cluster at {address}" in shown and len(shown.splitlines()) == 1


def test_a_wrong_name_is_told_all_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["error", "latency"], ["error", "--limit", "latency=2"]):
        assert search.main(["--objectives", *options]) == 2
        assert "latency_ms" in capsys.readouterr().err


@pytest.mark.parametrize("space", search.SPACES)
def test_wrong_input_is_refused_without_importing_torch(space: str) -> None:
    code = (
        "import sys; from scripts.search import main; "
        f"code = main(['--space', '{space}', '--limit', 'peak_memory_bytes=10']); "
        "sys.exit(code if 'torch' not in sys.modules else 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 2


def test_a_run_folder_of_another_space_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--strategy", "random", *MLP) == 0
    capsys.readouterr()
    assert search.main(["--resume", str(folder), "--space", "cell"]) == 2
    assert "mlp" in capsys.readouterr().err
    assert run(folder, "--strategy", "random", *MLP) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize("held", ["garbage", "[]", '{"version": 9}', "\xff"])
def test_a_damaged_run_is_refused_by_the_name_of_its_file(
    held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(held, encoding="latin-1")
    assert search.main(["--resume", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert str(tmp_path / "run.json") in shown and len(shown.splitlines()) == 1
    assert (tmp_path / "run.json").read_text(encoding="latin-1") == held


def test_the_dense_parent_depends_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        given = {"space": "sparsify", "out": tmp_path / name, "seed": seed}
        arguments = search.settings({**given, "parent_epochs": 1})
        space = search.make_space(arguments, search.WITHOUT_TORCH)
        search.parent(arguments, space)
    one, again, other = ((tmp_path / n / "parent.safetensors").read_bytes() for n in "abc")
    assert one == again != other


def test_resuming_goes_on_with_more_trials(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--strategy", "random", *MLP) == 0
    first = lines(folder, "tell")
    assert search.main(["--resume", str(folder), "--trials", "3"]) == 0
    assert lines(folder, "tell")[:2] == first and len(lines(folder, "tell")) == 3


def test_a_dry_run_prints_sizes_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", "--dry-run", *MLP) == 0
    shown = capsys.readouterr().out
    assert "architectures" in shown and "smallest" in shown and "one trial" in shown
    assert not (tmp_path / "run").exists()


def test_ctrl_c_ends_cleanly_and_the_run_can_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "scripts/search.py", "--out", str(folder), "--strategy", "random"]
    command += ["--trials", "500", "--epochs", "1", "--objectives", "error", "parameters", *MLP]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == f"run: {folder}\n"
    process.stdout.readline()  # a trial
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in out and "Traceback" not in err
    assert json.loads((folder / "pareto.json").read_text())["points"]
    done = len(lines(folder, "tell"))
    assert search.main(["--resume", str(folder), "--trials", str(done + 1)]) == 0
    assert len(lines(folder, "tell")) == done + 1


def test_ctrl_c_before_the_search_ends_cleanly_too(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/search.py", "--out", str(tmp_path / "run")]
    command += ["--space", "sparsify", "--parent-epochs", "500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and "parent" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err == "search.py: interrupted\n"


def test_the_recipes_that_can_be_named_are_those_that_there_are() -> None:
    assert set(search.RECIPES) == set(RECIPES)
