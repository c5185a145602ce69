"""`torch.ops.sparse_nas.block_linear` and its gradients on a GPU: Triton's kernels, or PyTorch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.block_index import BlockIndex, is_whole, whole_shape
from kernels.block_linear import reference
from kernels.cuda import whole_grad
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
_PAYS = 0.98  # of the time, from which on a whole weight, which takes more memory, pays
_PIECE = 64  # bytes of a block's row, of fewer zeros take as long as the whole matrix
_WRITTEN = 4.2e6  # bytes of a gradient that a product writes in a microsecond
# Microseconds that a launch takes at least: of `whole`, of zeros behind a gradient, of ours, and
# of dense, with the weight and for its gradient.
_MOVING, _ZEROING, _OURS, _DENSE, _DENSE_GRADIENT = 2.0, 1.4, 2.6, 3.0, 2.3
OUTPUT, INPUT, WEIGHT = PARTS = ("output", "gradient of the input", "gradient of the weight")
# Microseconds that one after another takes, however little it is: up to 64 columns of a block, by
# its smaller side; 64 tokens of a gradient, ours up to so many, dense up to so long.
_STEP = {16: 0.45, 32: 0.45, 64: 0.45, 128: 0.3}
_OURS_STEP, _OURS_STEPS, _DENSE_STEP, _DENSE_STEPS_US = 0.26, 17, 0.11, 7.0


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

    if fuses(index, x.dtype, len(x)):
        matrix = whole_grad.weight_grad(index, aligned(grad), aligned(x))
        return matrix.view(whole_shape(index))
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
    gradient = min(_masked_us(*each), _fused_us(*each))
    return whole_pays(index, dtype, times, times[0][1] + times[1][1] + gradient)


def samples(index: BlockIndex, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the gradient of a whole weight is faster at the blocks alone, then masked."""
    each = (index, dtype, tokens, WEIGHT)
    return _blocks_us(*each) < _dense_us(*each)


def fuses(index: BlockIndex, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the gradient of a whole weight is faster by the kernel that gives its zeros too."""
    each = (index, dtype, tokens)
    return _fused_us(*each) <= _masked_us(*each)


def whole_pays(
    index: BlockIndex, dtype: torch.dtype, times: Sequence[tuple[float, float]], whole: float
) -> bool:
    """Whether a whole weight takes less time than one held as blocks.

    Args:
        index: of the blocks.
        dtype: of the weight.
        times: microseconds of our kernels and of dense, of each part of a step.
        whole: of a step with the whole weight.
    """
    blocks = sum(min(own, dense + moving_us(index, dtype)) for own, dense in times)
    return whole < _PAYS * blocks


def masking_us(index: BlockIndex, dtype: torch.dtype) -> float:
    """Microseconds of writing zeros where no block is kept."""
    zeros = 1.0 if index.block[1] * dtype.itemsize < _PIECE else 1 - share(index)
    weights = index.out_features * index.in_features
    return _ZEROING + zeros * weights * dtype.itemsize / _ZEROED


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
    return _MOVING + index.out_features * index.in_features * dtype.itemsize / _MOVED


def _blocks_us(index: BlockIndex, dtype: torch.dtype, tokens: int, part: str) -> float:
    """Microseconds of our kernels."""
    held, needed = share(index), factor(index, dtype, part) * compute_us(index, dtype, tokens)
    if part is WEIGHT:
        needed += held * _written_us(index, dtype)
        least = _OURS_STEP * min(tokens / 64, _OURS_STEPS)
    else:
        least = _STEP[min(index.block)] * steps_of(index, part)
    return _OURS + (needed**1.5 + least**1.5) ** (1 / 1.5)  # one partly waits for the other


def steps_of(index: BlockIndex, part: str) -> float:
    """Of up to 64 columns, in about the longest row of blocks, which a product walks in turn."""
    count, width = index.in_features / index.block[1], index.block[1]
    if part is INPUT:  # by columns
        count, width = index.taps * index.out_features / index.block[0], index.block[0]
    held = share(index)
    longest = held * count + 1.5 * math.sqrt(count * held * (1 - held))
    return min(longest, count) * max(1, width / 64)


def _dense_us(index: BlockIndex, dtype: torch.dtype, tokens: int, part: str) -> float:
    """Microseconds of a dense product."""
    needed = compute_us(index, dtype, tokens)
    if part is WEIGHT:
        least = min(_DENSE_STEP * tokens / 64, _DENSE_STEPS_US)
        return _DENSE_GRADIENT + max(needed, least) + _written_us(index, dtype)
    read = index.out_features * index.in_features * dtype.itemsize / _READ
    return _DENSE + max(needed, read)


def _masked_us(index: BlockIndex, dtype: torch.dtype, tokens: int) -> float:
    """Microseconds of the gradient of a whole weight, of dense or at its blocks, then masked."""
    each = (index, dtype, tokens, WEIGHT)
    return min(_blocks_us(*each), _dense_us(*each)) + masking_us(index, dtype)


def _fused_us(index: BlockIndex, dtype: torch.dtype, tokens: int) -> float:
    """Microseconds of whole_grad.cu, inf where it does not take it."""
    taken = whole_grad.takes(index, dtype)
    return whole_grad.microseconds(index, tokens) if taken else math.inf


def _written_us(index: BlockIndex, dtype: torch.dtype) -> float:
    """Microseconds of writing a whole gradient."""
    return index.out_features * index.in_features * dtype.itemsize / _WRITTEN


def _kind(dtype: torch.dtype) -> str:
    return precision() if dtype is torch.float32 else "16 bits"
