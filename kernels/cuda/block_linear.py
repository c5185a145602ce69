"""`torch.ops.sparse_nas.block_linear` and its gradients on a GPU: Triton's kernels, or PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.block_index import BlockIndex, is_whole, whole_shape
from kernels.block_linear import reference
from kernels.cuda import step_time, ways, whole_grad
from kernels.cuda.blocks import DTYPES, SIZES
from kernels.cuda.driver import has_triton
from kernels.cuda.linear import aligned
from kernels.cuda.rounding import precision
from kernels.cuda.step_time import INPUT, OUTPUT, PARTS, WEIGHT
from kernels.window import Window

# Of the time, from which on a whole weight, which takes more memory, pays; where dense products
# are taken anyway, from any time less; if small, even from this time more where one of them is:
# our kernels alone, beside each other, take less time than these times say.
_PAYS, _PAYS_SMALL = 0.98, 1.04
_SMALL = 2**23  # weights
# Microseconds of the multiply-adds of a dense product, up to which one beside it takes less time
# than behind it; of a whole gradient by one kernel, which holds what it has of a GPU to its end,
# of up to so many tokens, or thread blocks (half of an H200); or of so long a product at least and
# fewer thread blocks than an H200 holds, which then have a tile each.
_ROOM, _ROOM_FUSED, _SOON, _HALF, _LONG, _ALL = 133, 3.67, 256, 66, 8, 132
# Of the time of one after the other, up to which one launch of both gradients pays; less where
# they have room beside each other, and of up to so many weights, which leave more of it; of so
# many multiply-adds that the clock falls; of so few tokens that writing the weight's binds.
_JOINED, _JOINED_ROOM, _JOINED_LITTLE, _LITTLE = 1.2, 0.97, 0.85, 2**18
_JOINED_MANY, _JOINED_FEW, _FEW = 0.9, 0.75, 64
# Microseconds of zeros behind a gradient that the gradient of the input hides, beside it: of a
# weight that is not wider than tall, so that this adds up as many products as that or more.
_HIDDEN = 1.9


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

    if fuses(index, x.dtype, len(x)) and whole_grad.ready(index, x):
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


def both_grads(
    grad: Tensor, x: Tensor, values: Tensor, index: BlockIndex
) -> tuple[Tensor, Tensor]:
    """See `kernels.block_linear.reference`."""
    joined = takes(x, index) and joins(index, x.dtype, len(x))
    if not joined or not whole_grad.both_ready(index, x):
        return masked_grad(grad, x, index), input_grad(grad, values, index)
    from kernels.cuda import whole

    given = aligned(grad), aligned(x), aligned(whole.matrix_of(values, index))
    of_weight, of_x = whole_grad.both_grads(index, *given)
    return of_weight.view(whole_shape(index)), of_x


def joins(index: BlockIndex, dtype: torch.dtype, tokens: int) -> bool:
    """Whether one launch gives both gradients of a whole weight sooner: measured, or by a rule."""
    each = (index, dtype, tokens)
    if tokens == 0:
        return False
    if way := ways.fastest(ways.case_of(*each), True):
        return way.joined
    most = _JOINED
    if step_time.compute(*each) > _ROOM:
        most = _JOINED_MANY
    elif tokens <= _FEW:
        most = _JOINED_FEW
    elif _beside(*each, whole=True):
        little = index.out_features * index.in_features <= _LITTLE
        most = _JOINED_LITTLE if little else _JOINED_ROOM
    return step_time.both(*each) <= most * _in_turn(*each)


def room(
    index: BlockIndex,
    dtype: torch.dtype,
    tokens: int,
    whole: bool,
    window: Window | None = None,
) -> bool:
    """Whether both gradients of a step take the least time beside each other.

    As measured, or by a rule of thumb.

    Args:
        index: of the blocks.
        dtype: of what is multiplied.
        tokens: or pixels of the output.
        whole: whether the weight is held whole.
        window: of a convolution.
    """
    if way := ways.fastest(ways.case_of(index, dtype, tokens, window), whole):
        return way.beside
    by_pixels = whole and (window is None or window.of_pixels)  # `masked_grad` is the gradient
    if by_pixels and fits(index, dtype):
        if joins(index, dtype, tokens):
            return False
        needed = step_time.compute(index, dtype, tokens)
        if _LONG <= needed <= _ROOM and fuses(index, dtype, tokens):
            return whole_grad.plan(index, tokens).blocks < _ALL
    return _beside(index, dtype, tokens, by_pixels)


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
    dense = step_time.dense(index, dtype, tokens, part) + step_time.moving(index, dtype)
    return step_time.blocks(index, dtype, tokens, part) <= dense


def trains_dense(index: BlockIndex, dtype: torch.dtype, tokens: int) -> bool:
    """Whether a step of training takes less time where the weight is held whole.

    As measured, else by a rule of thumb.
    """
    each = (index, dtype, tokens)
    if way := ways.fastest(ways.case_of(*each)):
        return way.whole
    if not fits(index, dtype):
        return True
    times = [(step_time.blocks(*each, part), step_time.dense(*each, part)) for part in PARTS]
    small = index.out_features * index.in_features < _SMALL
    gradients = step_time.both(*each) if joins(*each) else _in_turn(*each)
    return whole_pays(index, dtype, times, times[0][1] + gradients, small)


def samples(index: BlockIndex, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the gradient of a whole weight is faster at the blocks alone, then masked."""
    each = (index, dtype, tokens, WEIGHT)
    return step_time.blocks(*each) < step_time.dense(*each)


def fuses(index: BlockIndex, dtype: torch.dtype, tokens: int) -> bool:
    """Whether the gradient of a whole weight is faster by the kernel that gives its zeros too.

    As measured, or by a rule. In a captured step, where the gradient of the input is beside it;
    else it is up to `_HIDDEN`.
    """
    way = ways.fastest(ways.case_of(index, dtype, tokens), True)
    if way is not None and not way.joined:
        return way.fused
    each, tall = (index, dtype, tokens), index.out_features >= index.in_features
    return step_time.fused(*each) <= step_time.masked(*each) - tall * _HIDDEN


def whole_pays(
    index: BlockIndex,
    dtype: torch.dtype,
    times: Sequence[tuple[float, float]],
    whole: float,
    small: bool,
) -> bool:
    """Whether a whole weight takes enough less time than one held as blocks, see `_PAYS`.

    Args:
        index: of the blocks.
        dtype: of the weight.
        times: microseconds of our kernels and of dense, of each part of a step.
        whole: of a step with the whole weight.
        small: whether it may take hardly more, if a part of a step is dense anyway.
    """
    moved = [(own, dense + step_time.moving(index, dtype)) for own, dense in times]
    ours = [own <= dense for own, dense in moved]
    pays = _PAYS if any(ours) else 1.0
    if small and not all(ours):
        pays = _PAYS_SMALL
    return whole < pays * sum(map(min, moved))


def _beside(index: BlockIndex, dtype: torch.dtype, tokens: int, whole: bool) -> bool:
    """Whether both gradients take less time beside each other than one after the other."""
    needed = step_time.compute(index, dtype, tokens)
    if not (whole and fits(index, dtype) and fuses(index, dtype, tokens)):
        return needed <= _ROOM
    free = tokens <= _SOON or whole_grad.plan(index, tokens).blocks <= _HALF
    return free and needed <= _ROOM_FUSED


def _in_turn(index: BlockIndex, dtype: torch.dtype, tokens: int) -> float:
    """Microseconds of both gradients of a whole weight, one after the other."""
    each = (index, dtype, tokens)
    gradient = min(step_time.masked(*each), step_time.fused(*each))
    return step_time.dense(*each, INPUT) + gradient
