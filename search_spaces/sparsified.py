"""Sparsities of a ready-made residual network: what `sparsify` does for any module of your own.

The network is written down as a graph, so that its costs are known without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from nas.choices import Choice
from nas.graph import INPUT, Graph
from nas.operations import (
    Activation,
    BatchNorm,
    GlobalAveragePool,
    PaddedShortcut,
    SparseConv2d,
    SparseLinear,
    Sum,
)
from nas.space import GraphSpace, Origin
from nas.sparsity import parse

if TYPE_CHECKING:
    from torch import Tensor

    from nas.module_space import ModuleSpace

LEVELS = ("dense", "0.5", "0.8", "0.9", "0.95")


def resnet(
    input_shape: Sequence[int],
    outputs: int,
    depth: int = 8,
    width: int = 16,
    sparsities: Sequence[str] = LEVELS,
) -> GraphSpace:
    """The residual network for small images (He et al. 1512.03385, shortcuts without parameters).

    Args:
        input_shape: (C, H, W) of one sample.
        outputs: Classes.
        depth: 6 n + 2: three stages of n blocks of two convolutions.
        width: Channels of the first stage, doubled by the others.
        sparsities: Labels of the sparsities of each weight.

    Raises:
        ValueError: Another depth, no width, or a sparsity that a weight does not admit.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"resnet: depth must be 6 n + 2, at least 8, got {depth}")
    if width < 1:
        raise ValueError(f"resnet: width must be at least 1, got {width}")
    levels = [parse(label) for label in sparsities]

    def sparsity(name: str) -> Choice:
        return Choice(f"{name}/weight/sparsity", levels)

    def convolution(name: str, before: str, out: int, stride: int = 1) -> str:
        operation = SparseConv2d(out, 3, stride, sparsity=sparsity(name))
        return graph.add(name, operation, before)

    graph = Graph(input_shape)
    last = convolution("conv1", INPUT, width)
    last = graph.add("relu1", Activation(), graph.add("bn1", BatchNorm(), last))
    for stage in (1, 2, 3):
        out = width << (stage - 1)
        for block in range((depth - 2) // 6):
            place, stride = f"layer{stage}/{block}", 2 if stage > 1 and block == 0 else 1
            inner = convolution(f"{place}/conv1", last, out, stride)
            inner = graph.add(f"{place}/bn1", BatchNorm(), inner)
            inner = graph.add(f"{place}/relu1", Activation(), inner)
            inner = convolution(f"{place}/conv2", inner, out)
            inner = graph.add(f"{place}/bn2", BatchNorm(), inner)
            if stride > 1:
                last = graph.add(f"{place}/shortcut", PaddedShortcut(out, stride), last)
            last = graph.add(f"{place}/sum", Sum(), last, inner)
            last = graph.add(f"{place}/relu2", Activation(), last)
    last = graph.add("pool", GlobalAveragePool(), last)
    graph.add("linear", SparseLinear(outputs, sparsity=sparsity("linear")), last)
    return GraphSpace(graph)


def sparsified(
    input_shape: Sequence[int],
    outputs: int,
    depth: int = 8,
    width: int = 16,
    sparsities: Sequence[str] = LEVELS,
    weights: Mapping[str, Tensor] | None = None,
) -> ModuleSpace:
    """A space of the sparsities of the trained module of a `resnet`.

    Args:
        input_shape: (C, H, W) of one sample.
        outputs: Classes.
        depth: 6 n + 2.
        width: Channels of the first stage.
        sparsities: Labels of the options of each weight.
        weights: Trained ones to start from, by name.

    Raises:
        ValueError: As `resnet`, or weights of another network.
    """
    import torch

    from nas.module_space import sparsify

    torch.manual_seed(0)
    described = resnet(input_shape, outputs, depth, width, sparsities)
    model = described.build(described.largest(), masked=False)
    if weights is not None:
        _check_weights(model.state_dict(), weights)
        model.load_state_dict(dict(weights))
    space = sparsify(model, torch.zeros(2, *input_shape), sparsities)
    arguments = {
        "input_shape": list(input_shape),
        "outputs": outputs,
        "depth": depth,
        "width": width,
        "sparsities": list(sparsities),
    }
    space.origin = Origin("search_spaces.sparsified:sparsified", arguments)
    return space


def _check_weights(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise ValueError for weights of another network; counts of batches may be missing."""
    for name in sorted({*wanted, *given}):
        shapes = [tuple(t[name].shape) if name in t else None for t in (given, wanted)]
        if shapes[0] != shapes[1] and not name.endswith("num_batches_tracked"):
            raise ValueError(
                f"sparsified: weight {name} is {shapes[0]}, the network's is {shapes[1]}: "
                "the weights are of another task, depth or width"
            )
