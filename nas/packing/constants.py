"""The constants of a traced graph: reading them, and folding what depends on nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, map_arg

_WRITTEN = "written"


def held(root: nn.Module, node: Node) -> Any:
    """What the `get_attr` node stands for."""
    found: Any = root
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def value(root: nn.Module, node: Any) -> Any:
    """The tensor that `node` reads, or None where it is none or the graph writes into it."""
    if not isinstance(node, Node) or node.op != "get_attr" or node.meta.get(_WRITTEN):
        return None
    return held(root, node)


def fold(module: GraphModule) -> None:
    """Compute once what depends on parameters and buffers alone.

    Weights that a forward computes from others (halves of `in_proj_weight`, a scaled or a
    transposed weight) thereby become plain tensors that a layer can be packed from.
    """
    known: dict[Node, Any] = {}
    _mark_written(module.graph)
    for node in module.graph.nodes:
        tensor = value(module, node)
        if isinstance(tensor, Tensor):
            known[node] = tensor
        elif _is_foldable(node, known):
            known[node] = _compute(node, known)
    _materialise(module, known)


def _origin(node: Node) -> Node:
    """Follow first arguments up to the node whose memory `node` may share."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def mutates(node: Node) -> bool:
    """Whether `node` writes into its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _mark_written(graph: Graph) -> None:
    written = {_origin(node).target for node in graph.nodes if mutates(node)}
    for node in graph.nodes:
        node.meta[_WRITTEN] = node.op == "get_attr" and node.target in written


def _is_foldable(node: Node, known: dict[Node, Any]) -> bool:
    inputs = node.all_input_nodes
    if node.op != "call_function" or not inputs or mutates(node):
        return False
    drawn = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    return not drawn and all(part in known for part in inputs)


def _compute(node: Node, known: dict[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _materialise(module: GraphModule, known: dict[Node, Any]) -> None:
    for node in [node for node in known if node.op == "call_function"]:
        if isinstance(known[node], Tensor) and any(user not in known for user in node.users):
            name = f"folded_{len(module._buffers)}"
            module.register_buffer(name, known[node])
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
    module.graph.eliminate_dead_code()
