"""From a graph of layers and the kernels chosen for them to the module that runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from nas.packing import constants
from nas.packing.layer import Kernel


@dataclass(frozen=True)
class Placement:
    """A kernel and the consecutive nodes that it computes; only the last one's value is read.

    Attributes:
        nodes: one layer's node, or a run's.
        source: the one value that they read.
        kernel: maps that value to the output of the last node.
    """

    nodes: tuple[Node, ...]
    source: Node
    kernel: Kernel


def lower(module: nn.Module, given: Graph, placements: list[Placement]) -> GraphModule:
    """A new module: layer nodes are calls of their kernels, constants plain buffers.

    Args:
        module: holds the constants that the graph reads.
        given: the graph.
        placements: what computes each layer of it.
    """
    starts = {placement.nodes[0]: placement for placement in placements}
    inside = {node for placement in placements for node in placement.nodes[1:]}
    root, graph = nn.Module(), Graph()
    env: dict[Node, Node] = {}
    for node in given.nodes:
        if node in starts:
            place = starts[node]
            last = place.nodes[-1]
            env[last] = _call(root, graph, place.kernel, env[place.source])
            env[last].meta = dict(last.meta)
        elif node.op == "get_attr":
            held = constants.held(module, node)
            env[node] = _constant(root, graph, held, str(node.target).replace(".", "_"))
        elif node not in inside:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.eliminate_dead_code()
    return GraphModule(root, graph)


def _call(root: nn.Module, graph: Graph, kernel: Kernel, x: Node) -> Node:
    for step in kernel.steps:
        args = [
            _constant(root, graph, arg, "tensor") if isinstance(arg, Tensor) else arg
            for arg in step.args
        ]
        x = graph.call_function(step.target, (x, *args))
    return x


def _constant(root: nn.Module, graph: Graph, held: Any, stem: str) -> Node:
    """Read `held` under a flat name, which is quick to look up; one name for one thing."""
    names = chain((stem,), (f"{stem}_{number}" for number in count()))
    name = next(name for name in names if getattr(root, name, held) is held)
    if isinstance(held, Tensor):
        root.register_buffer(name, held)
    else:
        setattr(root, name, held)
    return graph.get_attr(name)
