"""Programs that the kernel tests draw: random steps on random tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

import kernels
from kernels.calls import ACTIVATIONS
from kernels.network import Graph, Step, X, Y
from kernels.packed import Packed
from tests.kernels import draws

DENSITIES = (0.0, 0.1, 0.4, 1.0)
POOLS = ("max", "average", "average_all")


class Drawn:
    """A graph that grows by one random step at a time.

    Args:
        seed: of everything.
        shape: (channels, height, width) of the input.
    """

    def __init__(self, seed: int, shape: tuple[int, int, int]) -> None:
        self.random, self.graph = random.Random(seed), Graph([shape, (0, 0, 0)])
        self.images = [X]

    def grow(self, steps: int) -> Graph:
        """The graph after so many steps, a mean and two linear layers, or as it is."""
        draw = self.random
        makers: list[Callable[[int], int]] = [
            *(self.conv, self.conv, self.same, self.same, self.depthwise),
            *(self.pool, self.map, self.padded, self.concat, self.skip),
        ]
        for _ in range(steps):
            self.images.append(draw.choice(makers)(draw.choice(self.images[-4:])))
        last = self.images[-1]
        if draw.random() < 0.5:
            self.graph.shapes[Y] = self.graph.shapes[last]
            self.graph.steps.append(Step("map", last, Y, activation=self.activation()))
            return self.graph
        channels, height, width = self.graph.shapes[last]
        features = self.new((channels, height, width), "map", last, dense=True)
        if draw.random() < 0.5:
            features = self.new((channels, 1, 1), "mean", last)
            height = width = 1
        hidden = self.linear(
            features, channels * height * width, 19, self.graph.tensor((19, 1, 1))
        )
        self.graph.shapes[Y] = (7, 1, 1)
        self.linear(hidden, 19, 7, Y)
        return self.graph

    def new(self, shape: tuple[int, ...], operation: str, *args: int, **rest: Any) -> int:
        channels, height, width = shape
        out = self.graph.tensor((channels, height, width), bool(rest.pop("dense", False)))
        self.graph.steps.append(Step(operation, args[0], out, **rest))
        return out

    def activation(self) -> str:
        return self.random.choice(list(ACTIVATIONS))

    def storage(self) -> torch.dtype:
        return self.random.choice([torch.float32, torch.bfloat16])

    def fused(self, packed: Packed, rows: int) -> dict[str, Any]:
        bias = (
            draws.numbers(self.random.randrange(99), rows) if self.random.random() < 0.6 else None
        )
        return {"packed": packed, "bias": bias, "activation": self.activation()}

    def packed(self, rows: int, channels: int, kernel: int, groups: int = 1) -> Packed:
        density = self.random.choice(DENSITIES)
        shape = (rows, channels // groups, kernel, kernel)
        fan_in = max(1.0, density * shape[1] * kernel * kernel)
        blocks = self.random.choice((0, 1, 1, 4)) if rows // groups % 4 == 0 else 1
        weight = draws.weight(self.random.randrange(2**31), shape, density, blocks) / fan_in**0.5
        return kernels.pack_conv2d(weight.to(self.storage()), groups)

    def linear(self, source: int, inputs: int, rows: int, out: int) -> int:
        like = self.random.choice((0, 1))
        weight = draws.weight(self.random.randrange(2**31), (rows, inputs), 0.4, like)
        weight = (weight / max(1, 0.4 * inputs) ** 0.5).to(self.storage())
        fused = self.fused(kernels.pack_linear(weight), rows)
        self.graph.steps.append(Step("linear", source, out, **fused))
        return out

    def conv(self, source: int) -> int:
        """Any stride, padding and dilation that fits."""
        channels, height, width = self.graph.shapes[source]
        draw, rows = self.random, self.random.choice([4, 8, 24])
        for _ in range(50):
            kernel, dilation = draw.choice([1, 2, 3, 5]), draw.choice([1, 1, 2])
            stride, padding = draw.choice([1, 1, 2, 3]), draw.choice([0, 1, 2])
            reach = dilation * (kernel - 1)
            if min(height, width) + 2 * padding <= reach:
                continue
            size = tuple((s + 2 * padding - reach - 1) // stride + 1 for s in (height, width))
            walk = {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "padding": (padding,) * 2}
            fused = self.fused(self.packed(rows, channels, kernel), rows)
            shape = (rows, *size)
            return self.new(shape, "conv2d", source, dilation=(dilation,) * 2, **walk, **fused)
        return self.same(source)

    def same(self, source: int) -> int:
        """A convolution that keeps the size, perhaps with something added."""
        channels, height, width = self.graph.shapes[source]
        kernel, dilation = self.random.choice([(1, 1), (3, 1), (3, 2), (5, 1)])
        padding = dilation * (kernel - 1) // 2
        shape = (channels, height, width)
        alike = [t for t in self.images if self.graph.shapes[t] == shape]
        other = self.random.choice([None, *alike])
        groups = self.random.choice([g for g in (1, 2, channels) if channels % g == 0])
        fused = self.fused(self.packed(channels, channels, kernel, groups), channels)
        walk = {"kernel": (kernel,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2}
        return self.new(shape, "conv2d", source, other=other, **walk, **fused)

    def depthwise(self, source: int) -> int:
        channels, height, width = self.graph.shapes[source]
        kernel, dilation = self.random.choice([3, 5]), self.random.choice([1, 2])
        stride, padding = self.random.choice([1, 2, 3]), dilation * (kernel - 1) // 2
        size = tuple(-(-s // stride) for s in (height, width))
        fused = self.fused(self.packed(channels, channels, kernel, channels), channels)
        walk = {"kernel": (kernel,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2}
        shape = (channels, *size)
        return self.new(shape, "conv2d", source, stride=(stride,) * 2, **walk, **fused)

    def pool(self, source: int) -> int:
        channels, height, width = self.graph.shapes[source]
        stride, kind = self.random.choice([1, 2, 3]), self.random.choice(POOLS)
        walk = {"kernel": (3, 3), "stride": (stride,) * 2, "padding": (1, 1)}
        size = tuple((s - 1) // stride + 1 for s in (height, width))
        shape = (channels, *size)
        return self.new(shape, "pool", source, kind=kind, **walk)

    def map(self, source: int) -> int:
        channels, height, width = self.graph.shapes[source]
        stride = self.random.choice([1, 2, 3])
        shape = (channels, -(-height // stride), -(-width // stride))
        alike = [t for t in self.images if self.graph.shapes[t] == shape]
        other = self.random.choice([None, *alike])
        walk = {"stride": (stride,) * 2, "activation": self.activation()}
        return self.new(shape, "map", source, other=other, **walk)

    def padded(self, source: int) -> int:
        """Every second pixel, with channels of zeros around."""
        channels, height, width = self.graph.shapes[source]
        out = self.graph.tensor((channels + 5, -(-height // 2), -(-width // 2)))
        self.graph.steps.append(Step("zero", out, out))
        self.graph.steps.append(Step("map", source, out, at=2, stride=(2, 2)))
        return out

    def concat(self, source: int) -> int:
        _, *size = self.graph.shapes[source]
        parts = [t for t in self.images[-3:] if list(self.graph.shapes[t][1:]) == size]
        channels = [self.graph.shapes[t][0] for t in parts]
        out, at = self.graph.tensor((sum(channels), size[0], size[1])), 0
        for part, count in zip(parts, channels, strict=True):
            self.graph.steps.append(Step("map", part, out, at=at))
            at += count
        return out if parts else self.same(source)

    def skip(self, source: int) -> int:
        """A 1x1 of stride 2 that begins with the second pixel; beyond the last there are zeros."""
        channels, height, width = self.graph.shapes[source]
        fused = self.fused(self.packed(6, channels, 1), 6)
        walk = {"stride": (2, 2), "padding": (-1, -1)}
        return self.new((6, -(-height // 2), -(-width // 2)), "conv2d", source, **walk, **fused)


def residual_net() -> Graph:
    """Strides, shortcuts, a concatenation, depthwise layers and a pool, as parts allow them."""
    drawn = Drawn(5, (3, 16, 12))
    graph, value = drawn.graph, X
    for channels, stride, kernel, groups in (
        *((8, 1, 3, 1), (8, 1, 3, 8), (8, 1, 5, 8), (8, 2, 3, 1), (8, 1, 1, 1)),
        *((8, 1, 5, 2), (16, 1, 3, 1), (16, 2, 5, 16), (16, 1, 3, 1)),
    ):
        given = graph.shapes[value]
        shape = (channels, given[1] // stride, given[2] // stride)
        fused = drawn.fused(drawn.packed(channels, given[0], kernel, groups), channels)
        walk = {"kernel": (kernel,) * 2, "padding": (kernel // 2,) * 2, "stride": (stride,) * 2}
        other = value if given == shape else None
        value = drawn.new(shape, "conv2d", value, other=other, **walk, **fused)
    pooled = drawn.new((16, 2, 3), "pool", value, kernel=(2, 1), stride=(2, 1), kind="average")
    joined = graph.tensor((32, 2, 3))
    graph.steps += [Step("map", pooled, joined, at=at) for at in (0, 16)]
    graph.shapes[Y] = (5, 1, 1)
    drawn.linear(drawn.new((32, 1, 1), "mean", joined), 32, 5, Y)
    return graph
