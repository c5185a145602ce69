"""Block-sparse linear and its gradients, the plain truth: for each row of blocks one product.

Of values that hold the weight whole (`kernels.block_index.whole_of`) it is the dense product.
"""

from itertools import pairwise

from torch import Tensor
from torch.nn import functional as F

from kernels.block_index import BlockIndex, gather, is_whole, scatter, whole_of


def forward(x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex) -> Tensor:
    """Gives x W^T + b (tokens, out) of x (tokens, in), values (blocks, h, w), bias (out,)."""
    if is_whole(values):
        return F.linear(x, scatter(values, index), bias)
    height, width = index.block
    y = x.new_zeros(len(x), index.out_features // height, height)
    parts = x.reshape(len(x), index.in_features // width, width)
    for row, (begin, end) in enumerate(pairwise(index.starts.tolist())):
        weight = values[begin:end].transpose(1, 2).flatten(0, 1)
        y[:, row] = parts[:, index.columns[begin:end]].flatten(1) @ weight
    y = y.flatten(1)
    return y if bias is None else y + bias


def input_grad(grad: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """Gives grad W (tokens, in), the gradient of x, of grad (tokens, out)."""
    if is_whole(values):
        return grad @ scatter(values, index)
    height, width = index.block
    given = grad.new_zeros(len(grad), index.in_features // width, width)
    parts = grad.reshape(len(grad), index.out_features // height, height)
    for column, (begin, end) in enumerate(pairwise(index.column_starts.tolist())):
        weight = values[index.places[begin:end]].flatten(0, 1)
        given[:, column] = parts[:, index.rows[begin:end]].flatten(1) @ weight
    return given.flatten(1)


def weight_grad(grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """Gives the blocks of grad^T x (blocks, h, w), the gradient of values."""
    height, width = index.block
    given = x.new_zeros(len(index.columns), height, width)
    rows = grad.reshape(len(x), index.out_features // height, height)
    parts = x.reshape(len(x), index.in_features // width, width)
    for row, (begin, end) in enumerate(pairwise(index.starts.tolist())):
        found = rows[:, row].t() @ parts[:, index.columns[begin:end]].flatten(1)
        given[begin:end] = found.view(height, end - begin, width).transpose(0, 1)
    return given


def masked_grad(grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """Gives the gradient of values that are whole: grad^T x at the blocks, else zeros."""
    return whole_of(gather(grad.t() @ x, index), index)


def both_grads(
    grad: Tensor, x: Tensor, values: Tensor, index: BlockIndex
) -> tuple[Tensor, Tensor]:
    """Gives `masked_grad` and `input_grad` of values that are whole."""
    return masked_grad(grad, x, index), input_grad(grad, values, index)
