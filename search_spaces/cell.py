"""The cell space of DARTS (Liu et al. 1806.09055), every convolution with a searchable sparsity.

A network stacks normal cells, and reduction cells at a third and two thirds of its depth; all
cells of a kind share their choices. In a cell, states 0 and 1 are the two cells before it, and
each node 2, 3, ... adds up two edges from states before it. An edge is one of eight operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx

from nas.choices import Choice, Pick, Subset, When
from nas.graph import INPUT, Graph
from nas.operations import (
    Activation,
    BatchNorm,
    Concat,
    FactorizedReduce,
    GlobalAveragePool,
    Identity,
    Operation,
    Pool,
    SparseConv2d,
    SparseLinear,
    Sum,
    Zero,
)
from nas.operations import Sequence as Chain
from nas.space import GraphSpace, Origin
from nas.sparsity import parse

KINDS = ("cell_normal", "cell_reduction")
CONVOLUTIONS = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5")


class CellSpace(GraphSpace):
    """A graph space that can show its cells on their own.

    Attributes:
        nodes: Intermediate nodes of a cell.
        places: Numbers of the cells of each kind.
    """

    nodes: int = 4
    places: Mapping[str, list[int]]

    def cells(self, picks: Mapping[str, Pick]) -> dict[str, nx.DiGraph[str]]:
        """The normal and the reduction cell; edges carry `label`, `sparsity` and `path`.

        `path` names the edge's nodes in all cells of the kind.
        """
        return {
            kind: _drawn_cell(kind, self.nodes, picks, places)
            for kind, places in self.places.items()
            if places
        }


def cell(
    input_shape: Sequence[int],
    outputs: int,
    cells: int = 8,
    channels: int = 16,
    nodes: int = 4,
    sparsities: Sequence[str] = ("dense", "0.5", "0.8", "0.9"),
) -> CellSpace:
    """The network of DARTS for images, without auxiliary head.

    Args:
        input_shape: (C, H, W) of one sample.
        outputs: Classes.
        cells: How many; two of them reduce where there are at least three.
        channels: C of the first cells; doubled by each reduction.
        nodes: Intermediate nodes of a cell.
        sparsities: Labels of the sparsities of each convolution.

    Raises:
        ValueError: No image, fewer than one cell, channel or node, or a sparsity that a
            convolution does not admit.
    """
    if len(input_shape) != 3 or min(cells, channels, nodes) < 1:
        raise ValueError(
            f"cell: needs inputs (C, H, W), cells, channels and nodes of at least 1, "
            f"got {tuple(input_shape)}, {cells}, {channels} and {nodes}"
        )
    build = _Builder(input_shape, channels, nodes, sparsities)
    space = build.space(outputs, cells)
    arguments = {
        "input_shape": list(input_shape),
        "outputs": outputs,
        "cells": cells,
        "channels": channels,
        "nodes": nodes,
        "sparsities": list(sparsities),
    }
    made = CellSpace(space, origin=Origin("search_spaces.cell:cell", arguments))
    made.nodes, made.places = nodes, build.places
    return made


class _Builder:
    """The graph as it grows, cell by cell."""

    def __init__(
        self, input_shape: Sequence[int], channels: int, nodes: int, sparsities: Sequence[str]
    ) -> None:
        self.graph, self.channels, self.nodes = Graph(input_shape), channels, nodes
        self.levels = [parse(label) for label in sparsities]
        self.places: dict[str, list[int]] = {kind: [] for kind in KINDS}

    def sparsity(self, place: str) -> Choice:
        return Choice(f"{place}/sparsity", self.levels)

    def space(self, outputs: int, cells: int) -> Graph:
        stem = [
            ("conv", SparseConv2d(3 * self.channels, 3, sparsity=self.sparsity("stem"))),
            ("norm", BatchNorm()),
        ]
        before = last = self.graph.add("stem", Chain(tuple(stem)), INPUT)
        reductions = {cells // 3, 2 * cells // 3} if cells >= 3 else set()
        width, reduced = self.channels, False
        for i in range(cells):
            reduce = i in reductions
            width = width * 2 if reduce else width
            before, last = last, self.cell(i, before, last, width, reduce, reduced)
            reduced = reduce
        pooled = self.graph.add("pool", GlobalAveragePool(), last)
        self.graph.add("classifier", SparseLinear(outputs), pooled)
        return self.graph

    def cell(self, i: int, before: str, last: str, width: int, reduce: bool, reduced: bool) -> str:
        kind = KINDS[reduce]
        self.places[kind].append(i)
        states = [
            self.preprocess(i, kind, 0, before, width, halve=reduced),
            self.preprocess(i, kind, 1, last, width, halve=False),
        ]
        for node in range(2, self.nodes + 2):
            states.append(self.node(i, kind, node, states, width, reduce))
        return self.graph.add(f"cells/{i}/out", Concat(), *states[2:])

    def preprocess(
        self, i: int, kind: str, state: int, source: str, width: int, halve: bool
    ) -> str:
        sparsity = self.sparsity(f"{kind}/pre{state}")
        operation = FactorizedReduce(width, sparsity) if halve else _relu_conv_bn(width, sparsity)
        return self.graph.add(f"cells/{i}/pre{state}", operation, source)

    def node(
        self, i: int, kind: str, node: int, states: list[str], width: int, reduce: bool
    ) -> str:
        keep = Subset(f"{kind}/{node}/inputs", tuple(range(node)), 2)
        edges = []
        for j, source in enumerate(states):
            stride = 2 if reduce and j < 2 else 1
            operation = self.edge(f"{kind}/{j}-{node}", width, stride)
            when = When(keep.name, (j,))
            edges.append(self.graph.add(f"cells/{i}/{j}-{node}", operation, source, when=when))
        return self.graph.add(f"cells/{i}/{node}", Sum(), *edges, keep=keep)

    def edge(self, place: str, width: int, stride: int) -> Choice:
        sparsity = self.sparsity(place)
        skip = Identity() if stride == 1 else FactorizedReduce(width, sparsity)
        options: dict[str, Operation] = {
            "none": Zero(stride),
            "max_pool_3x3": _pool("max", stride),
            "avg_pool_3x3": _pool("average", stride),
            "skip_connect": skip,
            "sep_conv_3x3": _separable(width, 3, stride, sparsity),
            "sep_conv_5x5": _separable(width, 5, stride, sparsity),
            "dil_conv_3x3": _dilated(width, 3, stride, sparsity),
            "dil_conv_5x5": _dilated(width, 5, stride, sparsity),
        }
        return Choice(f"{place}/op", options, open_only=("none",))


def _relu_conv_bn(width: int, sparsity: Choice) -> Chain:
    conv = SparseConv2d(width, 1, sparsity=sparsity)
    return Chain((("relu", Activation()), ("conv", conv), ("norm", BatchNorm())))


def _pool(kind: str, stride: int) -> Chain:
    return Chain((("pool", Pool(kind, 3, stride, 1)), ("norm", BatchNorm(affine=False))))


def _dilated(width: int, kernel: int, stride: int, sparsity: Choice, dilation: int = 2) -> Chain:
    depth = SparseConv2d(
        width, kernel, stride, dilation=dilation, depthwise=True, sparsity=sparsity
    )
    point = SparseConv2d(width, 1, sparsity=sparsity)
    parts = (("relu", Activation()), ("depth", depth), ("point", point), ("norm", BatchNorm()))
    return Chain(parts)


def _separable(width: int, kernel: int, stride: int, sparsity: Choice) -> Chain:
    first = _dilated(width, kernel, stride, sparsity, dilation=1)
    return Chain((("first", first), ("second", _dilated(width, kernel, 1, sparsity, dilation=1))))


def _drawn_cell(
    kind: str, nodes: int, picks: Mapping[str, Pick], places: Sequence[int]
) -> nx.DiGraph[str]:
    names = {0: "c_{k-2}", 1: "c_{k-1}"} | {i: str(i - 2) for i in range(2, nodes + 2)}
    drawn: nx.DiGraph[str] = nx.DiGraph()
    drawn.add_nodes_from([*names.values(), "c_{k}"])
    for node in range(2, nodes + 2):
        held: Any = picks.get(f"{kind}/{node}/inputs", list(range(node)))
        for j in held:
            place = f"{kind}/{j}-{node}"
            label, sparsity = (picks.get(f"{place}/{x}") for x in ("op", "sparsity"))
            path = tuple(f"cells/{i}/{j}-{node}" for i in places)
            drawn.add_edge(names[j], names[node], label=label, sparsity=sparsity, path=path)
        drawn.add_edge(names[node], "c_{k}", label="", sparsity=None, path="")
    return drawn
