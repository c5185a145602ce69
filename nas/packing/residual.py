"""Sums with a shortcut taken into the sparse product before them: fewer passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from nas.packing.layer import aten

ops = torch.ops.sparse_nas
_PRODUCTS: dict[Any, Any] = {
    ops.sparse_linear.default: ops.sparse_linear.residual,
    ops.sparse_conv2d.default: ops.sparse_conv2d.residual,
}
_ADDS = {aten.add.Tensor, aten.add_.Tensor}
_RELUS = {aten.relu.default, aten.relu_.default}


def fuse_residuals(module: GraphModule) -> None:
    """Let sparse products add what follows them, and a ReLU behind that, in place.

    Args:
        module: lowered; its nodes hold what they give (`meta["val"]`), as `torch.export` found it.
    """
    for node in list(module.graph.nodes):
        if node.target is aten.dropout.default and node.args[2] is False:  # gives its input
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if node.target in _ADDS:
            _fuse(module, node)
    module.graph.lint()
    module.recompile()


def _fuse(module: GraphModule, total: Node) -> None:
    if len(total.all_input_nodes) != 2 or total.kwargs:
        return
    one, two = (part for part in total.args if isinstance(part, Node))
    pairs = [(one, two)] if total.target is aten.add_.Tensor else [(two, one), (one, two)]
    found = next((pair for pair in pairs if _adds(*pair, total)), None)
    if found is None:
        return
    product, residual = found
    last, activation = total, "none"
    users = list(total.users)
    if len(users) == 1 and users[0].target in _RELUS:
        last, activation = users[0], "relu"
    x, data, bias, *walk = product.args
    with module.graph.inserting_before(total):
        operator = _PRODUCTS[product.target]
        fused = module.graph.call_function(
            operator, (x, data, bias, residual, *walk[:-1], activation)
        )
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    for done in dict.fromkeys((last, total, product)):
        module.graph.erase_node(done)


def _adds(product: Any, residual: Any, total: Node) -> bool:
    """Whether `product` is sparse, has no activation, and is read by this sum alone."""
    if product.target not in _PRODUCTS or product.args[-1] != "none":
        return False
    values = [node.meta["val"] for node in (product, residual) if "val" in node.meta]
    kinds = [(str(value.shape), value.dtype) for value in values]
    alike = len(kinds) == 2 and kinds[0] == kinds[1]
    return list(product.users) == [total] and alike and not _written_to(product, total)


def _written_to(product: Node, total: Node) -> bool:
    """Whether anything is written in place between them: `product` moves to where `total` is."""
    node = product.next
    while node is not total:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return True
        node = node.next
    return False
