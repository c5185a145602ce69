from __future__ import annotations

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

from nas.console import Progress, pareto_table, tensorboard_command
from nas.run import Run
from nas.tasks import binomial_interval
from nas.trial import Result
from nas.words import number, titled, written
from tests.runs_for_tests import made_up_run, small_run


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_run(tmp_path_factory.mktemp("run") / "run")


def test_rich_is_imported_when_something_is_shown_only() -> None:
    code = "import nas.console, sys; assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_a_terminal_every_trial_is_one_line(tmp_path: Path) -> None:
    stream = StringIO()
    run = small_run(tmp_path / "run", 3, [Progress(stream)])
    first, *lines = stream.getvalue().splitlines()
    assert first == f"run: {tmp_path / 'run'}"
    assert [line.split(";")[0] for line in lines] == [
        f"[{i + 1}/3] trial {i} ok" for i in range(3)
    ]
    best = min(r.result.metrics["error"] for r in run.usable())
    assert f"best error {number(best)}" in lines[-1]


def test_a_resumed_search_goes_on_with_the_best_so_far(tmp_path: Path) -> None:
    before = small_run(tmp_path / "run", 2)
    stream = StringIO()
    small_run(tmp_path / "run", 3, [Progress(stream)], resume=True)
    first, last = stream.getvalue().splitlines()
    assert first == f"run: {tmp_path / 'run'}, goes on behind 2 trials"
    assert last.startswith("[3/3] trial 2 ok")
    told = float(last.split("best error ")[1].split(",")[0])
    assert told <= min(r.result.metrics["error"] for r in before.usable()) + 1e-4


def test_refused_trials_say_why_and_are_counted(tmp_path: Path) -> None:
    stream = StringIO()
    small_run(tmp_path / "run", 1, [Progress(stream)], limits={"nonzeros": 700.0})
    lines = stream.getvalue().splitlines()
    refused = [line for line in lines if "refused: nonzeros" in line]
    assert refused
    assert f"{len(refused)} refused" in lines[-1]


def test_on_a_terminal_there_is_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    small_run(tmp_path / "run", 2, [Progress(stream)])
    assert "0/2" in stream.getvalue()
    assert "2/2" in stream.getvalue()
    assert "trial 0 ok" not in stream.getvalue()


def test_the_table_has_the_front_with_test_errors_and_their_interval(run: Run) -> None:
    told = pareto_table(run)
    for point in run.front():
        (line,) = [
            x for x in told.splitlines() if run.problem.space.architecture(point.picks).id in x
        ]
        task = run.evaluate.task
        assert task is not None
        low, high = binomial_interval(point.record.test["error"], len(task.test))
        values = [point.metrics["error"], point.metrics["nonzeros"], point.record.test["error"]]
        assert all(number(value) in line.split() for value in values)
        assert f"{low:.3g} to {high:.3g}" in line


def test_the_table_ends_with_the_folder_and_a_command_that_exists(run: Run) -> None:
    *_, folder, command = pareto_table(run).splitlines()
    assert folder == f"run: {run.folder}"
    assert command == f"see: {tensorboard_command(run)}"
    program = tensorboard_command(run).split()[0]
    assert Path(program).exists() or os.sep not in program


def test_measured_times_have_their_dense_twins_and_say_if_they_were_steady(tmp_path: Path) -> None:
    measured = {"median_ms": 0.5, "twin_median_ms": 1.5, "reliable": False}
    result = Result("ok", {"error": 0.1, "latency_ms": 0.5}, details={"latency_ms": measured})
    told = pareto_table(made_up_run(tmp_path, [result]))
    assert "twin latency" in told
    (line,) = [x for x in told.splitlines() if "3.00x" in x]
    assert line.split()[-3:] == ["1.5", "3.00x", "no"]


def test_an_empty_front_is_said(tmp_path: Path) -> None:
    assert "front: 0 of 0 trials" in pareto_table(made_up_run(tmp_path, []))


def test_names_and_values_have_units(tmp_path: Path) -> None:
    run = made_up_run(tmp_path, [])
    assert titled(run, "latency_ms") == "latency (ms)"
    assert titled(run, "parameters") == "parameters"
    assert written(run, "latency_ms", 0.12345) == "latency 0.1235 ms"


@pytest.mark.parametrize(
    ("value", "text"), [(1802.0, "1802"), (0.03125, "0.03125"), (12345.6, "12346")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
