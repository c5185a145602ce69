from __future__ import annotations

from typing import Any

import networkx as nx
import pytest

from nas.boxes import cell_boxes, collapsed, graph_boxes, layer_times, parted, state, zeros
from search_spaces.mlp import mlp


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("dense", "dense"),
        ("0.9", "90% zeros"),
        ("0.975", "97.5% zeros"),
        ("2:4", "2:4, 50% zeros"),
        ("block4x1:0.8", "block4x1, 80% zeros"),
        ("channel:0.5", "channel, 50% zeros"),
        ("open", "sparsity open"),
    ],
)
def test_a_sparsity_is_told_by_its_share_of_zeros(label: str, words: str) -> None:
    assert zeros(label) == words


def test_states_have_subscripts() -> None:
    assert [state(n) for n in ("c_{k-2}", "c_k-1", "c_{k}", "3")] == [
        "$c_{k-2}$",
        "$c_{k-1}$",
        "$c_{k}$",
        "3",
    ]


def test_a_small_graph_is_not_collapsed() -> None:
    drawn = _chain(3)
    assert [len(held["members"]) for _, held in collapsed(drawn).nodes(data=True)] == [1] * len(
        drawn
    )


def test_a_long_chain_becomes_at_most_forty_boxes_that_hold_every_node_once() -> None:
    drawn = _chain(60)
    small = collapsed(drawn)
    members = [name for _, held in small.nodes(data=True) for name, _ in held["members"]]
    assert len(small) <= 40 < len(drawn)
    assert sorted(members) == sorted(drawn)
    assert nx.is_directed_acyclic_graph(small)
    assert nx.is_weakly_connected(small)


def test_a_box_of_several_nodes_counts_operations_and_adds_up_times() -> None:
    drawn = _chain(60)
    layers = {f"layer{i}.linear": 0.001 for i in range(60)}
    boxes = graph_boxes(collapsed(drawn), layer_times({"latency_ms": {"layers": layers}}))
    lines = next(b for b in boxes.values() if "2 x SparseLinear" in b.lines).lines
    assert "90% zeros" in lines
    assert "0.002 ms" in lines


def test_an_operation_of_a_cell_has_the_time_of_its_layers_in_all_its_places() -> None:
    cell: nx.DiGraph[Any] = nx.DiGraph()
    places = ("cells/0/0-2", "cells/1/0-2")
    cell.add_edge("c_{k-1}", "0", label="sep_conv_3x3", sparsity="0.8", path=places)
    cell.add_edge("0", "c_{k}", label="")
    layers = {"cells.0.0-2.first": 0.25, "cells.1.0-2.first": 0.5, "cells.0.0-21.first": 9.0}
    boxes = cell_boxes(parted(cell), layer_times({"latency_ms": {"layers": layers}}))
    assert boxes["c_{k-1}", "0"].lines == ("sep_conv_3x3", "80% zeros", "0.75 ms")
    assert ("0", "c_{k}") not in boxes


def _chain(depth: int) -> nx.DiGraph[Any]:
    space = mlp((4,), 2, depths=(depth,), widths=(8,), sparsities=("0.9",))
    return space.draw(space.smallest())
