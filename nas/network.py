"""From a graph to a module: a plain network where nothing is open, a supernet where something is.

A supernet mixes operations on their outputs, and what shares a tensor (sparsity, width) on the
weight: one convolution, whatever the number of options. It is built from the graph as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nas.choices import Choice, Decision, When
from nas.expected import Expected
from nas.graph import INPUT, Graph, Node, weight_path
from nas.inside import find
from nas.masks import Mixture, Plan, attach_all, mask_by_magnitude
from nas.modules import Zero
from nas.operations import (
    Activation,
    BatchNorm,
    GlobalAveragePool,
    Identity,
    Operation,
    Pool,
    Sum,
)

CHANNELWISE = (Activation, BatchNorm, GlobalAveragePool, Identity, Pool, Sum)


class Network(nn.Module):
    """The module of a graph; with choices left open, the supernet.

    Args:
        graph: A settled graph.
        still_open: The choices that it leaves open.
        masked: Whether weights get the masks of their sparsity; without, it is the dense twin.

    Attributes:
        mixture: Weights of every open choice, uniform until set. A subset is summed without
            weights until `mixture.add(name, items)` gives it some.
        expected_cost: `expected_cost(mixture, "flops")`, or "nonzeros"; gradients flow through.
    """

    def __init__(
        self, graph: Graph, still_open: Iterable[Decision] = (), masked: bool = True
    ) -> None:
        super().__init__()
        self.mixture, shapes, widths = Mixture(), graph.shapes(), _open_widths(graph)
        self._open = {c.name: c for c in still_open if isinstance(c, Choice)}
        for name, choice in self._open.items():
            self.mixture.add(name, len(choice.open_labels))
        self.expected_cost = Expected(graph, self._open)
        _check_mixed(graph, self._open)
        self._steps = [self._step(node, shapes, widths) for node in graph.nodes.values()]
        self._output = graph.output
        if masked:
            self._attach_masks(graph)

    def forward(self, x: Tensor) -> Tensor:
        """(N, *input_shape) to the output of the graph's last node."""
        values = {INPUT: x}
        for step in self._steps:
            values[step.node.name] = step([values[i] for i in step.node.inputs], self.mixture)
        return values[self._output]

    def _step(self, node: Node, shapes: Mapping[str, Any], widths: Mapping[str, Choice]) -> _Step:
        inputs, when = [shapes[i] for i in node.inputs], node.when
        built = [self._place(node, x, op, inputs) for x, op in node.candidates().items()]
        maybe = self._open.get(when.choice) if when is not None else None
        if maybe is not None and shapes[node.name] != inputs[0]:
            raise ValueError(
                f"{node.name}: what may be absent in a supernet keeps its input's one shape, "
                f"got {inputs[0]} and {shapes[node.name]}"
            )
        width = widths.get(node.name) if _fills_channels(node) else None
        return _Step(node, built, width, _indices(maybe, when))

    def _place(self, node: Node, label: Any, op: Operation, inputs: Sequence[Any]) -> nn.Module:
        """Build a candidate and hold it where its weights' names say."""
        *folders, last = weight_path(node, label, "").split(".")
        parent: nn.Module = self
        for folder in folders:
            if not hasattr(parent, folder):
                parent.add_module(folder, nn.Module())
            parent = parent.get_submodule(folder)
        parent.add_module(last, op.module(*inputs))
        return parent.get_submodule(last)

    def _attach_masks(self, graph: Graph) -> None:
        plan: dict[str, Plan] = {}
        for _, _, layer in graph.layers():
            if isinstance(layer.sparsity, Choice):
                options = [value for _, value in layer.sparsity.options]
                plan[layer.path] = (options, layer.sparsity.name)
            elif layer.sparsity.ratio > 0:
                plan[layer.path] = ([layer.sparsity], None)
        attach_all(self, plan, self.mixture)


@dataclass
class _Step:
    """One node at work: its candidates on its inputs, mixed where something is open.

    `width` is the open choice of its channels: those beyond an option are masked for it.
    `present` are the options under which the node exists.
    """

    node: Node
    modules: list[nn.Module]
    width: Choice | None = None
    present: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.masks = None if self.width is None else _width_masks(self.width)

    def __call__(self, xs: list[Tensor], mixture: Mixture) -> Tensor:
        keep, when = self.node.keep, self.node.when
        if keep is not None and keep.name in mixture.names():
            xs = [w * x for w, x in zip(mixture[keep.name], xs, strict=True)]
        y = self._mixed(xs, mixture)
        if self.width is not None and self.masks is not None:
            factor = mixture[self.width.name].to(y) @ self.masks.to(y)
            y = y * factor.reshape(-1, *[1] * (y.ndim - 2))
        if self.present and when is not None:
            y = torch.lerp(xs[0], y, mixture[when.choice][self.present].sum().to(y))
        return y

    def _mixed(self, xs: list[Tensor], mixture: Mixture) -> Tensor:
        choice = self.node.operation
        if not isinstance(choice, Choice):
            return self.modules[0](*xs)
        weighted = zip(mixture[choice.name], self.modules, strict=True)
        first, *rest = [w.to(xs[0]) * m(*xs) for w, m in weighted if not isinstance(m, Zero)]
        return sum(rest, first)


def _width_masks(width: Choice) -> Tensor:
    """(options, widest): 1 where a channel lies within an option."""
    sizes = torch.tensor(width.open_labels)[:, None]
    return (torch.arange(int(sizes.max()))[None] < sizes).float()


def _open_widths(graph: Graph) -> dict[str, Choice]:
    """The open choice of a node's channels, where there is one, by the node's name."""
    found: dict[str, Choice] = {}
    for node in graph.nodes.values():
        out, before = getattr(node.operation, "out", None), [found.get(i) for i in node.inputs]
        if isinstance(out, Choice):
            found[node.name] = out
        elif isinstance(node.operation, CHANNELWISE) and before[0] and len({*before}) == 1:
            found[node.name] = before[0]
    return found


def _fills_channels(node: Node) -> bool:
    """Whether channels beyond a width, zero at its input, are not at its output."""
    return hasattr(node.operation, "out") or isinstance(node.operation, BatchNorm)


def _check_mixed(graph: Graph, still_open: Mapping[str, Choice]) -> None:
    """Raise ValueError for an open choice that no mixture would reach."""
    sparsities = {getattr(layer.sparsity, "name", "") for _, _, layer in graph.layers()}
    for node in graph.nodes.values():
        width = getattr(node.operation, "out", None)
        own = {getattr(choice, "name", "") for choice in (node.operation, width)}
        rest = [c.name for c in find(node.operation) if c.name not in own | sparsities]
        lost = [name for name in rest if name in still_open]
        if lost:
            raise ValueError(
                f"{node.name}: a supernet mixes operations, sparsities and the width of a node's "
                f"own operation, not {lost[0]}: pick it"
            )


def _indices(choice: Choice | None, when: When | None) -> list[int]:
    if choice is None or when is None:
        return []
    return [choice.open_labels.index(x) for x in when.among]


@torch.no_grad()
def inherit(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a module the weights of a larger one, by key: leading slices, kernels cropped.

    Masks are then those of the magnitudes. Batch-norm statistics come along; recalibrate them.

    Args:
        module: Any module; its keys are those of `nas.masks.training_state`.
        state: Weights of a supernet, or of a wider architecture.

    Raises:
        ValueError: A key that is missing, or a tensor too small to be sliced.
    """
    held = [*module.named_buffers(), *module.named_parameters()]
    targets = {_plain(path): value for path, value in held if _plain(path)}
    fits = {name: _slice(name, target, state) for name, target in targets.items()}
    for name, value in fits.items():
        targets[name].copy_(value)
    mask_by_magnitude(module)


def _plain(path: str) -> str:
    """The user's own key for a parameter's path; empty for what belongs to a mask."""
    if "parametrizations." not in path:
        return path
    owner, _, rest = path.partition("parametrizations.")
    name, _, kind = rest.partition(".")
    return owner + name if kind == "original" else ""


def _slice(name: str, target: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    if name not in state:
        raise ValueError(f"{name}: not among the weights to inherit")
    value = state[name]
    fits = value.ndim == target.ndim and all(
        a >= b for a, b in zip(value.shape, target.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name}: cannot cut shape {tuple(target.shape)} out of {tuple(value.shape)}"
        )
    for dim, size in enumerate(target.shape):
        start = (value.shape[dim] - size) // 2 if dim >= 2 else 0
        value = value.narrow(dim, start, size)
    return value
