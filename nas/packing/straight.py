"""A traced graph as one plain Python function, its operators and constants bound beforehand.

A graph module looks each constant up through `nn.Module.__getattr__` and each operator through
`torch.ops` at every call, some microseconds an operator: as much as a small kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import inf, nan
from typing import Any

import torch
from torch.fx import GraphModule, Node

from kernels.calls import DIRECT
from nas.packing import constants


def straight(body: GraphModule, direct: bool = False) -> Callable[..., Any]:
    """A function of the graph's inputs that gives what `body.forward` gives.

    It reads the very tensors of `body`; replacing one by another object is not seen. If `direct`,
    sparse operators are called without torch's dispatcher: for plain CPU tensors, see `plain`.
    """
    bound: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": inf, "nan": nan}
    inputs = ", ".join(node.name for node in body.graph.nodes if node.op == "placeholder")
    lines = "\n    ".join(_lines(body, bound, DIRECT if direct else {}))
    exec(f"def packed({inputs}):\n    {lines}", bound)
    return bound["packed"]


def plain() -> bool:
    """Whether nobody listens to operators: no mode, no transform, no profiler."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or torch.autograd.profiler._is_profiler_enabled
    )


def _lines(
    body: GraphModule, bound: dict[str, Any], instead: Mapping[object, Callable[..., Any]]
) -> Iterator[str]:
    last = _last_readers(body)
    for node in body.graph.nodes:
        if node.op == "get_attr":
            bound[node.name] = constants.held(body, node)
        elif node.op == "call_function":
            bound[f"{node.name}_call"] = instead.get(node.target, node.target)
            named = [f"{key}={value!r}" for key, value in node.kwargs.items()]
            arguments = ", ".join([*map(repr, node.args), *named])
            yield f"{node.name} = {node.name}_call({arguments})"
            if dead := last.get(node):
                yield f"{' = '.join(dead)} = None"
        elif node.op == "output":
            yield f"return {node.args[0]!r}"


def _last_readers(body: GraphModule) -> dict[Node, list[str]]:
    """For each node the values that nobody reads after it, so that their memory goes early."""
    last: dict[Node, Node] = {}
    for node in body.graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    dead: dict[Node, list[str]] = {}
    for source, reader in last.items():
        if source.op != "get_attr":
            dead.setdefault(reader, []).append(source.name)
    return dead
