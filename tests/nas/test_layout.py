from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from nas.layout import Layout, arrange, crossings, layers

SIZES = st.tuples(st.floats(0.2, 2.0), st.floats(0.2, 1.0))


@st.composite
def graphs(draw: st.DrawFn) -> tuple[nx.DiGraph[Any], dict[Any, tuple[float, float]]]:
    n = draw(st.integers(1, 9))
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_nodes_from(range(n))
    pairs = list(combinations(range(n), 2))
    if pairs:
        graph.add_edges_from(draw(st.lists(st.sampled_from(pairs), unique=True, max_size=14)))
    return graph, {node: draw(SIZES) for node in graph}


@given(graphs(), st.sampled_from([4.0, float("inf")]))
def test_boxes_lie_apart_and_inside(drawn: Any, widest: float) -> None:
    graph, sizes = drawn
    layout = arrange(graph, sizes, widest)
    for a, b in combinations(graph, 2):
        (xa, ya), (xb, yb) = layout.centres[a], layout.centres[b]
        wide = (sizes[a][0] + sizes[b][0]) / 2
        high = (sizes[a][1] + sizes[b][1]) / 2
        assert abs(xa - xb) > wide or abs(ya - yb) > high
    for node, (x, y) in layout.centres.items():
        assert sizes[node][0] / 2 - 1e-6 <= x <= layout.size[0] - sizes[node][0] / 2 + 1e-6
        assert sizes[node][1] / 2 - 1e-6 <= y <= layout.size[1] - sizes[node][1] / 2 + 1e-6


@given(graphs(), st.sampled_from([4.0, float("inf")]))
def test_edges_leave_on_the_right_arrive_on_the_left_and_pass_no_box(
    drawn: Any, widest: float
) -> None:
    graph, sizes = drawn
    layout = arrange(graph, sizes, widest)
    for (u, v), route in layout.routes.items():
        (xu, yu), (xv, yv) = layout.centres[u], layout.centres[v]
        assert route[0] == (xu + sizes[u][0] / 2, yu)
        assert route[-1] == (xv - sizes[v][0] / 2, yv)
        for other in set(graph) - {u, v}:
            assert not any(_inside(p, layout, other, sizes) for p in _along(route))


def test_an_operation_on_an_edge_lies_right_before_its_reader() -> None:
    graph: nx.DiGraph[Any] = nx.DiGraph(
        [("a", "b"), ("b", "c"), ("c", "d"), ("a", "op"), ("op", "d")]
    )
    graph.add_edge("b", "d")
    rank = layers(graph)
    assert rank["op"] == rank["d"] - 1
    assert all(rank[u] < rank[v] for u, v in graph.edges)


def test_columns_are_ordered_so_that_edges_do_not_cross() -> None:
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_nodes_from(["a", "b", "x", "y"])
    graph.add_edges_from([("a", "y"), ("b", "x")])
    centres = arrange(graph, dict.fromkeys(graph, (1.0, 1.0))).centres
    left, right = (sorted(pair, key=lambda n: -centres[n][1]) for pair in ("ab", "xy"))
    assert crossings(left, right, {"a": ["y"], "b": ["x"]}) == 0


def test_a_long_chain_goes_on_in_rows_below() -> None:
    graph: nx.DiGraph[Any] = nx.path_graph(10, create_using=nx.DiGraph)
    layout = arrange(graph, dict.fromkeys(graph, (1.0, 0.5)), widest=5.0)
    assert layout.size[0] <= 5.0
    heights = [layout.centres[n][1] for n in graph]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 4


def _along(route: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points on the way: level ends make the curve stay between its two ends' columns."""
    points = []
    for (x0, y0), (x1, y1) in pairwise(route):
        for t in (0.0, 0.25, 0.5, 0.75, 1.0):
            eased = t * t * (3 - 2 * t)
            points.append((x0 + t * (x1 - x0), y0 + eased * (y1 - y0)))
    return points


def _inside(point: tuple[float, float], layout: Layout, node: Any, sizes: Any) -> bool:
    (x, y), (cx, cy), (w, h) = point, layout.centres[node], sizes[node]
    return abs(x - cx) < w / 2 - 1e-6 and abs(y - cy) < h / 2 - 1e-6
