import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nas.callbacks import Callback
from nas.evaluate import Evaluate
from nas.run import Run
from nas.trial import Trial
from strategies.random_search import RandomSearch
from tests.search_for_tests import (
    A,
    B,
    C,
    Fails,
    Listed,
    OpenThenClosed,
    Shuffled,
    Successive,
    cut,
    facts,
    log,
    small_search,
    told,
)

# Resuming


STRATEGIES: dict[str, Any] = {
    "random": lambda: RandomSearch(seed=3),
    "successive": Successive,
    "open then closed": OpenThenClosed,
    "duplicates": lambda: Listed(given=[A, B, A]),
    "stopping": lambda: Listed(given=[A, C], stop_at=1),
}


def killed_at(folder: Path, line: int, more: int, whole: Run, name: str, **how: Any) -> None:
    """Resume what a kill behind some line, and characters of the next, leaves; compare."""
    source, out = whole.folder, folder / f"{line}-{more}"
    shutil.copytree(source, out)
    cut(out, line, more)
    again = small_search(out, strategy=STRATEGIES[name](), resume=True, **how)
    assert facts(again) == facts(whole), f"cut behind line {line} and {more} characters"
    assert (out / "pareto.json").read_text() == (source / "pareto.json").read_text()
    assert [e["trial"] for e in told(out)] == [e["trial"] for e in told(source)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_search_that_was_killed_anywhere_resumes_to_the_same(tmp_path: Path, name: str) -> None:
    how: dict[str, Any] = {"objectives": ("rmse", "parameters"), "trials": 3, "epochs": 1}
    whole = small_search(tmp_path / "whole", strategy=STRATEGIES[name](), **how)
    lines = len(log(whole.folder))
    for line in range(lines + 1):
        killed_at(tmp_path, line, 0, whole, name, **how)
    for line in range(0, lines, 1 if name == "random" else 4):
        killed_at(tmp_path, line, 25, whole, name, **how)


def test_a_strategy_hears_the_same_reports_in_a_resumed_search(tmp_path: Path) -> None:
    first = Listed(given=[A, B])
    small_search(tmp_path / "whole", strategy=first)
    for n in (1, 2, 3, 6):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(n))
        for lives in range(2):
            cut(folder, n + lives)
            again = Listed(given=[A, B])
            small_search(folder, strategy=again, resume=True)
            assert again.reports == first.reports


def test_a_resumed_search_may_go_on_to_more_trials(tmp_path: Path) -> None:
    whole = small_search(tmp_path / "whole", trials=4)
    small_search(tmp_path / "parts", trials=2)
    assert facts(small_search(tmp_path / "parts", trials=4, resume=True)) == facts(whole)


def test_numbers_that_the_log_cannot_hold_come_back_as_nan(tmp_path: Path) -> None:
    wrong = Fails("nan")
    evaluate = Evaluate(train=wrong.train, validate=wrong.validate)
    how: dict[str, Any] = {"evaluate": evaluate, "objectives": ("error",), "trials": 2}
    small_search(tmp_path, strategy=Listed(given=[A, B]), **how)
    strategy = Listed(given=[A, B])
    run = small_search(tmp_path, strategy=strategy, resume=True, **how)
    assert math.isnan(run.records[0].result.metrics["error"])
    assert math.isnan(strategy.results[0][1].metrics["error"])


DRIVER = """
import sys, time
from pathlib import Path
from tests.search_for_tests import Heard, small_search

def wait(trial):
    print("told", trial.number, flush=True)
    time.sleep(float(sys.argv[2]))

run = small_search(Path(sys.argv[1]), trials=6, callbacks=[Heard(wait)])
print("interrupted", run.interrupted, flush=True)
"""


def driver(folder: Path, pause_s: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", DRIVER, str(folder), str(pause_s)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE, text=True)


def test_a_search_that_is_killed_resumes_to_the_same(tmp_path: Path) -> None:
    process = driver(tmp_path / "killed", pause_s=0.3)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert 3 <= len(told(tmp_path / "killed")) < 6
    whole = small_search(tmp_path / "whole", trials=6)
    again = small_search(tmp_path / "killed", trials=6, resume=True)
    assert facts(again) == facts(whole)
    for name in ("pareto.json", "best/architecture.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_ctrl_c_ends_a_search_cleanly_with_its_results_written(tmp_path: Path) -> None:
    process = driver(tmp_path, pause_s=30)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert rest.split() == ["interrupted", "True"] and process.returncode == 0
    assert len(json.loads((tmp_path / "pareto.json").read_text())["points"]) == 1
    assert (tmp_path / "best" / "weights.safetensors").exists()
    whole = small_search(tmp_path / "whole", trials=6)
    assert facts(small_search(tmp_path, trials=6, resume=True)) == facts(whole)


def test_ctrl_c_during_a_trial_leaves_it_to_be_run_again(tmp_path: Path) -> None:
    class Interrupted(Callback):
        def reported(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> None:
            if (trial.number, step) == (1, 1):
                os.kill(os.getpid(), signal.SIGINT)

    run = small_search(tmp_path / "parts", callbacks=[Interrupted()])
    assert run.interrupted and list(run.records) == [0]
    again = small_search(tmp_path / "parts", resume=True)
    assert facts(again) == facts(small_search(tmp_path / "whole")) and not again.interrupted


def test_a_search_with_several_workers_resumes_from_any_line(tmp_path: Path) -> None:
    given = [A, A, B, C]
    how: dict[str, Any] = {"epochs": 1, "objectives": ("rmse",)}
    whole = small_search(
        tmp_path / "whole", executor=Shuffled(), strategy=Listed(given=given), **how
    )
    for n in range(len(log(whole.folder)) + 1):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(n))
        cut(folder, n)
        again = small_search(
            folder, executor=Shuffled(), strategy=Listed(given=given), resume=True, **how
        )
        assert facts(again) == facts(whole), f"cut behind line {n}"
