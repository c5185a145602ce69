"""What a module does with its weights, seen while it runs once on an example."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nas.attention import slow_attention
from nas.space import Activations


@dataclass(frozen=True)
class Trace:
    """Shapes of a module's parameters, and what they are multiplied with.

    Args:
        shapes: Shape by name; tied parameters once.
        positions: Multiply-adds that each element of a weight takes part in, per sample, in the
            order of first use; exact where torch's counter knows the product.
        sizes: Elements of each leaf module's output, per sample, in order.
    """

    shapes: dict[str, tuple[int, ...]]
    positions: dict[str, int]
    sizes: tuple[int, ...]

    def activations(self, make: Callable[[], nn.Module], example: Tensor) -> Activations:
        """Of the exported graph; where export fails, of the leaf modules as a chain."""
        try:
            return _exported_activations(make().eval(), example)
        except Exception:  # control flow that depends on data, and whatever else export refuses
            return Activations(self.sizes, tuple(range(1, len(self.sizes) + 1)))


def trace(module: nn.Module, example: Tensor) -> Trace:
    """Run a module once in eval mode and note what its parameters are used for."""
    parameters = dict(module.named_parameters())
    names = {p.untyped_storage().data_ptr(): name for name, p in parameters.items()}
    products, batch = _Products(names), len(example)
    sizes = [example[0].numel()]
    with _leaf_outputs(module, sizes, batch), slow_attention(), torch.no_grad(), products:
        module(example)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    positions = {
        name: round(macs / parameters[name].numel() / batch)
        for name, macs in products.multiply_adds.items()
    }
    return Trace(shapes, positions, tuple(sizes))


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the multiply-adds of each product by the parameter that takes part."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.multiply_adds: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        used = {self._name(a) for a in args if isinstance(a, Tensor)} - {None}
        if count is not None:
            for name in used:
                macs = count(*args, **(kwargs or {}), out_val=out) // 2
                self.multiply_adds[str(name)] = self.multiply_adds.get(str(name), 0) + macs
        return out

    def _name(self, tensor: Tensor) -> str | None:
        return self.names.get(tensor.untyped_storage().data_ptr()) if tensor.ndim > 1 else None


@contextmanager
def _leaf_outputs(module: nn.Module, sizes: list[int], batch: int) -> Iterator[None]:
    def note(_: nn.Module, __: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            sizes.append(out.numel() // batch)

    leaves = [m for m in module.modules() if not list(m.children())]
    handles = [leaf.register_forward_hook(note) for leaf in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _exported_activations(module: nn.Module, example: Tensor) -> Activations:
    with torch.no_grad(), slow_attention():
        graph = torch.export.export(module, (example,), strict=False).graph
    weights = {n for n in graph.nodes if n.op == "placeholder"} - {_user_input(graph)}
    nodes = [n for n in graph.nodes if n not in weights and n.op != "output"]
    order = {node: i for i, node in enumerate(nodes)}
    sizes, last = [], []
    for node in nodes:
        value = node.meta.get("val")
        fresh = isinstance(value, Tensor) and not _is_view(node)
        sizes.append(value.numel() // len(example) if fresh else 0)
        last.append(_last_use(node, order))
    return Activations(tuple(sizes), tuple(last))


def _user_input(graph: Any) -> Any:
    return [n for n in graph.nodes if n.op == "placeholder"][-1]


def _is_view(node: Any) -> bool:
    return bool(getattr(node.target, "is_view", False))


def _last_use(node: Any, order: dict[Any, int]) -> int:
    """The last node that reads a node's memory, through views of it too."""
    last = order[node]
    for user in node.users:
        if user.op == "output":
            return len(order)
        last = max(last, _last_use(user, order) if _is_view(user) else order[user])
    return last
