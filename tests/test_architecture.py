"""The rooms of the project, and who may lean on whom: read from the imports of every file."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("kernels", "nas", "search_spaces", "strategies", "scripts")
LEANS_ON = {
    "kernels": {"kernels"},
    "nas": {"nas", "kernels"},
    "search_spaces": {"search_spaces", "nas"},
    "strategies": {"strategies", "nas"},
    "scripts": set(ROOMS),
}
THIRD_PARTIES = {"kernels": {"torch", "numpy", "triton"}}
HEAVY = ("ray", "optuna", "tensorboard", "rich", "matplotlib")
FILES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """(name of the module, line) of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield str(node.module), node.lineno


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_room_leans_only_on_those_that_it_may_lean_on(path: Path) -> None:
    allowed = LEANS_ON[room(path)]
    for name, line in imported(path):
        top = name.split(".")[0]
        assert top != "tests", f"{path}:{line} leans on the tests"
        assert top not in ROOMS or top in allowed, f"{path}:{line} leans on {top}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_kernels_need_torch_and_numpy_alone(path: Path) -> None:
    allowed = THIRD_PARTIES.get(room(path))
    for name, line in imported(path):
        top = name.split(".")[0]
        ours = top in ROOMS or top in sys.stdlib_module_names
        assert allowed is None or ours or top in allowed, f"{path}:{line} imports {name}"


def test_spaces_and_strategies_are_found() -> None:
    assert {"nas/loop.py", "search_spaces/mlp.py", "strategies/random_search.py"} <= set(NAMES)


def modules_to_try() -> list[str]:
    families = [p for p in FILES if room(p) in ("strategies", "search_spaces")]
    named = [p.relative_to(ROOT).with_suffix("").parts for p in families]
    return ["nas", "kernels", *(".".join(parts) for parts in named if parts[-1] != "__init__")]


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    """One process for all: it forks for each module, so that none hides another's import."""
    code = f"""
import importlib, os, sys
import nas, kernels, torch
for name in {modules_to_try()!r}:
    pid = os.fork()
    if pid == 0:
        importlib.import_module(name)
        found = [m for m in {HEAVY!r} if m in sys.modules]
        if found:
            print(name, "imports", *found)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, name
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout == ""


@pytest.mark.parametrize("module", ["nas", "search_spaces.mlp", "strategies.random_search"])
def test_checking_arguments_needs_no_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_stays_within_its_length(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_function_stays_within_its_length(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            docstring = len((ast.get_docstring(node) or "").splitlines())
            assert lines - docstring <= 45, f"{path}:{node.lineno} {node.name}: {lines} lines"
