"""Block-sparse convolution and its gradients, the plain truth: PyTorch's, of the dense weight.

Images are given with their channels last in memory.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from kernels.block_index import BlockIndex, flat, gather, scatter, unflat, whole_of
from kernels.window import Window


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex, window: Window
) -> Tensor:
    """Gives x * W + b (N, out, H', W') of x (N, in, H, W), values (blocks, h, w), bias (out,)."""
    return _last(F.conv2d(x, _weight(values, index, window), bias, *window.pairs))


def input_grad(
    grad: Tensor, values: Tensor, index: BlockIndex, window: Window, size: tuple[int, int]
) -> Tensor:
    """Gives the gradient of x (N, in, *size) of grad (N, out, H', W')."""
    shape = (len(grad), index.channels, *size)
    return _last(conv2d_input(shape, _weight(values, index, window), grad, *window.pairs))  # type: ignore[no-untyped-call]


def weight_grad(grad: Tensor, x: Tensor, index: BlockIndex, window: Window) -> Tensor:
    """Gives the gradient of values (blocks, h, w) of grad (N, out, H', W') and x (N, in, H, W)."""
    shape = (index.out_features, index.channels, *window.kernel)
    weight = conv2d_weight(x, shape, grad, *window.pairs)  # type: ignore[no-untyped-call]
    return gather(flat(weight), index)


def masked_grad(grad: Tensor, x: Tensor, index: BlockIndex, window: Window) -> Tensor:
    """Gives the gradient of values that are whole: zeros where no block is kept."""
    return whole_of(weight_grad(grad, x, index, window), index)


def _weight(values: Tensor, index: BlockIndex, window: Window) -> Tensor:
    return unflat(scatter(values, index), window.kernel)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
