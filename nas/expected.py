"""What a supernet is expected to cost under its mixture weights: exact, and differentiable.

Choices count as independent, so that the expectation of a product of widths and densities is
the product of expectations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from nas.choices import Choice, When
from nas.graph import INPUT, Graph
from nas.masks import Mixture
from nas.operations import Layer, Operation, Shape


@dataclass(frozen=True)
class Expected:
    """The expected cost of a graph with open choices.

    Args:
        graph: A settled graph.
        choices: Its open choices, by name.
    """

    graph: Graph
    choices: dict[str, Choice]

    def __call__(self, mixture: Mixture, cost: str) -> Tensor:
        """Expected `nonzeros` or `flops`, a scalar that gradients flow through."""
        total: Any = torch.zeros(())
        shapes: dict[str, Shape] = {INPUT: self.graph.input_shape}
        for node in self.graph.nodes.values():
            inputs = [shapes[i] for i in node.inputs]
            here = self._presence(node.when, mixture)
            shape: Any = None
            for k, (_, operation) in enumerate(node.candidates().items()):
                open_ = isinstance(node.operation, Choice)
                share = mixture[node.operation.name][k] if open_ else 1.0
                mean = _mean(operation, mixture)
                total = total + here * share * expected(mean.layers(*inputs), mixture, cost)
                shape = mean.shape(*inputs)
            shapes[node.name] = _blend(shape, inputs[0], here)
        return total

    def _presence(self, when: When | None, mixture: Mixture) -> Any:
        choice = self.choices.get(when.choice) if when is not None else None
        if choice is None or when is None:
            return 1.0
        return mixture[choice.name][[choice.open_labels.index(x) for x in when.among]].sum()


def expected(layers: Iterable[Layer], mixture: Mixture, cost: str) -> Any:
    """The expected cost of weight tensors whose sparsity may be open."""
    if cost not in ("nonzeros", "flops"):
        raise ValueError(f"expected cost: one of nonzeros and flops, got {cost!r}")
    total: Any = 0.0
    for layer in layers:
        each = prod(layer.shape) * _density(layer.sparsity, mixture)
        total = total + each * (layer.positions if cost == "flops" else 1)
    return total


def _density(sparsity: Any, mixture: Mixture) -> Any:
    if not isinstance(sparsity, Choice):
        return 1 - sparsity.ratio
    weights = mixture[sparsity.name]
    kept = torch.tensor([1 - option.ratio for _, option in sparsity.options])
    return weights @ kept.to(weights)


def _mean(operation: Operation, mixture: Mixture) -> Operation:
    """The operation with its expected width, where that is open."""
    out = getattr(operation, "out", None)
    if not isinstance(out, Choice):
        return operation
    weights = mixture[out.name]
    sizes = torch.tensor(out.open_labels).to(weights)
    return replace(operation, out=weights @ sizes)  # type: ignore[type-var]


def _blend(shape: Shape, otherwise: Shape, share: Any) -> Shape:
    """The expected shape of a node that may let its input pass."""
    if isinstance(share, float):
        return shape
    return tuple(share * a + (1 - share) * b for a, b in zip(shape, otherwise, strict=True))
