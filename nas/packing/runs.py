"""Runs: layers that follow each other directly, computed in one call where that is faster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from kernels import network
from nas.packing.layer import Kernel, Layer, Step
from nas.packing.tune import Choice, check_run, time_us


@dataclass(frozen=True)
class Run:
    """Layers computed by one call.

    Attributes:
        nodes: theirs, in order.
        kernel: the chain.
        us: its median time, microseconds.
        apart_us: that of the layers' own fastest kernels in turn, from the same rounds.
    """

    nodes: tuple[Node, ...]
    kernel: Kernel
    us: float
    apart_us: float


def find_runs(
    module: GraphModule, choices: Mapping[Node, Choice], example: tuple[Tensor, ...]
) -> list[Run]:
    """The runs of `module` that are faster in one call, as timed on what reaches them.

    The longest run is tried first; where it loses, the stretches of it whose layers all chose
    their sparse kernel are tried.
    """
    longest = [nodes for nodes in _stretches(choices) if len(nodes) > 1]
    inner = [part for nodes in longest for part in _sparse_parts(nodes, choices)]
    finder = _Finder(module, choices, [*longest, *inner])
    if longest:
        finder.run(*(tensor.clone() for tensor in example))
    return finder.runs


def _stretches(choices: Mapping[Node, Choice]) -> list[tuple[Node, ...]]:
    """The layers with a right sparse kernel, cut where one is not only the next one's source."""
    stretches: list[tuple[Node, ...]] = []
    for node in (node for node, choice in choices.items() if choice.sparse is not None):
        if stretches and _continues(stretches[-1][-1], node):
            stretches[-1] = (*stretches[-1], node)
        else:
            stretches.append((node,))
    return stretches


def _continues(before: Node, node: Node) -> bool:
    kinds = [part.target.operation for part in (before, node) if isinstance(part.target, Layer)]
    return list(before.users) == [node] and node.args[0] is before and kinds[0] == kinds[1]


def _sparse_parts(
    nodes: Iterable[Node], choices: Mapping[Node, Choice]
) -> Iterable[tuple[Node, ...]]:
    def chose_sparse(node: Node) -> bool:
        return choices[node].kernel is choices[node].sparse

    parts = [(sparse, tuple(part)) for sparse, part in groupby(nodes, chose_sparse)]
    return [part for sparse, part in parts if sparse and 1 < len(part)]


class _Finder(Interpreter):
    """Runs a graph and times each candidate on the very input that reaches it."""

    def __init__(
        self,
        module: GraphModule,
        choices: Mapping[Node, Choice],
        candidates: list[tuple[Node, ...]],
    ) -> None:
        super().__init__(module)
        self.choices = choices
        self.candidates = candidates
        self.runs: list[Run] = []

    def run_node(self, n: Node) -> Any:
        for nodes in self.candidates:
            taken = {node for run in self.runs for node in run.nodes}
            if nodes[0] is n and n not in taken:
                (x,), _ = self.fetch_args_kwargs_from_env(n)
                self.runs += _tried(nodes, self.choices, x)
        return super().run_node(n)


def _tried(nodes: tuple[Node, ...], choices: Mapping[Node, Choice], x: Tensor) -> list[Run]:
    steps = tuple(step for node in nodes for step in choices[node].kernel.steps)
    apart = Kernel("apart", steps)
    layers = [choices[node].layer for node in nodes]
    chain = _chain(layers, apart(x))
    if check_run(layers, x, chain(x)):
        return []
    apart_us, us = time_us([apart, chain], x)
    return [Run(nodes, chain, us, apart_us)] if us < apart_us else []


def _chain(layers: list[Layer], result: Tensor) -> Kernel:
    tail = list(result.shape[1:] if layers[0].conv else result.shape[-1:])
    program = network.chain([_link(layer) for layer in layers])
    return Kernel(
        "sparse_chain", (Step(torch.ops.sparse_nas.sparse_chain.default, (program, tail)),)
    )


def _link(layer: Layer) -> network.Layer:
    if layer.conv is None:
        return network.Layer(layer.packed, layer.bias, layer.activation)
    walk = (layer.conv.stride, layer.conv.padding, layer.conv.dilation)
    return network.Layer(layer.packed, layer.bias, layer.activation, *walk)
