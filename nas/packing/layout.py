"""The memory layout of what runs densely: of single poolings, or of a network's convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from nas.latency import interleaved
from nas.packing import devices
from nas.packing.straight import straight

aten = torch.ops.aten
SECONDS = 0.1
POOL_SECONDS = 0.006
ROUNDS = 9
_POOLS = {
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
}


def fastest_layout(body: GraphModule, example: tuple[Tensor, ...]) -> tuple[GraphModule, str]:
    """`body` in the layout that is fastest on `example`.

    Poolings are turned channels-last one by one where that pays, which it often does tenfold.
    Where every convolution is dense the network as a whole is tried channels-last too: a dense
    network is only a fair twin in the layout that suits it. Sparse kernels read and write
    contiguous NCHW. On a GPU convolutions are channels-last, sparse or dense.

    Returns:
        The fastest network, and its layout, `contiguous` or `channels_last`.
    """
    if devices.of(example[0]).channels_last:
        return body, "channels_last" if _dense_weights(body) else "contiguous"
    some = _dense_weights(body) and not _has_sparse_convolutions(body)
    whole = channels_last(copy.deepcopy(body)) if some else None
    body = _with_fast_pools(body, example)
    if whole is None:
        return body, "contiguous"
    inputs = tuple(tensor.clone() for tensor in example)
    one, two = straight(body), straight(whole)
    try:
        times = interleaved([lambda: one(*inputs), lambda: two(*inputs)], SECONDS, ROUNDS)
    except RuntimeError:  # a `view` that holds for contiguous tensors only
        return body, "contiguous"
    return (whole, "channels_last") if times[1] < times[0] else (body, "contiguous")


def channels_last(body: GraphModule) -> GraphModule:
    """Lay the weights of `body`'s dense convolutions out channels-last, in place."""
    for name in _dense_weights(body):
        weight = body.get_buffer(name).contiguous(memory_format=torch.channels_last)
        body.register_buffer(name, weight)
    return body


def _dense_weights(body: GraphModule) -> list[str]:
    """The names of the weights of all dense convolutions."""
    dense = [node for node in body.graph.nodes if node.target is aten.conv2d.default]
    return [str(node.args[1].target) for node in dense if node.args[1].op == "get_attr"]


def _has_sparse_convolutions(body: GraphModule) -> bool:
    ops = torch.ops.sparse_nas
    sparse = {ops.sparse_conv2d.default, ops.sparse_chain.default}
    return any(node.target in sparse for node in body.graph.nodes)


class _Pools(Interpreter):
    """Runs a graph and finds the poolings that are faster channels-last, both copies included."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.faster: list[Node] = []

    def run_node(self, n: Node) -> Any:
        if n.target in _POOLS:
            (x, *rest), options = self.fetch_args_kwargs_from_env(n)
            if x.dim() == 4 and _turning_pays(partial(_pool, n.target, rest, options), x):
                self.faster.append(n)
        return super().run_node(n)


def _pool(target: Any, rest: list[Any], options: dict[str, Any], x: Tensor) -> Tensor:
    return target(x, *rest, **options)


def _turning_pays(pool: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    def turned() -> Tensor:
        return pool(x.contiguous(memory_format=torch.channels_last)).contiguous()

    as_it_is, around = interleaved([lambda: pool(x), turned], POOL_SECONDS, ROUNDS)
    return around < as_it_is


def _with_fast_pools(body: GraphModule, example: tuple[Tensor, ...]) -> GraphModule:
    finder = _Pools(body)
    if any(node.target in _POOLS for node in body.graph.nodes):
        finder.run(*(tensor.clone() for tensor in example))
    for node in finder.faster:
        _turn(body.graph, node)
    body.recompile()
    return body


def _turn(graph: Graph, node: Node) -> None:
    with graph.inserting_before(node):
        layout: dict[str, Any] = {"memory_format": torch.channels_last}
        turned = graph.call_function(aten.contiguous.default, (node.args[0],), layout)
    with graph.inserting_after(node):
        back = graph.call_function(aten.contiguous.default, (node,))
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    node.args = (turned, *node.args[1:])
