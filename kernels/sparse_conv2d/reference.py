"""Sparse 2-d convolution, the plain truth."""

import torch.nn.functional as F
from torch import Tensor

from kernels.reference import ACTIVATIONS

Pair = tuple[int, ...]


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str,
) -> Tensor:
    """act(x * W + b) for x (N, C, H, W), dense weight with zeros, in any float type."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return ACTIVATIONS[activation](y)
