"""The training rows of bench_kernels.py on a GPU: a layer of blocks against the dense layer."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels.block_linear.index import gather
from scripts.kernels_on_gpu import WRONG, Card, Row, graph_of, median_us

Step = Callable[[], Sequence[Tensor]]
TOKENS, SIZE, BLOCKS = 8192, 4096, (64, 128)
WEIGHT, ALL = "weight gradient", "forward and backward"


def rows(args: argparse.Namespace, card: Card) -> Iterator[Row]:
    """Of every sparsity and block: the gradient of the weight, then the product with both."""
    for block in BLOCKS:
        for sparsity in args.sparsity:
            for kernel in (WEIGHT, ALL):
                if args.only in f"{TOKENS} {SIZE} {block}x{block} {kernel}":
                    yield _measure(kernel, block, sparsity, card)


def _measure(kernel: str, block: int, sparsity: float, card: Card) -> Row:
    """Both steps in replayed graphs in turn; a wrong result is not timed."""
    layer = _layer(block, sparsity)
    x, grad = (torch.randn(TOKENS, SIZE, device="cuda").bfloat16() for _ in range(2))
    x.requires_grad_()
    ours, dense = _steps(kernel, layer, x, grad)
    correct = _correct(kernel, layer, ours(), x, grad)
    named = (TOKENS, SIZE, f"{block}x{block}", sparsity, correct, kernel)
    if not correct:
        return Row(*named)
    us, dense_us = median_us([graph_of([ours]), graph_of([dense])])
    products = 1 if kernel == WEIGHT else 3
    size = products * (x.nbytes + grad.nbytes + layer.values.nbytes)
    flop = products * 2.0 * layer.values.numel() * TOKENS
    least = max(size / card.copy_bytes_per_s, flop / card.matrix_flop_per_s) * 1e6
    return Row(
        *named,
        us=us,
        dense_us=dense_us,
        limit_us=products * card.empty_us + least,
        ratio=dense_us / us,
        bytes_per_s=size / us * 1e6,
        flop_per_s=flop / us * 1e6,
    )


def _layer(block: int, sparsity: float) -> kernels.BlockLinear:
    mask = torch.rand(SIZE // block, SIZE // block, device="cuda") >= sparsity
    linear = nn.Linear(SIZE, SIZE, bias=False, device="cuda", dtype=torch.bfloat16)
    return kernels.BlockLinear.of(linear, (block, block), mask)


def _steps(kernel: str, layer: kernels.BlockLinear, x: Tensor, grad: Tensor) -> tuple[Step, Step]:
    """Ours and dense."""
    weight, sample = layer.weight().detach(), torch.ops.sparse_nas.block_linear_weight_grad
    if kernel == WEIGHT:
        given, turned, block = x.detach(), grad.t(), layer.index.block
        return (
            lambda: [sample(grad, given, layer.lists, layer.groups, *block)],
            lambda: [torch.mm(turned, given)],
        )
    weight.requires_grad_()
    return (
        lambda: _forward_and_backward(layer(x), [x, layer.values], grad),
        lambda: _forward_and_backward(F.linear(x, weight), [x, weight], grad),
    )


def _forward_and_backward(y: Tensor, given: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    return [y, *torch.autograd.grad(y, given, grad)]


def _correct(
    kernel: str, layer: kernels.BlockLinear, found: Sequence[Tensor], x: Tensor, grad: Tensor
) -> bool:
    with torch.no_grad():
        wide, weight = grad.double(), layer.weight().double()
        true = [gather(wide.t() @ x.double(), layer.index)]
        if kernel == ALL:
            true = [F.linear(x.double(), weight), wide @ weight, *true]
        pairs = zip(found, true, strict=True)
        return all(bool((y.double() - t).norm() <= WRONG * t.norm()) for y, t in pairs)
