"""The training rows of bench_kernels.py on a GPU: a layer of blocks against the dense layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels.block_index import gather
from scripts.gpu_timing import Work, block_mask, close

Step = Callable[[], Sequence[Tensor]]
TOKENS, SIZE, BLOCKS = 8192, 4096, (64, 128)
WEIGHT, ALL = "weight gradient", "forward and backward"
CALLS = 4  # in a graph


@dataclass(frozen=True)
class Training:
    """A square linear layer in bfloat16 that trains: the gradient of its weight, or all of it."""

    operation: str
    block: int
    sparsity: float

    @property
    def pattern(self) -> str:
        """As rows of the table name it."""
        return f"{self.block}x{self.block}"

    def __str__(self) -> str:
        return f"{self.operation} {TOKENS} tokens {SIZE}x{SIZE} {self.pattern}"

    def work(self) -> Work:
        """Makes the layer, checks and says what is timed."""
        layer = self._layer()
        x, grad = (torch.randn(TOKENS, SIZE, device="cuda").bfloat16() for _ in range(2))
        x.requires_grad_()
        ours, dense = self._steps(layer, x, grad)
        products = 1 if self.operation == WEIGHT else 3
        return Work(
            self.operation,
            f"{TOKENS} tokens, {SIZE}x{SIZE}",
            self.pattern,
            self.sparsity,
            self._correct(layer, ours(), x, grad),
            "block_linear",
            layer.values.detach(),
            CALLS,
            lambda _: ours,
            lambda _: dense,
            {},
            products * (x.nbytes + grad.nbytes + layer.values.nbytes),
            products * 2.0 * layer.values.numel() * TOKENS,
        )

    def _layer(self) -> kernels.BlockLinear:
        mask = block_mask((SIZE // self.block, SIZE // self.block), 1, self.sparsity)
        linear = nn.Linear(SIZE, SIZE, bias=False, device="cuda", dtype=torch.bfloat16)
        return kernels.BlockLinear.of(linear, (self.block, self.block), mask)

    def _steps(self, layer: kernels.BlockLinear, x: Tensor, grad: Tensor) -> tuple[Step, Step]:
        """Ours and dense."""
        weight, sample = layer.weight().detach(), torch.ops.sparse_nas.block_linear_weight_grad
        if self.operation == WEIGHT:
            given, turned, lists = x.detach(), grad.t(), (layer.lists, layer.groups)
            return (
                lambda: [sample(grad, given, *lists, *layer.index.block)],
                lambda: [torch.mm(turned, given)],
            )
        weight.requires_grad_()
        return (
            lambda: _forward_and_backward(lambda: layer(x), [x, layer.values], grad),
            lambda: _forward_and_backward(lambda: F.linear(x, weight), [x, weight], grad),
        )

    def _correct(
        self, layer: kernels.BlockLinear, found: Sequence[Tensor], x: Tensor, grad: Tensor
    ) -> bool:
        wide, weight = grad.double(), layer.weight().detach().double()
        true = [gather(wide.t() @ x.detach().double(), layer.index)]
        if self.operation == ALL:
            true = [F.linear(x.detach().double(), weight), wide @ weight, *true]
        return all(close(y.detach(), t) for y, t in zip(found, true, strict=True))


def _forward_and_backward(
    forward: Callable[[], Tensor], given: Sequence[Tensor], grad: Tensor
) -> list[Tensor]:
    with torch.enable_grad():
        y = forward()
        return [y, *torch.autograd.grad(y, given, grad)]


def cases(sparsities: Sequence[float]) -> Iterator[Training]:
    """Of every block and sparsity: the gradient of the weight, then the product with both."""
    for block in BLOCKS:
        for sparsity in sparsities:
            yield from (Training(operation, block, sparsity) for operation in (WEIGHT, ALL))
