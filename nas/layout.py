"""Where the boxes of a directed acyclic graph go when it is drawn from left to right.

Layers by longest path, an order in each that crosses few edges (Sugiyama, Tagawa and Toda 1981),
and heights that keep edges straight. Lengths are inches, y grows upwards. This file imports no
torch and no matplotlib.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Any

import networkx as nx

Point = tuple[float, float]
Size = tuple[float, float]
COLUMN_GAP = 0.45
ROW_GAP = 0.55
BOX_GAP = 0.16
LANE = 0.12  # height that an edge takes where it passes a column
SWEEPS = 12


@dataclass(frozen=True)
class Layout:
    """What `arrange` found.

    Attributes:
        centres: By node.
        routes: Points from source to target by edge; where two differ in x and y, a curve that
            is level at both.
        size: Width and height of all; the lower left corner is (0, 0).
    """

    centres: dict[Any, Point]
    routes: dict[tuple[Any, Any], list[Point]]
    size: Size

    def above_zero(self) -> Layout:
        """The same with the lower left corner at (0, 0) where the upper one was."""
        up = self.size[1]
        centres = {node: (x, y + up) for node, (x, y) in self.centres.items()}
        routes = {edge: [(x, y + up) for x, y in way] for edge, way in self.routes.items()}
        return Layout(centres, routes, self.size)


def arrange(graph: nx.DiGraph[Any], sizes: Mapping[Any, Size], widest: float = inf) -> Layout:
    """Place boxes of these sizes so that none overlap and no edge passes through one.

    Args:
        graph: Acyclic.
        sizes: Width and height by node.
        widest: Columns that go beyond this width begin a new row below.
    """
    rank = layers(graph)
    paths = {(u, v): [u, *_between(u, v, rank), v] for u, v in graph.edges}
    columns = _columns(graph, rank, paths)
    size = {n: sizes.get(n, (0.0, LANE)) for column in columns for n in column}
    links = _links(size, paths.values())
    columns = _ordered(columns, links)
    height = _heights(columns, links, size)
    spans = _spans([max(size[n][0] for n in column) for column in columns], widest)
    lift, floors = _rows_below(columns, spans, height, size)
    span = {n: spans[i] for i, column in enumerate(columns) for n in column}
    centres = {n: ((s.left + s.right) / 2, height[n] + lift[s.row]) for n, s in span.items()}
    routes = _Routes(span, centres, size, floors)
    return Layout(
        {n: centres[n] for n in graph},
        {edge: routes.along(path) for edge, path in paths.items()},
        (max(s.right for s in spans), -floors[-1]),
    ).above_zero()


def layers(graph: nx.DiGraph[Any]) -> dict[Any, int]:
    """Layer of each node: right behind what feeds it; right before its reader on a plain way."""
    order, rank = list(nx.topological_sort(graph)), dict.fromkeys(graph, 0)
    for node in order:
        rank[node] = max((rank[u] + 1 for u in graph.predecessors(node)), default=0)
    for node in reversed(order):
        if graph.in_degree(node) == graph.out_degree(node) == 1:
            rank[node] = rank[next(graph.successors(node))] - 1
    return rank


def crossings(left: Sequence[Any], right: Sequence[Any], links: Mapping[Any, list[Any]]) -> int:
    """How many edges between two neighbouring columns cross; `links` goes left to right."""
    at = {node: i for i, node in enumerate(right)}
    ends = [[at[v] for v in links[u] if v in at] for u in left]
    return sum(
        a > b
        for i, upper in enumerate(ends)
        for lower in ends[i + 1 :]
        for a in upper
        for b in lower
    )


def _between(u: Hashable, v: Hashable, rank: Mapping[Any, int]) -> list[Any]:
    return [(u, v, r) for r in range(rank[u] + 1, rank[v])]


def _columns(
    graph: nx.DiGraph[Any], rank: Mapping[Any, int], paths: Mapping[Any, list[Any]]
) -> list[list[Any]]:
    columns: list[list[Any]] = [[] for _ in range(max(rank.values()) + 1)]
    for node in graph:
        columns[rank[node]].append(node)
    for path in paths.values():
        for passing in path[1:-1]:
            columns[passing[2]].append(passing)
    return columns


def _links(nodes: Iterable[Any], paths: Iterable[list[Any]]) -> dict[Any, list[Any]]:
    links: dict[Any, list[Any]] = {node: [] for node in nodes}
    for path in paths:
        for u, v in pairwise(path):
            links[u].append(v)
    return links


def _ordered(columns: list[list[Any]], links: Mapping[Any, list[Any]]) -> list[list[Any]]:
    """The best of some sweeps that put each node at the mean place of its neighbours."""
    back = _reversed(links)
    best, fewest = columns, _all_crossings(columns, links)
    for sweep in range(SWEEPS):
        columns = _swept(columns, back if sweep % 2 == 0 else links, sweep % 2 == 1)
        crossed = _all_crossings(columns, links)
        if crossed < fewest:
            best, fewest = columns, crossed
    return best


def _reversed(links: Mapping[Any, list[Any]]) -> dict[Any, list[Any]]:
    back: dict[Any, list[Any]] = {node: [] for node in links}
    for u, targets in links.items():
        for v in targets:
            back[v].append(u)
    return back


def _all_crossings(columns: list[list[Any]], links: Mapping[Any, list[Any]]) -> int:
    return sum(crossings(a, b, links) for a, b in pairwise(columns))


def _swept(
    columns: list[list[Any]], towards: Mapping[Any, list[Any]], backwards: bool
) -> list[list[Any]]:
    place: dict[Any, float] = {}
    done = []
    for column in reversed(columns) if backwards else columns:
        middle = (len(column) - 1) / 2
        here = {n: i - middle for i, n in enumerate(column)}
        wish = {n: _mean([place[m] for m in towards.get(n, [])], here[n]) for n in column}
        done.append(sorted(column, key=lambda n: wish[n]))
        place |= {n: i - middle for i, n in enumerate(done[-1])}
    return done[::-1] if backwards else done


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _heights(
    columns: list[list[Any]], links: Mapping[Any, list[Any]], size: Mapping[Any, Size]
) -> dict[Any, float]:
    """Height of each node's centre, near the mean of its neighbours'; columns run downwards."""
    back, y = _reversed(links), dict.fromkeys(links, 0.0)
    for column in columns:
        y |= dict(zip(column, _apart([0.0] * len(column), column, size), strict=True))
    for sweep in range(SWEEPS):
        for column in columns if sweep % 2 else columns[::-1]:
            near = [[y[m] for m in (*links.get(n, []), *back.get(n, []))] for n in column]
            wish = [_mean(ys, y[n]) for ys, n in zip(near, column, strict=True)]
            y |= dict(zip(column, _apart(wish, column, size), strict=True))
    return y


def _apart(wish: list[float], column: list[Any], size: Mapping[Any, Size]) -> list[float]:
    """Heights closest to the wished ones (least squares) that keep order and distance."""
    below = [0.0]
    for a, b in pairwise(column):
        below.append(below[-1] + (size[a][1] + size[b][1]) / 2 + BOX_GAP)
    pools: list[list[float]] = []
    for target in (-(w + d) for w, d in zip(wish, below, strict=True)):
        pools.append([target, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, n), (b, m) = pools[-2:]
            pools[-2:] = [[(a * n + b * m) / (n + m), n + m]]
    free = [mean for mean, count in pools for _ in range(int(count))]
    return [-f - d for f, d in zip(free, below, strict=True)]


@dataclass(frozen=True)
class _Span:
    """Where a column lies, and in which row."""

    left: float
    right: float
    row: int


def _spans(widths: list[float], widest: float) -> list[_Span]:
    spans: list[_Span] = []
    left, row = 0.0, 0
    for width in widths:
        if left and left + width > widest:
            left, row = 0.0, row + 1
        spans.append(_Span(left, left + width, row))
        left += width + COLUMN_GAP
    return spans


def _rows_below(
    columns: list[list[Any]],
    spans: list[_Span],
    height: Mapping[Any, float],
    size: Mapping[Any, Size],
) -> tuple[list[float], list[float]]:
    """How far each row is lifted so that it lies below the one before, and where it ends."""
    lift, floors, top = [], [], 0.0
    for row in range(spans[-1].row + 1):
        held = [
            n for column, s in zip(columns, spans, strict=True) if s.row == row for n in column
        ]
        lift.append(top - max(height[n] + size[n][1] / 2 for n in held))
        floors.append(lift[-1] + min(height[n] - size[n][1] / 2 for n in held))
        top = floors[-1] - ROW_GAP
    return lift, floors


class _Routes:
    """Ways of edges: level through columns, curved between them, around the end of a row."""

    def __init__(
        self,
        span: Mapping[Any, _Span],
        centres: Mapping[Any, Point],
        size: Mapping[Any, Size],
        floors: list[float],
    ) -> None:
        self.span, self.centres, self.size, self.floors = span, centres, size, floors
        self.around = [0] * len(floors)

    def along(self, path: list[Any]) -> list[Point]:
        """Points from the right side of the first node to the left side of the last."""
        first, last = path[0], path[-1]
        points = [(self.centres[first][0] + self.size[first][0] / 2, self.centres[first][1])]
        for a, b in pairwise(path):
            points.append((self.span[a].right, self.centres[a][1]))
            points += self._to_next_row(a, b) if self.span[a].row != self.span[b].row else []
            points.append((self.span[b].left, self.centres[b][1]))
        end = (self.centres[last][0] - self.size[last][0] / 2, self.centres[last][1])
        return [*points, end]

    def _to_next_row(self, a: Any, b: Any) -> list[Point]:
        row = self.span[a].row
        aside = COLUMN_GAP / 2 - 0.06 * (self.around[row] % 3)
        self.around[row] += 1
        x, back = self.span[a].right + aside, self.span[b].left - aside
        y = self.floors[row] - ROW_GAP + aside + 0.05
        return [(x, self.centres[a][1]), (x, y), (back, y), (back, self.centres[b][1])]
