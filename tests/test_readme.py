import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"<!-- test: (.+?) -->\n```python\n(.*?)```", re.S)


def blocks() -> dict[str, str]:
    return {name: code for name, code in BLOCK.findall(README.read_text())}


def execute(*names: str) -> dict[str, Any]:
    found: dict[str, Any] = {"__name__": "readme"}
    for name in names:
        exec(compile(blocks()[name], f"README.md: {name}", "exec"), found)
    return found


def test_every_python_block_is_run_by_a_test() -> None:
    assert README.read_text().count("```python") == len(blocks()) == 6


def test_the_twenty_lines_search_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = execute("own model")
    assert found["best"].metrics["latency_ms"] <= 1.5 and found["best"].metrics["error"] < 0.2
    x, best, fast = found["x"], found["best"].module(), found["fast"]
    assert (fast(x).argmax(1) == best(x).argmax(1)).all()


def test_an_operation_a_space_a_strategy_and_a_cost_can_be_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = execute("operation", "space", "strategy", "cost", "together")
    points = found["run"].front()
    assert points and all(p.metrics["kernel_bytes"] <= 60_000 for p in points)
    assert found["two_layers"]((1, 8, 8), 10).size() == 12


@pytest.mark.parametrize("script", ["search.py", "report.py", "look.py", "bench_kernels.py"])
def test_scripts_that_are_named_are_there(script: str) -> None:
    assert (README.parent / "scripts" / script).exists()


def test_pages_and_pictures_that_are_linked_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    missing = [link for link in links if "://" not in link and not (README.parent / link).exists()]
    assert not missing
