"""A graph, the plain truth."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d

from kernels.blob import shape_of
from kernels.network.graph import Graph, Step, X, Y
from kernels.packed import unpack
from kernels.reference import activate
from kernels.sparse_conv2d.reference import sparse_conv2d
from kernels.sparse_linear.reference import sparse_linear


def run(x: Tensor, graph: Graph) -> Tensor:
    """The steps one after the other on (N, C, H, W), their weights unpacked to x's type."""
    values = [x.new_zeros((len(x), *shape)) for shape in graph.shapes]
    values[X] = x
    for step in graph.steps:
        result = _result(step, values)
        values[step.out][:, step.at : step.at + result.shape[1]] = result
    return values[Y]


def _result(step: Step, values: list[Tensor]) -> Tensor:
    if step.operation == "zero":
        return torch.zeros_like(values[step.out])
    x = values[step.source]
    other = None if step.other is None else values[step.other]
    bias = None if step.bias is None else step.bias.to(x.dtype)
    if step.packed is not None:
        weight = unpack(step.packed.data).to(x.dtype)
        if step.operation == "linear":
            return sparse_linear(x.flatten(1), weight, bias, step.activation)[..., None, None]
        groups = shape_of(step.packed.data.numpy()).groups
        if min(step.padding) < 0:
            size = [step.stride[0] - step.padding[0], step.stride[1] - step.padding[1]]
            x = torch.nn.functional.pad(x, (0, size[1], 0, size[0]))
            x = x[:, :, -step.padding[0] :, -step.padding[1] :]
            tail = values[step.out].shape[2:]
            y = sparse_conv2d(x, weight, bias, step.stride, (0, 0), (1, 1), groups, "none")
            y = y[:, :, : tail[0], : tail[1]]
        else:
            walk = (step.stride, step.padding, step.dilation)
            y = sparse_conv2d(x, weight, bias, *walk, groups, "none")
    elif step.operation == "pool" and step.kind == "max":
        y = max_pool2d(x, step.kernel, step.stride, step.padding)
    elif step.operation == "pool":
        counted = step.kind == "average_all"
        y = avg_pool2d(x, step.kernel, step.stride, step.padding, False, counted)
    elif step.operation == "mean":
        y = x.mean((2, 3), keepdim=True)
    else:
        y = x[:, :, :: step.stride[0], :: step.stride[1]]
    return activate(y if other is None else y + other, step.activation)
