from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from nas.costs import NonZeros
from nas.evaluate import Evaluate
from nas.loop import search
from nas.reporting import speed
from nas.space import Space
from nas.tasks import digits
from scripts.report import main
from search_spaces.mlp import mlp
from strategies.random_search import RandomSearch


def small_space() -> Space:
    return mlp((1, 8, 8), 10, depths=(1,), widths=(8, 16, 24), sparsities=("0.5", "0.8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("script") / "run"
    evaluate = Evaluate(digits(), costs=[NonZeros()])
    search(small_space(), RandomSearch(), evaluate, out=place, trials=2, epochs=1)
    return place


@pytest.fixture(autouse=True)
def quiet_and_short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(speed, "SECONDS", 1e-4)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def test_a_function_that_is_not_there_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), "--model", "os:nothing"]) == 2
    assert "os has no function 'nothing'" in capsys.readouterr().err


def test_the_script_writes_a_report_and_prints_where_and_what(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seeds", "1", "--no-baseline", "--no-compile", "--batches", "3"]
    own = ["--model", "tests.scripts.test_report:small_space"]
    assert main([str(folder), *options, *own]) == 0
    place, *lines = capsys.readouterr().out.splitlines()
    assert Path(place) == folder / "report" / "report.md"
    values = json.loads((folder / "report" / "report.json").read_text())
    assert lines == [f"- {line}" for line in values["summary"]]
    assert (values["plan"]["batches"], values["plan"]["seeds"]) == ([3], 1)
    assert values["baseline"] is None
    assert Path(place).read_text().startswith("# Report of run\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "nothing: holds no run"),
        (["{run}", "--seeds", "0"], "Plan: seeds"),
        (["{run}", "--model", "no_such_module:space"], "no_such_module"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([option.replace("{run}", str(folder)) for option in options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("report.py: ") and message in said.err
    assert said.err.count("\n") == 1
