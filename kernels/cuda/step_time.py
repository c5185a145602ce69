"""How long parts of a step of training take on an H200, microseconds, by rules of thumb.

Of a layer of blocks: by our kernels, by PyTorch's dense products, and what goes with a weight that
is held whole.
"""

import math

import torch

from kernels.block_index import BlockIndex
from kernels.cuda import whole_grad
from kernels.cuda.rounding import precision
from kernels.cuda.whole_plan import together

OUTPUT, INPUT, WEIGHT = PARTS = ("output", "gradient of the input", "gradient of the weight")
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
_SHORT, _QUICK = 1e11, 0.88  # of fewer the clock is higher: a product with the weight takes less
# What a launch takes at least: of `whole`, of zeros behind a gradient, of ours, of blocks of 128
# more, and of dense, with the weight and for its gradient.
_MOVING, _ZEROING, _OURS, _OURS_128, _DENSE, _DENSE_GRADIENT = 2.0, 1.4, 2.6, 0.8, 3.0, 2.3
# What one after another takes, however little it is: up to 64 columns of a block, by its smaller
# side; 64 tokens of a gradient, ours up to so many, dense up to so long.
_STEP = {16: 0.45, 32: 0.45, 64: 0.45, 128: 0.38}
_OURS_STEP, _OURS_STEPS, _DENSE_STEP, _DENSE_STEPS = 0.26, 17, 0.11, 7.0
# Bytes in a microsecond: of a matrix that `whole` writes or reads, of zeros that it writes, of a
# weight that a dense product reads, of a gradient that one writes.
_MOVED, _ZEROED, _READ, _WRITTEN = 2.4e6, 3.5e6, 3.2e6, 4.2e6
_PIECE = 64  # bytes of a row of a block: narrower zeros take as long as the whole matrix


def blocks(index: BlockIndex, dtype: torch.dtype, tokens: int, part: str) -> float:
    """Of our kernels.

    Args:
        index: of the blocks.
        dtype: of what is multiplied, of two or four bytes.
        tokens: of a step.
        part: of it, one of `PARTS`.
    """
    needed, large = factor(index, dtype, part) * compute(index, dtype, tokens), _large(index)
    if part == WEIGHT:
        needed += share(index) * _bytes(index, dtype) / _WRITTEN
        least = _OURS_STEP * min(tokens / 64, _OURS_STEPS)
        return _OURS + large * _OURS_128 + together(needed, least)
    least = _STEP[min(index.block)] * steps_of(index, part)
    return _OURS + together(needed, least, 3 if large else 1.5)


def dense(index: BlockIndex, dtype: torch.dtype, tokens: int, part: str) -> float:
    """Of a dense product; arguments as of `blocks`."""
    needed = compute(index, dtype, tokens)
    if part == WEIGHT:
        least = min(_DENSE_STEP * tokens / 64, _DENSE_STEPS)
        return _DENSE_GRADIENT + max(needed, least) + _bytes(index, dtype) / _WRITTEN
    short = dtype.itemsize == 2 and 2 * tokens * _weights(index) < _SHORT
    return _DENSE + max(needed * (_QUICK if short else 1), _bytes(index, dtype) / _READ)


def moving(index: BlockIndex, dtype: torch.dtype) -> float:
    """Of making the whole weight of its blocks, or taking them out of it."""
    return _MOVING + _bytes(index, dtype) / _MOVED


def zeroing(index: BlockIndex, dtype: torch.dtype) -> float:
    """Of writing zeros where no block is kept."""
    zeros = 1.0 if index.block[1] * dtype.itemsize < _PIECE else 1 - share(index)
    return _ZEROING + zeros * _bytes(index, dtype) / _ZEROED


def masked(index: BlockIndex, dtype: torch.dtype, tokens: int) -> float:
    """Of the gradient of a whole weight, of dense or at its blocks, and zeros behind it."""
    each = (index, dtype, tokens, WEIGHT)
    return min(blocks(*each), dense(*each)) + zeroing(index, dtype)


def fused(index: BlockIndex, dtype: torch.dtype, tokens: int) -> float:
    """Of the gradient of a whole weight by whole_grad.cu, inf where that does not take it."""
    taken = whole_grad.takes(index, dtype)
    return whole_grad.microseconds(index, tokens) if taken else math.inf


def both(index: BlockIndex, dtype: torch.dtype, tokens: int) -> float:
    """Of both gradients of a whole weight by one launch, inf where there is none."""
    taken = whole_grad.takes(index, dtype)
    return whole_grad.both_microseconds(index, tokens) if taken else math.inf


def compute(index: BlockIndex, dtype: torch.dtype, tokens: int) -> float:
    """Of the dense multiply-adds."""
    return 2 * tokens * _weights(index) / _FLOP[_kind(dtype)]


def factor(index: BlockIndex, dtype: torch.dtype, part: str) -> float:
    """How many times as long our kernels take for what is kept."""
    cost = (_OF_WEIGHT if part == WEIGHT else _WITH_WEIGHT)[_kind(dtype)][min(index.block)]
    return share(index) * cost


def share(index: BlockIndex) -> float:
    """The share of the weight that is kept."""
    return len(index.columns) * math.prod(index.block) / _weights(index)


def steps_of(index: BlockIndex, part: str) -> float:
    """Of up to 64 columns, in about the longest row of blocks, which a product walks in turn."""
    count, width = index.in_features / index.block[1], index.block[1]
    if part == INPUT:  # by columns
        count, width = index.taps * index.out_features / index.block[0], index.block[0]
    held = share(index)
    longest = held * count + 1.5 * math.sqrt(count * held * (1 - held))
    return min(longest, count) * max(1, width / 64)


def _large(index: BlockIndex) -> bool:
    return min(index.block) == 128


def _weights(index: BlockIndex) -> int:
    return index.out_features * index.in_features


def _bytes(index: BlockIndex, dtype: torch.dtype) -> int:
    return _weights(index) * dtype.itemsize


def _kind(dtype: torch.dtype) -> str:
    return precision() if dtype is torch.float32 else "16 bits"
