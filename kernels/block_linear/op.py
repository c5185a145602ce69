"""`torch.ops.sparse_nas.block_linear`: x W^T + b with kept blocks of W, and its gradients.

All operators are differentiable, each by the others. Values are the kept blocks, or the weight
held whole (`kernels.block_index.whole_of`): then the products are dense, and the gradient of the
values is masked.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import block_op
from kernels.block_index import BlockIndex, block_of, blocks_of, gather, is_whole, whole_shape
from kernels.block_linear import reference
from kernels.block_op import INDEX

_LAYER = f"Tensor values, Tensor? bias, {INDEX}, SymInt out_features"
FORWARD = f"block_linear(Tensor x, {_LAYER}) -> Tensor"
_GRAD = f"Tensor grad, Tensor values, {INDEX}, SymInt in_features"
INPUT_GRAD = f"block_linear_input_grad({_GRAD}) -> Tensor"
_SAMPLED = f"Tensor grad, Tensor x, {INDEX}, SymInt height, SymInt width"
WEIGHT_GRAD = f"block_linear_weight_grad({_SAMPLED}) -> Tensor"
MASKED_GRAD = f"block_linear_masked_grad({_SAMPLED}) -> Tensor"
_BOTH = f"Tensor grad, Tensor x, Tensor values, {INDEX}"
BOTH_GRADS = f"block_linear_both_grads({_BOTH}) -> (Tensor, Tensor)"


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: Tensor,
    groups: Tensor,
    out_features: int,
) -> Tensor:
    sizes = out_features, _features(x)
    index = block_op.index("block_linear", x, lists, groups, sizes, block_of(values))
    block_op.check_values("block_linear", values, x, index)
    if bias is not None:
        block_op.check("block_linear", "bias", bias, x, (out_features,))
    tokens = x.reshape(-1, x.shape[-1])
    return _on(x).forward(tokens, values, bias, index).view(*x.shape[:-1], out_features)


def _input_grad(
    grad: Tensor, values: Tensor, lists: Tensor, groups: Tensor, in_features: int
) -> Tensor:
    name, sizes = "block_linear_input_grad", (_features(grad), in_features)
    index = block_op.index(name, grad, lists, groups, sizes, block_of(values))
    block_op.check_values(name, values, grad, index)
    tokens = grad.reshape(-1, grad.shape[-1])
    return _on(grad).input_grad(tokens, values, index).view(*grad.shape[:-1], in_features)


def _weight_grad(
    grad: Tensor, x: Tensor, lists: Tensor, groups: Tensor, height: int, width: int
) -> Tensor:
    return _on(x).weight_grad(*_pair("weight_grad", grad, x, lists, groups, (height, width)))


def _masked_grad(
    grad: Tensor, x: Tensor, lists: Tensor, groups: Tensor, height: int, width: int
) -> Tensor:
    return _on(x).masked_grad(*_pair("masked_grad", grad, x, lists, groups, (height, width)))


def _both_grads(
    grad: Tensor, x: Tensor, values: Tensor, lists: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    given = _pair("both_grads", grad, x, lists, groups, block_of(values))
    block_op.check("block_linear_both_grads", "values", values, x, whole_shape(given[2]))
    of_values, of_x = _on(x).both_grads(*given[:2], values, given[2])
    return of_values, of_x.view(x.shape)


def _pair(
    kind: str, grad: Tensor, x: Tensor, lists: Tensor, groups: Tensor, block: Sequence[int]
) -> tuple[Tensor, Tensor, BlockIndex]:
    """The tokens of the output's gradient and of x, and the index."""
    name, sizes = f"block_linear_{kind}", (_features(grad), _features(x))
    index = block_op.index(name, x, lists, groups, sizes, block)
    block_op.check(name, "grad", grad, x, (*x.shape[:-1], sizes[0]))
    return grad.reshape(-1, sizes[0]), x.reshape(-1, sizes[1]), index


def _features(x: Tensor) -> int:
    return x.shape[-1] if x.dim() else 0


def _on(x: Tensor) -> Any:
    """The module that computes on x's device."""
    if not x.is_cuda:
        return reference
    from kernels.cuda import block_linear  # not at the top: nobody without a GPU needs it

    return block_linear


def _fake_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: Tensor,
    groups: Tensor,
    out_features: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_input_grad(
    grad: Tensor, values: Tensor, lists: Tensor, groups: Tensor, in_features: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _fake_weight_grad(
    grad: Tensor, x: Tensor, lists: Tensor, groups: Tensor, height: int, width: int
) -> Tensor:
    count = blocks_of(lists, grad.shape[-1] // height, x.shape[-1] // width)
    return x.new_empty((count, height, width))


def _fake_masked_grad(
    grad: Tensor, x: Tensor, lists: Tensor, groups: Tensor, height: int, width: int
) -> Tensor:
    return x.new_empty((grad.shape[-1] // height, height, x.shape[-1] // width, width))


def _fake_both_grads(
    grad: Tensor, x: Tensor, values: Tensor, lists: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), x.new_empty(x.shape)


def _save_forward(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, values, _, *index, _ = inputs
    ctx.save_for_backward(x, values, *index)


def _forward_backward(ctx: Any, grad: Tensor) -> Any:
    x, values, *index = ctx.saved_tensors
    of_x, of_values, of_bias, *_ = ctx.needs_input_grad
    to_values, to_x = block_op.gradients(
        partial(_values_grad, values, grad, x, *index) if of_values else None,
        partial(_ops().block_linear_input_grad, grad, values, *index, x.shape[-1])
        if of_x
        else None,
        x,
        partial(_room, grad, x, values, *index),
        partial(_ops().block_linear_both_grads, grad, x, values, *index)
        if is_whole(values)
        else None,
    )
    to_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if of_bias else None
    return to_x, to_values, to_bias, None, None, None


def _save_input_grad(ctx: Any, inputs: Any, output: Tensor) -> None:
    grad, values, *index, _ = inputs
    ctx.save_for_backward(grad, values, *index)


def _input_grad_backward(ctx: Any, twice: Tensor) -> Any:
    grad, values, *index = ctx.saved_tensors
    of_grad, of_values, *_ = ctx.needs_input_grad
    return (
        _ops().block_linear(twice, values, None, *index, grad.shape[-1]) if of_grad else None,
        _values_grad(values, grad, twice, *index) if of_values else None,
        *(None, None, None),
    )


def _save_weight_grad(ctx: Any, inputs: Any, output: Tensor) -> None:
    grad, x, *index, _, _ = inputs
    ctx.save_for_backward(grad, x, *index)


def _masked_grad_backward(ctx: Any, twice: Tensor) -> Any:
    grad, x, lists, groups = ctx.saved_tensors
    name, sizes = "block_linear_masked_grad", (grad.shape[-1], x.shape[-1])
    index = block_op.index(name, x, lists, groups, sizes, block_of(twice))
    return _weight_grad_backward(ctx, gather(twice.reshape(sizes), index))


def _weight_grad_backward(ctx: Any, twice: Tensor) -> Any:
    grad, x, *index = ctx.saved_tensors
    of_grad, of_x, *_ = ctx.needs_input_grad
    return (
        _ops().block_linear(x, twice, None, *index, grad.shape[-1]) if of_grad else None,
        _ops().block_linear_input_grad(grad, twice, *index, x.shape[-1]) if of_x else None,
        *(None, None, None, None),
    )


def _save_both_grads(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _both_grads_backward(ctx: Any, of_values: Tensor, of_x: Tensor) -> Any:
    grad, x, values, *index = ctx.saved_tensors
    sizes = grad.shape[-1], x.shape[-1]
    name, (lists, groups) = "block_linear_both_grads", index
    kept = block_op.index(name, x, lists, groups, sizes, block_of(values))
    blocks = gather(of_values.reshape(sizes), kept)
    of_grad, given_x, given_values, *_ = ctx.needs_input_grad
    to_grad = to_x = to_values = None
    if of_grad:
        to_grad = _ops().block_linear(x, blocks, None, *index, sizes[0])
        to_grad = to_grad + _ops().block_linear(of_x, values, None, *index, sizes[0])
    if given_x:
        to_x = _ops().block_linear_input_grad(grad, blocks, *index, sizes[1])
    if given_values:
        to_values = _values_grad(values, grad, of_x, *index)
    return to_grad, to_x, to_values, None, None


def _values_grad(values: Tensor, grad: Tensor, x: Tensor, *index: Tensor) -> Any:
    """The gradient of values: at the blocks, or whole as they are."""
    kind = _ops().block_linear_masked_grad if is_whole(values) else _ops().block_linear_weight_grad
    return kind(grad, x, *index, *block_of(values))


def _room(grad: Tensor, x: Tensor, values: Tensor, lists: Tensor, groups: Tensor) -> bool:
    from kernels.cuda import block_linear  # not at the top: nobody without a GPU needs it

    name, sizes = "block_linear_masked_grad", (grad.shape[-1], x.shape[-1])
    index = block_op.index(name, x, lists, groups, sizes, block_of(values))
    return block_linear.room(index, x.dtype, x.numel() // x.shape[-1], is_whole(values))


def _ops() -> Any:
    return torch.ops.sparse_nas


block_op.define(FORWARD, _forward, _fake_forward, _save_forward, _forward_backward)
block_op.define(INPUT_GRAD, _input_grad, _fake_input_grad, _save_input_grad, _input_grad_backward)
block_op.define(
    WEIGHT_GRAD, _weight_grad, _fake_weight_grad, _save_weight_grad, _weight_grad_backward
)
block_op.define(
    MASKED_GRAD, _masked_grad, _fake_masked_grad, _save_weight_grad, _masked_grad_backward
)
block_op.define(BOTH_GRADS, _both_grads, _fake_both_grads, _save_both_grads, _both_grads_backward)
block_op.autocast("block_linear")
