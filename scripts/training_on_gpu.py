"""The training rows of bench_kernels.py on a GPU: a layer of blocks against the dense layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels.block_index import flat, gather, is_whole, scatter, whole_of
from kernels.cuda import step_tuning
from kernels.cuda.ways import WAYS, Way
from scripts.gpu_timing import Make, Work, block_mask, close

Step = Callable[[], Sequence[Tensor]]
Layer = kernels.BlockLinear | kernels.BlockConv2d
TOKENS, FEW, SIZE, BLOCKS = 8192, 512, 4096, (64, 128, 32)
IMAGES, CHANNELS, SIDES, SIDE = 64, 256, (28, 14), 64  # of convolutions; SIDE of their blocks
WEIGHT, ALL = "weight gradient", "forward and backward"
CALLS, SHORT, MOST = 4, 2e10, 32  # in a graph: more of a product of fewer FLOP than SHORT
DRAWN_TOKENS, DRAWN_IMAGES = (64, 128, 256, 512, 1024, 2048, 4096, 8192), (1, 4, 16, 64)


@dataclass(frozen=True)
class Linear:
    """A linear layer in bfloat16."""

    block: int
    tokens: int = TOKENS
    rows: int = SIZE
    columns: int = SIZE
    name = "block_linear"

    @property
    def shape(self) -> str:
        """As rows of the table name it."""
        return f"{self.tokens} tokens, {self.rows}x{self.columns}"

    def layer(self, sparsity: float) -> Layer:
        """The layer of blocks."""
        mask = block_mask((self.rows // self.block, self.columns // self.block), 1, sparsity)
        sizes = self.columns, self.rows
        linear = nn.Linear(*sizes, bias=False, device="cuda", dtype=torch.bfloat16)
        return kernels.BlockLinear.of(linear, (self.block, self.block), mask, self.tokens)

    def activations(self) -> tuple[Tensor, Tensor]:
        """An input, and a gradient of the output."""
        sizes = (self.tokens, self.columns), (self.tokens, self.rows)
        x, grad = (torch.randn(size, device="cuda").bfloat16() for size in sizes)
        return x, grad

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """PyTorch's output."""
        return F.linear(x, weight)

    def dense_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """PyTorch's gradient of the weight."""
        return torch.mm(grad.t(), x)

    def grad(self, layer: Layer, grad: Tensor, x: Tensor) -> Tensor:
        """Our gradient of the values."""
        ops, held = torch.ops.sparse_nas, is_whole(layer.values)
        sample = ops.block_linear_masked_grad if held else ops.block_linear_weight_grad
        return sample(grad, x, layer.lists, layer.groups, *layer.index.block)


@dataclass(frozen=True)
class Conv2d:
    """A 3x3 in bfloat16, channels last, of as many channels out as in."""

    size: int
    block: int = SIDE
    channels: int = CHANNELS
    images: int = IMAGES
    name = "block_conv2d"

    @property
    def shape(self) -> str:
        """As rows of the table name it."""
        return f"3x3 {self.channels} ch {self.size}^2, batch {self.images}"

    def layer(self, sparsity: float) -> Layer:
        """The layer of blocks."""
        blocks = self.channels // self.block
        mask = block_mask((blocks, blocks, 3, 3), 1, sparsity)
        conv = nn.Conv2d(self.channels, self.channels, 3, padding=1, bias=False)
        conv = conv.to("cuda", torch.bfloat16)
        pixels = self.images * self.size**2
        return kernels.BlockConv2d.of(conv, (self.block, self.block), mask, pixels)

    def activations(self) -> tuple[Tensor, Tensor]:
        """An input, and a gradient of the output."""
        size = (self.images, self.channels, self.size, self.size)
        x, grad = (torch.randn(size, device="cuda").bfloat16() for _ in range(2))
        last = torch.channels_last
        return x.contiguous(memory_format=last), grad.contiguous(memory_format=last)

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        """CuDNN's output."""
        return F.conv2d(x, weight, padding=1)

    def dense_grad(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """CuDNN's gradient of the weight."""
        ones = [1, 1]
        how = (None, ones, ones, ones, False, [0, 0], 1, [False, True, False])
        return torch.ops.aten.convolution_backward(grad, x, weight, *how)[1]

    def grad(self, layer: Layer, grad: Tensor, x: Tensor) -> Tensor:
        """Our gradient of the values."""
        ops, held = torch.ops.sparse_nas, is_whole(layer.values)
        sample = ops.block_conv2d_masked_grad if held else ops.block_conv2d_weight_grad
        ones = (1, 1)
        walk = ((3, 3), ones, ones, ones)
        return sample(grad, x, layer.lists, layer.groups, layer.index.block, *walk)


@dataclass(frozen=True)
class Training:
    """A layer that trains: the gradient of its weight, or all of it."""

    operation: str
    of: Linear | Conv2d
    sparsity: float
    tuned: bool = False
    ways: bool = False

    @property
    def pattern(self) -> str:
        """As rows of the table name it."""
        return f"{self.of.block}x{self.of.block}"

    def __str__(self) -> str:
        return f"{self.operation} {self.of.shape} {self.pattern}"

    def work(self) -> Work:
        """Makes the layer, checks and says what is timed."""
        layer, (x, grad) = self.of.layer(self.sparsity), self.of.activations()
        if self.tuned:
            layer.tune(x)
        x.requires_grad_()
        ours, dense = self._steps(layer, x, grad)
        products = 1 if self.operation == WEIGHT else 3
        kept = gather(scatter(layer.values, layer.index), layer.index).detach()
        flop = 2.0 * grad.numel() / grad.shape[1]  # a weight's
        calls = min(MOST, int(SHORT / (flop * layer.weight().numel())) + CALLS)
        return Work(
            self.operation,
            self.of.shape,
            self.pattern,
            self.sparsity,
            self._correct(layer, ours(), x, grad),
            "dense" if is_whole(layer.values) else self.of.name,
            kept,
            calls,
            lambda _: ours,
            lambda _: dense,
            _ways(layer, x) if self.ways else {},
            products * (x.nbytes + grad.nbytes + kept.nbytes),
            products * flop * kept.numel(),
            peer_calls=calls,
        )

    def _steps(self, layer: Layer, x: Tensor, grad: Tensor) -> tuple[Step, Step]:
        """Ours and dense."""
        weight, given = layer.weight().detach(), x.detach()
        if self.operation == WEIGHT:
            return (
                lambda: [self.of.grad(layer, grad, given)],
                lambda: [self.of.dense_grad(grad, given, weight)],
            )
        weight.requires_grad_()
        return (
            lambda: _forward_and_backward(lambda: layer(x), [x, layer.values], grad),
            lambda: _forward_and_backward(lambda: self.of.dense(x, weight), [x, weight], grad),
        )

    def _correct(self, layer: Layer, found: Sequence[Tensor], x: Tensor, grad: Tensor) -> bool:
        wide = [part.detach().double().requires_grad_() for part in (x, layer.weight())]
        true = _forward_and_backward(lambda: self.of.dense(*wide), wide, grad.double())
        weight = true[2] if true[2].dim() == 2 else flat(true[2])
        true = [*true[:2], gather(weight, layer.index)]
        if is_whole(layer.values):
            true[2] = whole_of(true[2], layer.index)
        wanted = true[2:] if self.operation == WEIGHT else true
        return all(close(y.detach(), t.detach()) for y, t in zip(found, wanted, strict=True))


def _ways(layer: Layer, x: Tensor) -> dict[str, Make]:
    """A step by each way that there is, whatever would be chosen."""
    problem = step_tuning.problem_of(layer, x)

    def made(way: Way) -> Make:
        return lambda _: partial(problem.step, way)

    return {name: made(WAYS[name]) for name in problem.names}


def _forward_and_backward(
    forward: Callable[[], Tensor], given: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    with torch.enable_grad():
        y = forward()
        return [y, *torch.autograd.grad(y, given, grad)]


def cases(sparsities: Sequence[float]) -> Iterator[Training]:
    """Of every layer and sparsity: the gradient of the weight, then the product with both."""
    layers: list[Linear | Conv2d] = [*map(Linear, BLOCKS), Linear(64, FEW), *map(Conv2d, SIDES)]
    for of in layers:
        for sparsity in sparsities:
            yield from (Training(operation, of, sparsity) for operation in (WEIGHT, ALL))


def drawn(
    count: int, widths: Sequence[int], shares: Sequence[float], tuned: bool, ways: bool
) -> Iterator[Training]:
    """Layers that train, of any of these widths and shares of zeros, the same in every run.

    Forward and backward: how a layer holds its weight is chosen for all of a step.

    Args:
        count: of layers.
        widths: of their weights.
        shares: of zeros.
        tuned: it is chosen by measurement (`BlockLayer.tune`), not by a rule of thumb.
        ways: every way is timed beside it.
    """
    draw, left = random.Random(0), count
    while left:
        block, share = draw.choice((16, 32, 64, 128)), draw.choice(shares)
        of: Linear | Conv2d
        if draw.random() < 0.2:
            channels, images = max(block, draw.choice((64, 128, 256))), draw.choice(DRAWN_IMAGES)
            of = Conv2d(draw.choice((7, 14, 28, 56)), block, channels, images)
            blocks = 9 * (channels // block) ** 2
        else:
            tokens, rows, columns = map(draw.choice, (DRAWN_TOKENS, widths, widths))
            of = Linear(block, tokens, rows, columns)
            blocks = rows // block * (columns // block)
        if round((1 - share) * blocks):  # some block is kept
            left -= 1
            yield Training(ALL, of, share, tuned, ways)
