"""Sparsities of a ready-made residual network: what `sparsify` does for any module of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nas.module_space import ModuleSpace, sparsify
from nas.space import Origin


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 1512.03385, option A)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.more = stride, out - channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, out, H / stride, W / stride)."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.more:
            x = x[:, :, :: self.stride, :: self.stride]
            x = nn.functional.pad(x, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return torch.relu(x + y)


class ResNet(nn.Module):
    """The residual network for small images: 6 n + 2 layers in three stages."""

    def __init__(self, channels: int, outputs: int, depth: int = 20, width: int = 16) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"ResNet: depth must be 6 n + 2, at least 8, got {depth}")
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(n, width, width, 1)
        self.layer2 = _stage(n, width, 2 * width, 2)
        self.layer3 = _stage(n, 2 * width, 4 * width, 2)
        self.linear = nn.Linear(4 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, outputs)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _stage(n: int, channels: int, out: int, stride: int) -> nn.Sequential:
    first = Block(channels, out, stride)
    return nn.Sequential(first, *(Block(out, out, 1) for _ in range(n - 1)))


def sparsified(
    input_shape: Sequence[int],
    outputs: int,
    depth: int = 8,
    width: int = 16,
    sparsities: Sequence[str] = ("dense", "0.5", "0.8", "0.9", "0.95"),
    weights: Mapping[str, Tensor] | None = None,
) -> ModuleSpace:
    """A space of the sparsities of a `ResNet`.

    Args:
        input_shape: (C, H, W) of one sample.
        outputs: Classes.
        depth: 6 n + 2.
        width: Channels of the first stage.
        sparsities: Labels of the options of each weight.
        weights: Trained ones to start from, by name.
    """
    torch.manual_seed(0)
    model = ResNet(input_shape[0], outputs, depth, width)
    if weights is not None:
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
