"""What a supernet is expected to cost under its mixture weights: exact, and differentiable.

Choices count as independent, so that the expectation of a product of widths and densities is
the product of expectations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from nas.choices import Choice, When
from nas.graph import INPUT, Graph
from nas.masks import Mixture
from nas.operations import Layer, Operation, Shape

Key = tuple[When | None, tuple[str, int] | None, str, tuple[float, ...]]
Sizes = dict[Key, Any]


@dataclass(frozen=True)
class Expected:
    """The expected cost of a graph with open choices.

    Args:
        graph: A settled graph.
        choices: Its open choices, by name.
    """

    graph: Graph
    choices: dict[str, Choice]
    known: dict[str, Sizes] = field(default_factory=dict)

    def __call__(self, mixture: Mixture, cost: str) -> Tensor:
        """Expected `nonzeros` or `flops`, a scalar that gradients flow through."""
        sizes = self.known.get(cost) or self._sizes(mixture, cost)
        if not any(isinstance(size, Tensor) for size in sizes.values()):
            self.known[cost] = sizes  # no width is open: only the shares change
        return _weighed(sizes, mixture, self.choices)

    def _sizes(self, mixture: Mixture, cost: str) -> Sizes:
        sizes: Sizes = {}
        shapes: dict[str, Shape] = {INPUT: self.graph.input_shape}
        for node in self.graph.nodes.values():
            inputs = [shapes[i] for i in node.inputs]
            when = node.when if node.when and node.when.choice in self.choices else None
            shape: Any = None
            for k, operation in enumerate(node.candidates().values()):
                pick = (node.operation.name, k) if isinstance(node.operation, Choice) else None
                mean = _mean(operation, mixture)
                _add(sizes, mean.layers(*inputs), cost, when, pick)
                shape = mean.shape(*inputs)
            here = _presence(when, mixture, self.choices)
            shapes[node.name] = _blend(shape, inputs[0], here)
        return sizes


def expected(layers: Iterable[Layer], mixture: Mixture, cost: str) -> Tensor:
    """The expected cost of weight tensors whose sparsity may be open."""
    sizes: Sizes = {}
    _add(sizes, layers, cost)
    return _weighed(sizes, mixture, {})


def _add(
    sizes: Sizes,
    layers: Iterable[Layer],
    cost: str,
    when: When | None = None,
    pick: tuple[str, int] | None = None,
) -> None:
    """Add the sizes of weight tensors under what they are to be multiplied with."""
    if cost not in ("nonzeros", "flops"):
        raise ValueError(f"expected cost: one of nonzeros and flops, got {cost!r}")
    for layer in layers:
        sparsity, open_ = layer.sparsity, isinstance(layer.sparsity, Choice)
        each: Any = prod(layer.shape) * (layer.positions if cost == "flops" else 1)
        ratios = tuple(o.ratio for _, o in sparsity.options) if open_ else (sparsity.ratio,)
        key = (when, pick, sparsity.name if open_ else "", ratios)
        sizes[key] = sizes.get(key, 0.0) + each


def _weighed(sizes: Sizes, mixture: Mixture, choices: Mapping[str, Choice]) -> Tensor:
    """The sum over sizes times the shares that they are weighed with, each share once."""
    whole = {
        name: mixture[name].to("cpu", torch.float32)
        for name in {k[2] for k in sizes} | {k[1][0] for k in sizes if k[1]}
        if name
    }
    shares = {name: weights.unbind() for name, weights in whole.items()}
    densities: dict[tuple[str, tuple[float, ...]], Any] = {}
    total: Any = torch.zeros(())
    for (when, pick, name, ratios), size in sizes.items():
        if (name, ratios) not in densities:
            kept = 1 - torch.tensor(ratios)
            densities[name, ratios] = whole[name] @ kept if name else kept[0]
        share = shares[pick[0]][pick[1]] if pick else 1.0
        here = _presence(when, mixture, choices)
        total = total + here * share * densities[name, ratios] * size
    return total


def _presence(when: When | None, mixture: Mixture, choices: Mapping[str, Choice]) -> Any:
    choice = choices.get(when.choice) if when is not None else None
    if choice is None or when is None:
        return 1.0
    held = [choice.open_labels.index(x) for x in when.among]
    return mixture[choice.name].to("cpu", torch.float32)[held].sum()


def _mean(operation: Operation, mixture: Mixture) -> Operation:
    """The operation with its expected width, where that is open."""
    out = getattr(operation, "out", None)
    if not isinstance(out, Choice):
        return operation
    weights = mixture[out.name].to("cpu", torch.float32)
    sizes = torch.tensor(out.open_labels).to(weights)
    return replace(operation, out=weights @ sizes)  # type: ignore[type-var]


def _blend(shape: Shape, otherwise: Shape, share: Any) -> Shape:
    """The expected shape of a node that may let its input pass."""
    if isinstance(share, float):
        return shape
    return tuple(share * a + (1 - share) * b for a, b in zip(shape, otherwise, strict=True))
