"""A run of layers, the plain truth."""

from collections.abc import Sequence

from torch import Tensor

from kernels.blob import shape_of
from kernels.network.program import Layer
from kernels.packed import unpack
from kernels.sparse_conv2d.reference import sparse_conv2d
from kernels.sparse_linear.reference import sparse_linear


def sparse_chain(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """The layers one after the other, their weights unpacked to x's type."""
    for layer in layers:
        weight = unpack(layer.packed.data).to(x.dtype)
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        if weight.dim() == 2:
            x = sparse_linear(x, weight, bias, layer.activation)
            continue
        groups = shape_of(layer.packed.data.numpy()).groups
        arguments = (layer.stride, layer.padding, layer.dilation, groups, layer.activation)
        x = sparse_conv2d(x, weight, bias, *arguments)
    return x
