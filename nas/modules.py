"""The few modules that operations need and torch does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Zero(nn.Module):
    """Zeros of the strided input's shape."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to zeros (N, C, ceil(H / stride), ceil(W / stride))."""
        return torch.zeros_like(x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride])


class GlobalAveragePool(nn.Module):
    """(N, C, H, W) to (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Mean over the last two dimensions."""
        return x.mean((2, 3))


class Sum(nn.Module):
    """Adds its inputs."""

    def forward(self, *xs: Tensor) -> Tensor:
        """Any number of tensors of one shape to their sum."""
        total = xs[0]
        for x in xs[1:]:
            total = total + x
        return total


class Concat(nn.Module):
    """Concatenates its inputs along the channels."""

    def forward(self, *xs: Tensor) -> Tensor:
        """Any number of (N, C, ...) tensors to one."""
        return torch.cat(xs, 1)


class FactorizedReduce(nn.Module):
    """Relu, two strided 1x1 convolutions (one on the image moved by a pixel), batch norm."""

    def __init__(self, left: nn.Module, right: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.norm = left, right, norm

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, out, ceil(H / 2), ceil(W / 2)); odd sizes are padded by one."""
        x = torch.relu(x)
        moved = nn.functional.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.norm(torch.cat([self.left(x), self.right(moved)], 1))


class PaddedShortcut(nn.Module):
    """Strided slices with `more` channels of zeros around them."""

    def __init__(self, more: int, stride: int) -> None:
        super().__init__()
        self.more, self.stride = more, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + more, ceil(H / stride), ceil(W / stride))."""
        x = x[:, :, :: self.stride, :: self.stride]
        before = self.more // 2
        return nn.functional.pad(x, (0, 0, 0, 0, before, self.more - before))
