from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nas.pictures import architecture_picture, front_picture, mixture_picture, ranking_picture
from nas.trial import Result
from search_spaces.cell import cell
from tests.runs_for_tests import made_up_run, small_space

POINTS = [
    {"error": 0.5, "latency_ms": 0.1, "accuracy": 0.5, "parameters": 100.0},
    {"error": 0.2, "latency_ms": 0.4, "accuracy": 0.8, "parameters": 200.0},
    {"error": 0.3, "latency_ms": 0.8, "accuracy": 0.7, "parameters": 300.0},
    {"error": 0.1, "latency_ms": 2.0, "accuracy": 0.9, "parameters": 400.0},
]


def test_drawing_is_all_that_imports_matplotlib() -> None:
    code = "import nas.pictures, sys; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_front_is_a_step_line_through_the_networks_that_none_dominates(tmp_path: Path) -> None:
    run = made_up_run(tmp_path, POINTS)
    line = _lines(front_picture(run))["front (3)"]
    assert line.get_drawstyle() == "steps-post"
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [
        (0.1, 0.5),
        (0.4, 0.2),
        (2.0, 0.1),
    ]


def test_axes_have_units_and_powers_where_values_span_more_than_ten(tmp_path: Path) -> None:
    (axes,) = _draw(front_picture(made_up_run(tmp_path, POINTS))).axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("latency (ms)", "error")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


def test_a_maximised_objective_is_drawn_as_it_is(tmp_path: Path) -> None:
    run = made_up_run(tmp_path, POINTS, ("accuracy", "latency_ms"))
    line = _lines(front_picture(run))["front (3)"]
    assert list(line.get_ydata()) == [0.5, 0.8, 0.9]


def test_what_breaks_a_limit_is_marked_and_the_limit_is_dashed(tmp_path: Path) -> None:
    limits = {"latency_ms": 1.0, "parameters": 1000.0}
    figure = front_picture(made_up_run(tmp_path, POINTS, limits=limits))
    labels = _labels(figure)
    assert {"trial (3)", "over a limit (1)", "front (2)", "limit 1"} <= set(labels)
    assert _lines(figure)["limit 1"].get_linestyle() == "--"
    assert "parameters at most 1000" in _texts(figure)[-1]


def test_refused_and_failed_trials_are_counted_not_drawn(tmp_path: Path) -> None:
    lost = [Result("refused", {"parameters": 9.0}), Result("failed", error="x")]
    figure = front_picture(made_up_run(tmp_path, [*POINTS, *lost]))
    assert "trial (4)" in _labels(figure)
    assert _texts(figure)[-1] == "5 trials, 1 failed, 1 refused"


def test_one_objective_is_drawn_over_the_trials_with_the_best_so_far(tmp_path: Path) -> None:
    figure = front_picture(made_up_run(tmp_path, POINTS, ("error",)))
    assert list(_lines(figure)["best so far"].get_ydata()) == [0.5, 0.2, 0.2, 0.1]
    assert figure.axes[0].get_xlabel() == "trial"


def test_every_further_objective_has_a_panel(tmp_path: Path) -> None:
    run = made_up_run(tmp_path, POINTS, ("error", "latency_ms", "parameters"))
    figure = _draw(front_picture(run))
    assert [a.get_xlabel() for a in figure.axes] == ["latency (ms)", "parameters"]


def test_references_and_dense_twins_stand_beside_the_front(tmp_path: Path) -> None:
    details = {"latency_ms": {"twin_median_ms": 0.9, "median_ms": 0.4}}
    run = made_up_run(tmp_path, [Result("ok", POINTS[1], details=details)])
    labels = _labels(front_picture(run, {"dense parent": {"error": 0.1, "latency_ms": 3.0}}))
    assert {"dense parent", "time of its dense twin"} <= set(labels)


def test_a_run_without_results_has_a_picture(tmp_path: Path) -> None:
    assert _texts(front_picture(made_up_run(tmp_path, [])))[-1] == "0 trials"


def test_a_ranking_is_told_by_kendalls_tau() -> None:
    figure = ranking_picture([(0.1, 0.2), (0.2, 0.3), (0.3, 0.25)])
    assert figure.axes[0].get_title() == "Kendall tau 0.33, n = 3"


def test_a_mixture_frames_the_largest_weight_of_each_choice() -> None:
    mixture = {"depth": [0.1, 0.7, 0.2], "layer0/width": [0.6, 0.4]}
    figure = mixture_picture(small_space(), mixture)
    framed = [p for a in figure.axes for p in a.patches if p.get_linewidth() > 1]
    assert [p.get_x() for p in framed] == [1, 0]  # type: ignore[attr-defined]
    assert {"depth", "layer0/width", "0.70", "0.60", "32"} <= set(_texts(figure))


def test_an_architecture_shows_every_operation_with_sparsity_and_time() -> None:
    space = small_space()
    picks = space.sample(np.random.default_rng(0), {"depth": 2, "layer0/sparsity": "0.9"})
    details = {"latency_ms": {"layers": {"layer0.linear": 0.125}}}
    texts = _texts(architecture_picture(space, picks, details))
    assert {"layer0/linear", "layer1/linear", "classifier", "90% zeros", "0.125 ms"} <= set(texts)
    assert texts.count("SparseLinear") == 3


@pytest.mark.parametrize("seed", range(6))
def test_cells_are_drawn_without_overlap(seed: int) -> None:
    space = cell((3, 8, 8), 10, cells=3, channels=4)
    picks = space.sample(np.random.default_rng(seed))
    figure = architecture_picture(space, picks)
    texts = _texts(figure)
    assert {"cell normal", "cell reduction", "$c_{k-2}$", "$c_{k}$"} <= set(texts)
    operations = [str(pick) for name, pick in picks.items() if name.endswith("/op")]
    assert all(texts.count(op) == operations.count(op) for op in operations)
    _assert_apart(figure)


def test_a_supernets_cells_say_what_is_open() -> None:
    space = cell((3, 8, 8), 10, cells=3, channels=4)
    texts = _texts(architecture_picture(space, {}))
    assert texts.count("open") == 28


def _draw(figure: Figure) -> Figure:
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    return figure


def _assert_apart(figure: Figure) -> None:
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in figure.axes[0].texts]
    assert all(not a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(figure.bbox.contains(*corner) for b in boxes for corner in (b.min, b.max))


def _texts(figure: Figure) -> list[str]:
    held = [t.get_text() for a in figure.axes for t in (*a.texts, *a.get_xticklabels())]
    held += [t.get_text() for a in figure.axes for t in a.get_yticklabels()]
    return [*held, figure.get_suptitle()]


def _labels(figure: Figure) -> list[str]:
    return [label for a in figure.axes for label in a.get_legend_handles_labels()[1]]


def _lines(figure: Figure) -> dict[str, Any]:
    return {str(line.get_label()): line for a in figure.axes for line in a.lines}
