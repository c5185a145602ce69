"""A real run's TensorBoard in a real browser."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nas.tensorboard import TensorBoard
from scripts.look import expectations, main
from tests.runs_for_tests import small_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="needs chromium and chromedriver",
    ),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pytest.importorskip("selenium")
    from scripts.look import look

    run = small_run(tmp_path_factory.mktemp("run") / "run", 2, [TensorBoard()])
    expected = expectations(run.folder)
    expected["hparams"] += ["trial 0", "trial 1"]
    return look(run.folder / "tensorboard", expected)


def test_scalars_have_the_best_so_far_and_a_run_a_trial(seen: dict[str, str]) -> None:
    lines = seen["scalars"].splitlines()
    assert {"search", "trials/0000", "trials/0001", "best", "error", "nonzeros"} <= set(lines)


def test_images_have_the_front_and_the_best_architecture(seen: dict[str, str]) -> None:
    assert {"front", "best_architecture", "front_architectures"} <= set(
        seen["images"].splitlines()
    )


def test_hparams_have_a_row_a_trial_with_picks_and_metrics(seen: dict[str, str]) -> None:
    lines = seen["hparams"].splitlines()
    assert {"trial 0", "trial 1", "depth", "layer0/width", "error", "nonzeros"} <= set(lines)


def test_the_text_is_the_runs_description(seen: dict[str, str]) -> None:
    assert {"space.fingerprint", "RandomSearch", "digits"} <= set(seen["text"].splitlines())


def test_the_script_saves_a_screenshot_of_each_tab(tmp_path: Path) -> None:
    pytest.importorskip("selenium")
    run = small_run(tmp_path / "run", 1, [TensorBoard()])
    assert main([str(run.folder), "--out", str(tmp_path / "shots")]) == 0
    shots = {path.stem: path.stat().st_size for path in (tmp_path / "shots").glob("*.png")}
    assert set(shots) == set(expectations(run.folder))
    assert all(size > 10_000 for size in shots.values())
