"""The graph of a space, an architecture or anything between: operations and who feeds whom.

A node's name is its path, with `/`; it is also where its weights are found in a state dict. The
graph is held, never inherited from. This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx

from nas.choices import Choice, Decision, Label, Pick, Subset, When
from nas.inside import find, merge, settle
from nas.operations import Layer, Operation, Shape

INPUT = "input"


@dataclass(frozen=True)
class Node:
    """One node: an operation (or the choice of one) on the outputs of others.

    Args:
        name: Path, with `/`.
        operation: An Operation, or a Choice of them.
        inputs: Names of the nodes that feed it, in order.
        when: Where it exists at all; elsewhere its single input passes on to its users.
        keep: A Subset whose items label the inputs: which of them are kept.
        label: The option that was picked where the operation was a Choice.
    """

    name: str
    operation: Any
    inputs: tuple[str, ...]
    when: When | None = None
    keep: Subset | None = None
    label: Label = ""

    def candidates(self) -> dict[Label, Operation]:
        """Operation by label: each option of an open choice, or the one there is."""
        op = self.operation
        return dict(op.options) if isinstance(op, Choice) else {self.label: op}


class Graph:
    """Nodes in topological order, from `input` to the last one that was added.

    Args:
        input_shape: Shape of one sample, without the batch.
    """

    def __init__(self, input_shape: Sequence[int]) -> None:
        self.input_shape: Shape = tuple(input_shape)
        self.nodes: dict[str, Node] = {}

    @property
    def output(self) -> str:
        """Name of the node whose output is the network's."""
        return next(reversed(self.nodes))

    def add(
        self,
        name: str,
        operation: Operation | Choice,
        *inputs: str,
        when: When | None = None,
        keep: Subset | None = None,
    ) -> str:
        """Add a node behind its inputs and return its name.

        Raises:
            ValueError: A name that is taken, holds a dot or lies inside another's, an input that
                is no node before, a subset that does not label each input, or a choice of
                operations inside an operation.
        """
        unknown = [i for i in inputs if i != INPUT and i not in self.nodes]
        if not name or name in self.nodes or name == INPUT or "." in name:
            raise ValueError(f"{name}: a node's name is new, not empty and holds no dots")
        nested = [n for n in self.nodes if _nested(n, name) or _nested(name, n)]
        if nested:
            raise ValueError(f"{name}: no node's name lies inside another's, as with {nested[0]}")
        own = getattr(operation, "name", "")
        inner = [c.name for c in find(operation) if c.name != own and _of_operations(c)]
        if inner:
            raise ValueError(f"{name}: a choice of operations stands at a node, {inner[0]} in one")
        if unknown or not inputs:
            raise ValueError(f"{name}: inputs must be nodes before it, got {unknown or 'none'}")
        if keep is not None and len(keep.items) != len(inputs):
            raise ValueError(
                f"{name}: {keep.name} labels {len(keep.items)} of {len(inputs)} inputs"
            )
        if when is not None and len(inputs) != 1:
            raise ValueError(f"{name}: a node that may be absent has one input, got {len(inputs)}")
        self.nodes[name] = Node(name, operation, inputs, when, keep)
        return name

    def choices(self) -> list[Decision]:
        """Every choice in the graph, each once, in order, with its condition."""
        return merge(c for node in self.nodes.values() for c in _found(node))

    def settle(self, picks: Mapping[str, Pick], still_open: Collection[str] = ()) -> Graph:
        """The graph with picked choices replaced; absent and unused nodes are gone.

        Args:
            picks: Label (or labels) by choice.
            still_open: Names of the active choices that have no pick.
        """
        settled, passed = Graph(self.input_shape), {INPUT: INPUT}
        for node in self.nodes.values():
            if _exists(node.when, picks, still_open):
                settled.nodes[node.name] = _settled(node, picks, passed)
                passed[node.name] = node.name
            else:
                passed[node.name] = passed[node.inputs[0]]
        return settled._used_by(passed[self.output])

    def _used_by(self, output: str) -> Graph:
        if output == INPUT:
            raise ValueError("a graph needs at least one node that is kept")
        alive = nx.ancestors(self.networkx(), output) | {output}
        self.nodes = {name: node for name, node in self.nodes.items() if name in alive}
        return self

    def shapes(self) -> dict[str, Shape]:
        """The shape of every node's output, open choices at their widest."""
        shapes = {INPUT: self.input_shape}
        for node in self.nodes.values():
            shapes[node.name] = self._shape(node, [shapes[i] for i in node.inputs])
        return shapes

    def _shape(self, node: Node, inputs: list[Shape]) -> Shape:
        try:
            found = {str(s): s for s in (o.shape(*inputs) for o in node.candidates().values())}
        except ValueError as error:
            raise ValueError(f"{node.name}: {error}") from None
        if len(found) != 1:
            raise ValueError(
                f"{node.name}: options must agree on their output's shape, got {list(found)}"
            )
        return next(iter(found.values()))

    def layers(self) -> Iterator[tuple[Node, Label, Layer]]:
        """(node, label of the option or "", weight tensor) of each weight tensor; full paths."""
        shapes = self.shapes()
        for node in self.nodes.values():
            inputs = [shapes[i] for i in node.inputs]
            for label, operation in node.candidates().items():
                for layer in operation.layers(*inputs):
                    yield node, label, replace(layer, path=weight_path(node, label, layer.path))

    def networkx(self) -> nx.DiGraph[str]:
        """The graph for networkx: nodes carry `node` and edges `position`."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_node(INPUT)
        for node in self.nodes.values():
            graph.add_node(node.name, node=node)
            graph.add_edges_from(
                (source, node.name, {"position": i}) for i, source in enumerate(node.inputs)
            )
        return graph


def weight_path(node: Node, label: Label, inner: str) -> str:
    """The state-dict key of a node's weight; a candidate of a choice adds its option's label."""
    place = node.name.replace("/", ".")
    return ".".join(str(p) for p in (place, label, inner) if p != "")


def _nested(inner: str, outer: str) -> bool:
    return inner.startswith(f"{outer}/")


def _of_operations(choice: Decision) -> bool:
    return isinstance(choice, Choice) and any(isinstance(o, Operation) for _, o in choice.options)


def _found(node: Node) -> Iterator[Decision]:
    if node.keep is not None:
        yield node.keep
    yield from find(node.operation, node.when)


def _exists(when: When | None, picks: Mapping[str, Pick], still_open: Collection[str]) -> bool:
    if when is None or when.choice in still_open:
        return True
    return when.choice in picks and when.holds(picks[when.choice])


def _settled(node: Node, picks: Mapping[str, Pick], passed: Mapping[str, str]) -> Node:
    """The node with its picks made; what feeds it is what is left of its inputs."""
    when = node.when if node.when is not None and node.when.choice not in picks else None
    inputs, keep, op = node.inputs, node.keep, node.operation
    if keep is not None and keep.name in picks:
        held: Any = picks[keep.name]
        inputs = tuple(i for i, x in zip(inputs, keep.items, strict=True) if x in held)
        keep = None
    label: Any = picks.get(op.name, "") if isinstance(op, Choice) else node.label
    inputs = tuple(passed[i] for i in inputs)
    return Node(node.name, settle(op, picks), inputs, when, keep, label)
