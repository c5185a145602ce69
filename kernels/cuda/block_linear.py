"""`torch.ops.sparse_nas.block_linear` and its gradients on a GPU: Triton's kernels, or PyTorch."""

import torch
from torch import Tensor

from kernels.block_index import BlockIndex
from kernels.block_linear import reference
from kernels.cuda.blocks import DTYPES, SIZES
from kernels.cuda.driver import has_triton
from kernels.cuda.linear import aligned
from kernels.cuda.rounding import precision


def forward(x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex) -> Tensor:
    """See `kernels.block_linear.reference`."""
    if not takes(x, index):
        return reference.forward(x, values, bias, index)
    from kernels.cuda import many  # not at the top: Triton is imported only where it is needed

    walk, bias = many.by_rows(index, aligned(values)), None if bias is None else bias.contiguous()
    with torch.cuda.device(x.device):
        return many.product(walk, aligned(x), bias, rounding=precision())


def input_grad(grad: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """See `kernels.block_linear.reference`."""
    if not takes(grad, index):
        return reference.input_grad(grad, values, index)
    from kernels.cuda import many

    walk = many.by_columns(index, aligned(values))
    with torch.cuda.device(grad.device):
        return many.product(walk, aligned(grad), None, rounding=precision())


def weight_grad(grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """See `kernels.block_linear.reference`."""
    if not takes(x, index):
        return reference.weight_grad(grad, x, index)
    from kernels.cuda import sampled

    with torch.cuda.device(x.device):
        return sampled.weight_grad(index, aligned(grad), aligned(x), precision=precision())


def takes(x: Tensor, index: BlockIndex) -> bool:
    """Whether the kernels multiply x, whose first size is not 0, by such blocks."""
    fits = x.dtype in DTYPES and set(index.block) <= set(SIZES)
    return fits and len(x) > 0 and has_triton()
