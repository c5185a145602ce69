"""What is written on the picture of an architecture: boxes with operation, sparsity and time.

This file imports no torch and no matplotlib.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from nas.sparsity import NM, Unstructured, parse

LINE, LETTER, STATE = 0.145, 0.07, 0.46  # inches, at 8 points
MOST_BOXES = 40
OPEN = "open"


@dataclass(frozen=True)
class Box:
    """What is written at one place of a picture.

    Attributes:
        lines: From top to bottom.
        density: The share of weights that is kept; None where there are none, or it is open.
        name: Whether the first line is a name rather than an operation.
    """

    lines: tuple[str, ...]
    density: float | None = None
    name: bool = False

    @property
    def size(self) -> tuple[float, float]:
        """Width and height that the lines need, inches."""
        return max(map(len, self.lines)) * LETTER + 0.2, len(self.lines) * LINE + 0.12


class State(Box):
    """A state of a cell."""

    @property
    def size(self) -> tuple[float, float]:
        """A fixed size, inches."""
        return STATE, STATE


def parted(cell: nx.DiGraph[Any]) -> nx.DiGraph[Any]:
    """The cell with every labelled edge parted by a node (u, v), where its operation is written.

    The new nodes carry what the edge carried. An edge without a label, or with "", stays one; the
    label None is that of an open choice.
    """
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_nodes_from(cell)
    for u, v, held in cell.edges(data=True):
        if held.get("label", "") != "":
            graph.add_node((u, v), **held)
            nx.add_path(graph, [u, (u, v), v])
        else:
            graph.add_edge(u, v)
    return graph


def cell_boxes(graph: nx.DiGraph[Any], times: Mapping[str, float]) -> dict[Any, Box]:
    """Boxes of a parted cell: its states, and the operations between them."""
    return {
        node: _operation_box(held, _time(held.get("path", ()), times))
        if "label" in held
        else State((state(str(node)),))
        for node, held in graph.nodes(data=True)
    }


def collapsed(graph: nx.DiGraph[Any]) -> nx.DiGraph[Any]:
    """The graph with runs of its chains as one node, so long that about 40 nodes are left.

    Nodes of the result carry `members`: (name, what it carries) of each node they stand for.
    """
    chains = _chains(graph)
    longest = 1
    while sum(-(-len(c) // longest) for c in chains) > MOST_BOXES and longest < len(graph):
        longest += 1
    runs = [c[i : i + longest] for c in chains for i in range(0, len(c), longest)]
    head = {member: run[0] for run in runs for member in run}
    small: nx.DiGraph[Any] = nx.DiGraph()
    for run in runs:
        small.add_node(run[0], members=[(m, graph.nodes[m]) for m in run])
    small.add_edges_from((head[u], head[v]) for u, v in graph.edges if head[u] != head[v])
    return small


def _chains(graph: nx.DiGraph[Any]) -> list[list[Any]]:
    """Nodes in the longest pieces in which each but the last feeds the next alone."""
    links: nx.DiGraph[Any] = nx.DiGraph()
    links.add_nodes_from(graph)
    links.add_edges_from(
        (u, v) for u, v in graph.edges if graph.out_degree(u) == 1 and graph.in_degree(v) == 1
    )
    pieces = nx.weakly_connected_components(links)
    return [list(nx.topological_sort(links.subgraph(piece))) for piece in pieces]


def graph_boxes(graph: nx.DiGraph[Any], times: Mapping[str, float]) -> dict[Any, Box]:
    """Boxes of a graph that `collapsed` gave."""
    return {node: _chain_box(held["members"], times) for node, held in graph.nodes(data=True)}


def _node_box(name: str, held: Mapping[str, Any], times: Mapping[str, float]) -> Box:
    box = _operation_box(held, _time(name, times))
    shape = "x".join(map(str, held.get("shape", ())))
    return Box(tuple(filter(None, (name, *box.lines, shape))), box.density, name=True)


def _chain_box(chain: Sequence[tuple[str, Mapping[str, Any]]], times: Mapping[str, float]) -> Box:
    if len(chain) == 1:
        return _node_box(*chain[0], times)
    names = Counter(filter(None, (_operation(held) for _, held in chain)))
    told = [f"{n} x {name}" if n > 1 else name for name, n in names.items()]
    kept = [density(held["sparsity"]) for _, held in chain if "sparsity" in held]
    known = [k for k in kept if k is not None]
    spent = [ms for name, _ in chain if (ms := _time(name, times)) is not None]
    title = f"{chain[0][0]} ... {chain[-1][0]}"
    lines = (title, *told, _range(known), _milliseconds(sum(spent) if spent else None))
    mean = sum(known) / len(known) if known else None
    return Box(tuple(filter(None, lines)), mean, name=True)


def _range(known: Sequence[float]) -> str:
    if not known or min(known) == 1:
        return "dense" if known else ""
    ends = dict.fromkeys(percent(1 - k) for k in (max(known), min(known)))
    return " to ".join(ends) + " zeros"


def _operation_box(held: Mapping[str, Any], ms: float | None) -> Box:
    sparsity = held.get("sparsity")
    lines = (_operation(held), zeros(sparsity) if sparsity else "", _milliseconds(ms))
    return Box(tuple(filter(None, lines)), density(sparsity) if sparsity else None)


def _operation(held: Mapping[str, Any]) -> str:
    node = held.get("node")
    kind = getattr(node.operation, "kind", "") if node is not None and not node.label else ""
    label = held.get("label", "")
    return f"{OPEN if label is None else label} {kind}".strip()


def _milliseconds(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.3g} ms"


def _time(paths: str | Sequence[str], times: Mapping[str, float]) -> float | None:
    """Milliseconds of a node, or of several together: those of every layer at or below a path."""
    below = tuple(f"{path}/" for path in ([paths] if isinstance(paths, str) else paths))
    found = [ms for layer, ms in times.items() if f"{layer}/".startswith(below)]
    return sum(found) if found else None


def layer_times(details: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds by path (with `/`) of every layer that a measured cost's `layers` holds."""
    found = (cost.get("layers", {}) for cost in details.values() if isinstance(cost, Mapping))
    return {path.replace(".", "/"): ms for layers in found for path, ms in layers.items()}


def zeros(sparsity: str) -> str:
    """A sparsity's label for people: `90% zeros`, `2:4, 50% zeros`, `dense`, `sparsity open`."""
    if sparsity in (OPEN, "dense"):
        return {OPEN: "sparsity open"}.get(sparsity, sparsity)
    value, pattern = parse(sparsity), sparsity.partition(":")[0]
    share = f"{percent(value.ratio)} zeros"
    if isinstance(value, Unstructured):
        return share
    return f"{sparsity if isinstance(value, NM) else pattern}, {share}"


def percent(share: float) -> str:
    """A share of 1 as `97.5%`."""
    return f"{100 * share:.3g}%"


def density(sparsity: str) -> float | None:
    """The share of weights that a sparsity keeps; None where it is open."""
    return None if sparsity == OPEN else 1 - parse(sparsity).ratio


def state(name: str) -> str:
    """A state's name with its subscript, as TeX has it: `$c_{k-2}$`."""
    found = re.fullmatch(r"([a-z])_\{?(\w(?:-\d+)?)\}?", name)
    return f"${found[1]}_{{{found[2]}}}$" if found else name
