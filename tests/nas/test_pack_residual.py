"""Sums with a shortcut go into the sparse product before them, and only where that is the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

import kernels
from nas.packing.residual import fuse_residuals
from tests.kernels import draws

aten, ops = torch.ops.aten, torch.ops.sparse_nas
DATA = kernels.pack_linear(draws.weight(0, (24, 24), 0.3, 1)).data
X = draws.numbers(1, 4, 24)
Make = Callable[[Graph, Node, Node], Node]


def product(graph: Graph, x: Node, data: Node, activation: str = "none") -> Node:
    return graph.call_function(ops.sparse_linear.default, (x, data, None, 24, activation))


def made(make: Make) -> GraphModule:
    """A graph of x and the packed weight; nodes hold what they give."""
    root = torch.nn.Module()
    root.register_buffer("data", DATA)
    graph = Graph()
    x, data = graph.placeholder("x"), graph.get_attr("data")
    graph.output(make(graph, x, data))
    module = GraphModule(root, graph)

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            n.meta["val"] = value
            return value

    Recorder(module).run(X.clone())
    return module


def targets(module: GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def block(graph: Graph, x: Node, data: Node) -> Node:
    inner = product(graph, x, data, "relu")
    total = graph.call_function(aten.add.Tensor, (product(graph, inner, data), x))
    return graph.call_function(aten.relu_.default, (total,))


def shortcut(graph: Graph, x: Node, data: Node) -> Node:
    first, second = product(graph, x, data), product(graph, x, data)
    return graph.call_function(aten.add_.Tensor, (first, second))


def dropped(graph: Graph, x: Node, data: Node) -> Node:
    y = graph.call_function(aten.dropout.default, (product(graph, x, data), 0.5, False))
    return graph.call_function(aten.add.Tensor, (x, y))


@pytest.mark.parametrize(("make", "left"), [(block, 2), (shortcut, 2), (dropped, 1)])
def test_a_sum_goes_into_its_product(make: Make, left: int) -> None:
    module = made(make)
    before: Tensor = module(X.clone())
    fuse_residuals(module)
    assert len(targets(module)) == left
    assert targets(module)[-1] is ops.sparse_linear.residual
    torch.testing.assert_close(module(X.clone()), before, rtol=1e-5, atol=1e-5)


def activated(graph: Graph, x: Node, data: Node) -> Node:
    return graph.call_function(aten.add.Tensor, (product(graph, x, data, "gelu"), x))


def read_twice(graph: Graph, x: Node, data: Node) -> Node:
    y = product(graph, x, data)
    total = graph.call_function(aten.add.Tensor, (y, x))
    return graph.call_function(aten.mul.Tensor, (total, y))


def broadcast(graph: Graph, x: Node, data: Node) -> Node:
    row = graph.call_function(aten.select.int, (x, 0, 0))
    return graph.call_function(aten.add.Tensor, (product(graph, x, data), row))


def into_the_shortcut(graph: Graph, x: Node, data: Node) -> Node:
    other = graph.call_function(aten.mul.Tensor, (x, x))
    return graph.call_function(aten.add_.Tensor, (other, product(graph, x, data)))


def scaled(graph: Graph, x: Node, data: Node) -> Node:
    return graph.call_function(aten.add.Tensor, (product(graph, x, data), x), {"alpha": 2})


def written_between(graph: Graph, x: Node, data: Node) -> Node:
    copied = graph.call_function(aten.clone.default, (x,))
    y = product(graph, copied, data)
    low = graph.call_function(aten.relu_.default, (copied,))
    return graph.call_function(aten.add.Tensor, (y, low))


def wider(graph: Graph, x: Node, data: Node) -> Node:
    wide = graph.call_function(aten._to_copy.default, (x,), {"dtype": torch.float64})
    return graph.call_function(aten.add.Tensor, (product(graph, x, data), wide))


@pytest.mark.parametrize(
    "make", [activated, written_between, wider, read_twice, broadcast, into_the_shortcut, scaled]
)
def test_what_is_not_the_same_stays(make: Make) -> None:
    module = made(make)
    before = targets(module)
    fuse_residuals(module)
    assert targets(module) == before
