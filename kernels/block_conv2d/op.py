"""`torch.ops.sparse_nas.block_conv2d`: x * W + b with kept blocks of W, and its gradients.

All operators are differentiable, each by the others. Images may lie anyhow, and are given with
their channels last in memory. Values are the kept blocks, or the weight held whole (`whole_of` of
`kernels.block_index`): then the convolutions are dense, and the gradient of the values is masked.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import block_op, calls
from kernels.block_conv2d import reference
from kernels.block_index import BlockIndex, block_of, blocks_of, gather, is_whole
from kernels.block_op import INDEX
from kernels.window import Window

_WALK = "SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation"
_LAYER = f"Tensor values, Tensor? bias, {INDEX}, SymInt out_channels, {_WALK}"
FORWARD = f"block_conv2d(Tensor x, {_LAYER}) -> Tensor"
_GRAD = f"Tensor grad, Tensor values, {INDEX}, SymInt in_channels, SymInt[2] size, {_WALK}"
INPUT_GRAD = f"block_conv2d_input_grad({_GRAD}) -> Tensor"
_SAMPLED = f"Tensor grad, Tensor x, {INDEX}, SymInt[2] block, {_WALK}"
WEIGHT_GRAD = f"block_conv2d_weight_grad({_SAMPLED}) -> Tensor"
MASKED_GRAD = f"block_conv2d_masked_grad({_SAMPLED}) -> Tensor"
Ints = Sequence[int]


def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: Tensor,
    groups: Tensor,
    out_channels: int,
    *walk: Ints,
) -> Tensor:
    name, window = "block_conv2d", _window(walk)
    _out(name, tuple(x.shape), out_channels, window)
    sizes = (out_channels, x.shape[1])
    index = _index(name, x, block_of(values), (lists, groups), sizes, window)
    block_op.check_values(name, values, x, index)
    if bias is not None:
        block_op.check(name, "bias", bias, x, (out_channels,))
    return _on(x).forward(x, values, bias, index, window)


def _input_grad(
    grad: Tensor,
    values: Tensor,
    lists: Tensor,
    groups: Tensor,
    in_channels: int,
    size: Ints,
    *walk: Ints,
) -> Tensor:
    name, window, sizes = "block_conv2d_input_grad", _window(walk), (_channels(grad), in_channels)
    x_shape = (len(grad), in_channels, size[0], size[1])
    out = _out(name, x_shape, sizes[0], window)
    block_op.check(name, "grad", grad, grad, out)
    index = _index(name, grad, block_of(values), (lists, groups), sizes, window)
    block_op.check_values(name, values, grad, index)
    return _on(grad).input_grad(grad, values, index, window, x_shape[2:])


def _weight_grad(
    grad: Tensor, x: Tensor, lists: Tensor, groups: Tensor, block: Ints, *walk: Ints
) -> Tensor:
    return _on(x).weight_grad(
        grad, x, *_walked("weight_grad", grad, x, lists, groups, block, walk)
    )


def _masked_grad(
    grad: Tensor, x: Tensor, lists: Tensor, groups: Tensor, block: Ints, *walk: Ints
) -> Tensor:
    return _on(x).masked_grad(
        grad, x, *_walked("masked_grad", grad, x, lists, groups, block, walk)
    )


def _walked(
    kind: str,
    grad: Tensor,
    x: Tensor,
    lists: Tensor,
    groups: Tensor,
    block: Ints,
    walk: Sequence[Ints],
) -> tuple[BlockIndex, Window]:
    """The index and the window, which fit the output's gradient and x."""
    name, window, out_channels = f"block_conv2d_{kind}", _window(walk), _channels(grad)
    out = _out(name, tuple(x.shape), out_channels, window)
    index = _index(name, x, block, (lists, groups), (out_channels, x.shape[1]), window)
    block_op.check(name, "grad", grad, x, out)
    return index, window


def _window(walk: Sequence[Ints]) -> Window:
    kernel, stride, padding, dilation = ((a, b) for a, b in walk)
    return Window(kernel, stride, padding, dilation)


def _channels(grad: Tensor) -> int:
    return grad.shape[1] if grad.dim() == 4 else 0


def _out(name: str, x: tuple[int, ...], out_channels: int, window: Window) -> tuple[int, ...]:
    """The output's shape."""
    return calls.geometry(x, out_channels, window.kernel, *window.pairs, 1, name).out


def _index(
    name: str,
    x: Tensor,
    block: Ints,
    lists: tuple[Tensor, Tensor],
    sizes: tuple[int, int],
    window: Window,
) -> BlockIndex:
    return block_op.index(name, x, *lists, sizes, block, window.taps)


def _on(x: Tensor) -> Any:
    """The module that computes on x's device."""
    if not x.is_cuda:
        return reference
    from kernels.cuda import block_conv2d  # not at the top: nobody without a GPU needs it

    return block_conv2d


def _fake_forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: Tensor,
    groups: Tensor,
    out_channels: int,
    *walk: Ints,
) -> Tensor:
    return _images(x, (x.shape[0], out_channels, *_window(walk).out(x.shape[2:])))


def _fake_input_grad(
    grad: Tensor,
    values: Tensor,
    lists: Tensor,
    groups: Tensor,
    in_channels: int,
    size: Ints,
    *walk: Ints,
) -> Tensor:
    return _images(grad, (grad.shape[0], in_channels, *size))


def _fake_weight_grad(
    grad: Tensor, x: Tensor, lists: Tensor, groups: Tensor, block: Ints, *walk: Ints
) -> Tensor:
    count = blocks_of(lists, grad.shape[1] // block[0], x.shape[1] // block[1])
    return x.new_empty((count, *block))


def _fake_masked_grad(
    grad: Tensor, x: Tensor, lists: Tensor, groups: Tensor, block: Ints, *walk: Ints
) -> Tensor:
    columns = _window(walk).taps * x.shape[1]
    return x.new_empty((grad.shape[1] // block[0], block[0], columns // block[1], block[1]))


def _images(x: Tensor, shape: Ints) -> Tensor:
    last = torch.channels_last
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last)


def _save_forward(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, values, _, lists, groups, _, *ctx.walk = inputs
    ctx.save_for_backward(x, values, lists, groups)


def _forward_backward(ctx: Any, grad: Tensor) -> Any:
    x, values, *index = ctx.saved_tensors
    of_x, of_values, of_bias, *rest = ctx.needs_input_grad
    sizes = (x.shape[1], x.shape[2:])
    to_values, to_x = block_op.gradients(
        partial(_values_grad, values, grad, x, *index, walk=ctx.walk) if of_values else None,
        partial(_ops().block_conv2d_input_grad, grad, values, *index, *sizes, *ctx.walk)
        if of_x
        else None,
        x,
        partial(_room, grad, x, values, *index, walk=ctx.walk),
        partial(_pixels_grads, grad, x, values, *index)
        if is_whole(values) and _window(ctx.walk).of_pixels
        else None,
    )
    to_bias = grad.sum((0, 2, 3)) if of_bias else None
    return to_x, to_values, to_bias, *(None for _ in rest)


def _save_input_grad(ctx: Any, inputs: Any, output: Tensor) -> None:
    grad, values, lists, groups, _, _, *ctx.walk = inputs
    ctx.save_for_backward(grad, values, lists, groups)


def _input_grad_backward(ctx: Any, twice: Tensor) -> Any:
    grad, values, *index = ctx.saved_tensors
    of_grad, of_values, *rest = ctx.needs_input_grad
    layer = (*index, grad.shape[1])
    return (
        _ops().block_conv2d(twice, values, None, *layer, *ctx.walk) if of_grad else None,
        _values_grad(values, grad, twice, *index, walk=ctx.walk) if of_values else None,
        *(None for _ in rest),
    )


def _save_weight_grad(ctx: Any, inputs: Any, output: Tensor) -> None:
    grad, x, lists, groups, _, *ctx.walk = inputs
    ctx.save_for_backward(grad, x, lists, groups)


def _masked_grad_backward(ctx: Any, twice: Tensor) -> Any:
    grad, x, lists, groups = ctx.saved_tensors
    sizes, window = (grad.shape[1], x.shape[1]), _window(ctx.walk)
    name = "block_conv2d_masked_grad"
    index = _index(name, x, block_of(twice), (lists, groups), sizes, window)
    matrix = twice.reshape(index.out_features, index.in_features)
    return _weight_grad_backward(ctx, gather(matrix, index))


def _weight_grad_backward(ctx: Any, twice: Tensor) -> Any:
    grad, x, *index = ctx.saved_tensors
    of_grad, of_x, *rest = ctx.needs_input_grad
    layer, sizes = (*index, grad.shape[1]), (x.shape[1], x.shape[2:])
    return (
        _ops().block_conv2d(x, twice, None, *layer, *ctx.walk) if of_grad else None,
        _ops().block_conv2d_input_grad(grad, twice, *index, *sizes, *ctx.walk) if of_x else None,
        *(None for _ in rest),
    )


def _values_grad(
    values: Tensor, grad: Tensor, x: Tensor, *index: Tensor, walk: Sequence[Ints]
) -> Any:
    """The gradient of values: at the blocks, or whole as they are."""
    kind = _ops().block_conv2d_masked_grad if is_whole(values) else _ops().block_conv2d_weight_grad
    return kind(grad, x, *index, block_of(values), *walk)


def _pixels_grads(
    grad: Tensor, x: Tensor, values: Tensor, *index: Tensor
) -> tuple[Tensor, Tensor]:
    """Both gradients where a convolution is a linear layer of pixels."""
    given = grad.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)
    of_values, of_x = _ops().block_linear_both_grads(*given, values, *index)
    return of_values, of_x.permute(0, 3, 1, 2)


def _room(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    lists: Tensor,
    groups: Tensor,
    *,
    walk: Sequence[Ints],
) -> bool:
    from kernels.cuda import block_linear  # not at the top: nobody without a GPU needs it

    index, window = _walked("masked_grad", grad, x, lists, groups, block_of(values), walk)
    pixels = grad.numel() // grad.shape[1]
    return block_linear.room(index, x.dtype, pixels, is_whole(values), window)


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
block_op.autocast("block_conv2d")
