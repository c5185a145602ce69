"""`torch.ops.sparse_nas.block_linear` and its gradients on a GPU: Triton's kernels, or PyTorch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.block_index import BlockIndex, is_whole, whole_shape
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
_READ = 3.2e6  # bytes of a weight that a dense product reads in a microsecond
_ZEROED = 3.5e6  # bytes of zeros that `whole` writes in a microsecond
_WRITTEN = 4.2e6  # bytes of a gradient that a product writes in a microsecond
_BEGINNING = 2.0  # microseconds
OUTPUT, INPUT, WEIGHT = PARTS = ("output", "gradient of the input", "gradient of the weight")
_STEP = 0.45  # microseconds of up to 64 columns of a block, however few tokens there are


def forward(x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex) -> Tensor:
    """See `kernels.block_linear.reference`."""
    if not takes(x, index):
        return reference.forward(x, values, bias, index)
    from kernels.cuda import many, whole  # not at the top: Triton comes where it is needed

    if is_whole(values) or not pays(index, x.dtype, len(x)):
        return F.linear(x, whole.matrix_of(values, index), bias)
    walk, bias = many.by_rows(index, aligned(values)), None if bias is None else bias.contiguous()
    with torch.cuda.device(x.device):
        return many.product(walk, aligned(x), bias, rounding=precision())


def input_grad(grad: Tensor, values: Tensor, index: BlockIndex) -> Tensor:
    """See `kernels.block_linear.reference`."""
    if not takes(grad, index):
        return reference.input_grad(grad, values, index)
    from kernels.cuda import many, whole

    if is_whole(values) or not pays(index, grad.dtype, len(grad), INPUT):
        return grad @ whole.matrix_of(values, index)
    walk = many.by_columns(index, aligned(values))
    with torch.cuda.device(grad.device):
        return many.product(walk, aligned(grad), None, rounding=precision())


def weight_grad(grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """See `kernels.block_linear.reference`."""
    if not takes(x, index):
        return reference.weight_grad(grad, x, index)
    from kernels.cuda import sampled, whole

    if not pays(index, x.dtype, len(x), WEIGHT):
        return whole.blocks_of(grad.t() @ x, index)
    with torch.cuda.device(x.device):
        return sampled.weight_grad(index, aligned(grad), aligned(x), precision=precision())


def masked_grad(grad: Tensor, x: Tensor, index: BlockIndex) -> Tensor:
    """See `kernels.block_linear.reference`."""
    if not takes(x, index):
        return reference.masked_grad(grad, x, index)
    from kernels.cuda import sampled, whole

    how = sampled.plan(index, x, len(x), precision())
    if how.split == 1 and samples(index, x.dtype, len(x)):
        matrix = x.new_empty(index.out_features, index.in_features)
        with torch.cuda.device(x.device):
            sampled.put_blocks(matrix, index, aligned(grad), aligned(x), how, precision())
    else:
        matrix = grad.t() @ x
    whole.mask_(matrix, index)
    return matrix.view(whole_shape(index))


def takes(x: Tensor, index: BlockIndex) -> bool:
    """Whether the kernels multiply x, whose first size is not 0, by such blocks."""
    return len(x) > 0 and fits(index, x.dtype)


def fits(index: BlockIndex, dtype: torch.dtype) -> bool:
    """Whether the kernels multiply such numbers by such blocks."""
    return dtype in DTYPES and set(index.block) <= set(SIZES) and has_triton()


def pays(index: BlockIndex, dtype: torch.dtype, tokens: int, part: str = OUTPUT) -> bool:
    """Whether our kernels are faster than a dense product and `whole`, by a rule of thumb.

    Args:
        index: of the blocks.
        dtype: of what is multiplied, of two or four bytes.
        tokens: or pixels of the output.
        part: of a step of training, one of `PARTS`.
    """
    dense = _dense_us(index, dtype, tokens, part) + moving_us(index, dtype)
    return _blocks_us(index, dtype, tokens, part) <= dense


def trains_dense(index: BlockIndex, dtype: torch.dtype, tokens: int) -> bool:
    """Whether a step of training takes less time where the weight is held whole."""
    if not fits(index, dtype):
        return True
    each = (index, dtype, tokens)
    times = [(_blocks_us(*each, part), _dense_us(*each, part)) for part in PARTS]
    dense = times[0][1] + times[1][1] + min(times[2])
    return whole_pays(index, dtype, times, dense)


def samples(index: BlockIndex, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the gradient of a whole weight is faster at the blocks alone, then masked."""
    each = (index, dtype, tokens, WEIGHT)
    return _blocks_us(*each) < _dense_us(*each)


def whole_pays(
    index: BlockIndex, dtype: torch.dtype, times: Sequence[tuple[float, float]], dense: float
) -> bool:
    """Whether a whole weight, its gradient masked, takes less time than one held as blocks.

    Args:
        index: of the blocks.
        dtype: of the weight.
        times: microseconds of our kernels and of dense, of each part of a step.
        dense: of a step with the whole weight, but for masking.
    """
    weights = index.out_features * index.in_features
    masking = _BEGINNING + (1 - share(index)) * weights * dtype.itemsize / _ZEROED
    blocks = sum(min(own, dense + moving_us(index, dtype)) for own, dense in times)
    return dense + masking < blocks


def compute_us(index: BlockIndex, dtype: torch.dtype, tokens: int) -> float:
    """Microseconds of the dense multiply-adds, on an H200 as all others here."""
    return 2 * tokens * index.out_features * index.in_features / _FLOP[_kind(dtype)]


def factor(index: BlockIndex, dtype: torch.dtype, part: str) -> float:
    """How many times as long our kernels take for what is kept."""
    cost = (_OF_WEIGHT if part is WEIGHT else _WITH_WEIGHT)[_kind(dtype)][min(index.block)]
    return share(index) * cost


def share(index: BlockIndex) -> float:
    """The share of the weight that is kept."""
    return len(index.columns) * math.prod(index.block) / (index.out_features * index.in_features)


def moving_us(index: BlockIndex, dtype: torch.dtype) -> float:
    """Microseconds of making the whole weight of its blocks, or taking them out of it."""
    return _BEGINNING + index.out_features * index.in_features * dtype.itemsize / _MOVED


def _blocks_us(index: BlockIndex, dtype: torch.dtype, tokens: int, part: str) -> float:
    """Microseconds of our kernels; of few tokens a product walks a row of blocks in steps."""
    held, needed = share(index), factor(index, dtype, part) * compute_us(index, dtype, tokens)
    if part is WEIGHT:
        return _BEGINNING + needed + held * _written_us(index, dtype)
    row, width = index.in_features, index.block[1]
    if part is INPUT:  # by columns
        row, width = index.out_features, index.block[0]
    least = _STEP * held * row / min(width, 64)
    together = min(index.block) == 64  # wide tiles: a step waits, and then multiplies
    return _BEGINNING + (needed + least if together else max(needed, least))


def _dense_us(index: BlockIndex, dtype: torch.dtype, tokens: int, part: str) -> float:
    """Microseconds of a dense product."""
    needed = compute_us(index, dtype, tokens)
    if part is WEIGHT:
        return _BEGINNING + needed + _written_us(index, dtype)
    read = index.out_features * index.in_features * dtype.itemsize / _READ
    return _BEGINNING + max(needed, read)


def _written_us(index: BlockIndex, dtype: torch.dtype) -> float:
    """Microseconds of writing a whole gradient."""
    return index.out_features * index.in_features * dtype.itemsize / _WRITTEN


def _kind(dtype: torch.dtype) -> str:
    return precision() if dtype is torch.float32 else "16 bits"
