"""`torch.ops.sparse_nas.block_linear` and its gradients on a GPU: Triton's kernels, or PyTorch."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.block_index import BlockIndex
from kernels.block_linear import reference
from kernels.cuda.blocks import DTYPES, SIZES
from kernels.cuda.driver import has_triton
from kernels.cuda.linear import aligned
from kernels.cuda.rounding import precision

# How many times as long as PyTorch's dense product our kernels took, were all blocks kept, by the
# smaller side of a block and how numbers are multiplied: with the weight, and for its gradient.
_WITH_WEIGHT = {
    "16 bits": {16: 11, 32: 3.4, 64: 1.5, 128: 1.1},
    "ieee": {16: 7, 32: 3.8, 64: 2.4, 128: 2.4},
    "tf32": {16: 8, 32: 3.9, 64: 3, 128: 3.5},
}
_OF_WEIGHT = {
    "16 bits": {16: 16, 32: 6, 64: 1.7, 128: 1.15},
    "ieee": {16: 6, 32: 2.2, 64: 1.2, 128: 1.2},
    "tf32": {16: 20, 32: 11, 64: 5.2, 128: 6},
}
_FLOP = {"16 bits": 750e6, "ieee": 50e6, "tf32": 425e6}  # of a dense product in a microsecond
_MOVED = 2.4e6  # bytes of a matrix that `whole` writes or reads in a microsecond
_BEGINNING = 2.0  # microseconds


def forward(x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex) -> Tensor:
    """See `kernels.block_linear.reference`."""
    if not takes(x, index):
        return reference.forward(x, values, bias, index)
    from kernels.cuda import many, whole  # not at the top: Triton comes where it is needed

    if not pays(index, x.dtype, len(x)):
        with uncast(x):
            return F.linear(x, whole.matrix_of(values, index), bias)
    walk, bias = many.by_rows(index, aligned(values)), None if bias is None else bias.contiguous()
    with torch.cuda.device(x.device):
        return many.product(walk, aligned(x), bias, rounding=precision())


def input_grad(grad: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """See `kernels.block_linear.reference`."""
    if not takes(grad, index):
        return reference.input_grad(grad, values, index)
    from kernels.cuda import many, whole

    if not pays(index, grad.dtype, len(grad)):
        with uncast(grad):
            return grad @ whole.matrix_of(values, index)
    walk = many.by_columns(index, aligned(values))
    with torch.cuda.device(grad.device):
        return many.product(walk, aligned(grad), None, rounding=precision())


def weight_grad(grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """See `kernels.block_linear.reference`."""
    if not takes(x, index):
        return reference.weight_grad(grad, x, index)
    from kernels.cuda import sampled, whole

    if not pays(index, x.dtype, len(x), of_weight=True):
        with uncast(x):
            return whole.blocks_of(grad.t() @ x, index)
    with torch.cuda.device(x.device):
        return sampled.weight_grad(index, aligned(grad), aligned(x), precision=precision())


def takes(x: Tensor, index: BlockIndex) -> bool:
    """Whether the kernels multiply x, whose first size is not 0, by such blocks."""
    fits = x.dtype in DTYPES and set(index.block) <= set(SIZES)
    return fits and len(x) > 0 and has_triton()


def uncast(x: Tensor) -> torch.autocast:
    """PyTorch's products on x's device keep their dtype, under autocast too."""
    return torch.autocast(x.device.type, enabled=False)


def pays(index: BlockIndex, dtype: torch.dtype, tokens: int, of_weight: bool = False) -> bool:
    """Whether our kernels are faster than a dense product and `whole`, by a rule of thumb.

    Microseconds are those of an H200.

    Args:
        index: of the blocks.
        dtype: of what is multiplied, of two or four bytes.
        tokens: or pixels of the output.
        of_weight: for the weight's gradient, not a product with it.
    """
    kind = precision() if dtype is torch.float32 else "16 bits"
    cost = (_OF_WEIGHT if of_weight else _WITH_WEIGHT)[kind][min(index.block)]
    weights = index.out_features * index.in_features
    kept = len(index.columns) * math.prod(index.block) / weights
    dense = 2 * tokens * weights / _FLOP[kind]
    return kept * cost * dense <= dense + _BEGINNING + weights * dtype.itemsize / _MOVED
