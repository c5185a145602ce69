"""The memory layout of a network that runs its convolutions densely."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.fx import GraphModule

from nas.latency import interleaved
from nas.packing.straight import straight

SECONDS = 0.1
ROUNDS = 9


def fastest_layout(body: GraphModule, example: tuple[Tensor, ...]) -> tuple[GraphModule, str]:
    """`body`, or a copy with its convolutions channels-last, whichever is faster on `example`.

    A dense network is only a fair twin in the layout that suits it. Sparse kernels read and
    write contiguous NCHW, and every change of layout costs, so with one of them nothing is tried.

    Returns:
        The faster one, and `contiguous` or `channels_last`.
    """
    if not _dense_weights(body):
        return body, "contiguous"
    other = channels_last(copy.deepcopy(body))
    inputs = tuple(tensor.clone() for tensor in example)
    one, two = straight(body), straight(other)
    try:
        times = interleaved([lambda: one(*inputs), lambda: two(*inputs)], SECONDS, ROUNDS)
    except RuntimeError:  # a `view` that holds for contiguous tensors only
        return body, "contiguous"
    return (other, "channels_last") if times[1] < times[0] else (body, "contiguous")


def _dense_weights(body: GraphModule) -> list[str]:
    """The names of the weights of all convolutions, or none where one of them is sparse."""
    called = [node for node in body.graph.nodes if node.op == "call_function"]
    sparse = {
        torch.ops.sparse_nas.sparse_conv2d.default,
        torch.ops.sparse_nas.sparse_chain.default,
    }
    if any(node.target in sparse for node in called):
        return []
    dense = [node for node in called if node.target is torch.ops.aten.conv2d.default]
    return [str(node.args[1].target) for node in dense]


def channels_last(body: GraphModule) -> GraphModule:
    """Lay the weights of `body`'s dense convolutions out channels-last, in place."""
    for name in _dense_weights(body):
        weight = body.get_buffer(name).contiguous(memory_format=torch.channels_last)
        body.register_buffer(name, weight)
    return body
