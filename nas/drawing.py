"""Drawing an architecture: its cells as the DARTS paper does, or its whole graph.

Liu, Simonyan and Yang 2019, "DARTS: Differentiable Architecture Search", arXiv 1806.09055: states
are nodes, operations lie on edges. matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any

import networkx as nx

from nas.boxes import (
    LINE,
    Box,
    State,
    cell_boxes,
    collapsed,
    graph_boxes,
    layer_times,
    parted,
)
from nas.choices import Pick
from nas.layout import Layout, Point, arrange
from nas.space import Space

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDEST, BESIDE = 13.0, 16.0  # inches of a row of boxes, and of cells beside each other
FONT = 8.0  # points
MARGIN, HEADING, APART, HEAD = 0.4, 0.35, 0.9, 0.08  # inches
INK, QUIET = "#1a1a1a", "#5a5a5a"
SPARSE, DENSE, PLAIN = (0.97, 0.985, 1.0), (0.45, 0.69, 0.88), (0.95, 0.95, 0.95)
NOTE = (
    "The fainter a box and the thinner its edge, the fewer weights it keeps; grey: none, or open."
)


@dataclass(frozen=True)
class Panel:
    """One graph of a picture, laid out."""

    title: str
    boxes: dict[Any, Box]
    layout: Layout


def architecture_picture(
    space: Space, picks: Mapping[str, Pick], details: Mapping[str, Any] | None = None
) -> Figure:
    """Draw an architecture from left to right: operations, their sparsity, milliseconds.

    A space that has a method `cells(picks)`, which returns a graph by title, has its cells drawn:
    states as nodes, and edges that may carry `label`, `sparsity` and `path` (the node's, or those
    of all nodes that share the choice; their milliseconds are added up). Of any other space the
    whole graph is drawn, pieces of chains as one box where it has more than 40 nodes.

    Args:
        space: Where the picks are from.
        picks: Picks; what they leave open is drawn as open.
        details: A result's; the milliseconds of layers are read from any cost's `layers`.
    """
    times, cells = layer_times(details or {}), getattr(space, "cells", None)
    if cells is None:
        graph = collapsed(space.draw(picks))
        return _paint([_panel("", graph, graph_boxes(graph, times), WIDEST)])
    graphs = {title: parted(cell) for title, cell in cells(picks).items()}
    return _paint([_panel(t, graph, cell_boxes(graph, times)) for t, graph in graphs.items()])


def _panel(
    title: str, graph: nx.DiGraph[Any], boxes: dict[Any, Box], widest: float = inf
) -> Panel:
    sizes = {node: box.size for node, box in boxes.items()}
    return Panel(title, boxes, arrange(graph, sizes, widest))


def _paint(panels: Sequence[Panel]) -> Figure:
    """One figure whose data coordinates are inches."""
    from matplotlib.figure import Figure

    corners, (width, height) = _corners(panels)
    figure = Figure((width, height), dpi=120, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    for panel, corner in zip(panels, corners, strict=True):
        _paint_panel(axes, panel, corner)
    axes.text(MARGIN, 0.15, NOTE, fontsize=FONT - 1, color=QUIET, va="center")
    return figure


def _corners(panels: Sequence[Panel]) -> tuple[list[Point], tuple[float, float]]:
    """Lower left corner of each panel and the size of all: beside each other if that fits."""
    sizes = [p.layout.size for p in panels]
    heading = HEADING if any(p.title for p in panels) else 0.0
    wide, high = sum(w for w, _ in sizes) + APART * (len(sizes) - 1), max(h for _, h in sizes)
    floor, corners = MARGIN, []
    if wide <= BESIDE:
        left = MARGIN
        for w, h in sizes:
            corners.append((left, floor + (high - h) / 2))
            left += w + APART
    else:
        wide, high = max(w for w, _ in sizes), -APART / 2
        for _, h in reversed(sizes):
            corners.insert(0, (MARGIN, floor + high + APART / 2))
            high += h + APART / 2 + heading
        high -= heading
    note = len(NOTE) * 0.057
    return corners, (max(wide, note) + 2 * MARGIN, high + heading + 2 * MARGIN)


def _paint_panel(axes: Axes, panel: Panel, corner: Point) -> None:
    x, y = corner
    axes.text(
        x,
        y + panel.layout.size[1] + 0.2,
        panel.title.replace("_", " "),
        fontsize=FONT + 3,
        color=INK,
        va="center",
    )
    for (u, v), route in panel.layout.routes.items():
        density = _of_edge(panel.boxes[u], panel.boxes[v])
        _paint_edge(axes, [(x + a, y + b) for a, b in route], density, _has_head(panel.boxes[v]))
    for node, (cx, cy) in panel.layout.centres.items():
        _paint_box(axes, panel.boxes[node], x + cx, y + cy)


def _has_head(target: Box) -> bool:
    return target.name or isinstance(target, State)


def _of_edge(source: Box, target: Box) -> float | None:
    return source.density if isinstance(target, State) else target.density


def _paint_edge(axes: Axes, route: Sequence[Point], density: float | None, head: bool) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    color = "#8a8a8a" if density is None else "#35729f"
    width = 0.8 if density is None else 0.6 + 2 * density**0.5
    (x, y), back = route[-1], HEAD if head else 0.0
    points, codes = _curve([*route[:-1], (x - back, y)])
    line = Path(points, codes)
    axes.add_patch(PathPatch(line, linewidth=width, edgecolor=color, fill=False, zorder=1))
    if head:
        wing = HEAD / 2 + width / 200
        axes.fill([x, x - HEAD, x - HEAD], [y, y + wing, y - wing], color=color, lw=0, zorder=1)


def _curve(route: Sequence[Point]) -> tuple[list[Point], list[Any]]:
    """Vertices and codes of a matplotlib path: level at each point, or straight along an axis."""
    from matplotlib.path import Path

    points, codes = [route[0]], [Path.MOVETO]
    for (x0, y0), (x1, y1) in pairwise(route):
        middle, straight = (x0 + x1) / 2, min(abs(y0 - y1), abs(x0 - x1)) < 1e-6
        points += [(x1, y1)] if straight else [(middle, y0), (middle, y1), (x1, y1)]
        codes += [Path.LINETO] if straight else [Path.CURVE4] * 3
    return points, codes


def _paint_box(axes: Axes, box: Box, x: float, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    width, height = box.size
    rounding = 0.2 if isinstance(box, State) else 0.05
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle=f"round,pad=0,rounding_size={rounding}",
            facecolor=_fill(box),
            edgecolor=INK if isinstance(box, State) else "#6f8ca3",
            linewidth=1.0 if isinstance(box, State) else 0.7,
            zorder=2,
        )
    )
    _write(axes, box, x, y)


def _write(axes: Axes, box: Box, x: float, y: float) -> None:
    size = FONT + 3 if isinstance(box, State) else FONT
    for i, line in enumerate(box.lines):
        color = QUIET if box.name and i == 0 else INK
        place = y + ((len(box.lines) - 1) / 2 - i) * LINE
        axes.text(x, place, line, fontsize=size, color=color, ha="center", va="center", zorder=3)


def _fill(box: Box) -> tuple[float, float, float]:
    if isinstance(box, State):
        return (1.0, 0.93, 0.8)
    if box.density is None:
        return PLAIN
    full = box.density**0.5
    r, g, b = (a + full * (d - a) for a, d in zip(SPARSE, DENSE, strict=True))
    return r, g, b
