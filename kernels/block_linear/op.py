"""`torch.ops.sparse_nas.block_linear`: x W^T + b with kept blocks of W, and its gradients.

All three operators are differentiable, each by the other two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import calls
from kernels.block_linear import reference
from kernels.block_linear.index import NAMES, BlockIndex

_LAYER = "Tensor values, Tensor? bias, Tensor[] index, int out_features"
FORWARD = f"block_linear(Tensor x, {_LAYER}) -> Tensor"
_GRAD = "Tensor grad, Tensor values, Tensor[] index, int in_features"
INPUT_GRAD = f"block_linear_input_grad({_GRAD}) -> Tensor"
WEIGHT_GRAD = "block_linear_weight_grad(Tensor grad, Tensor x, Tensor[] index) -> Tensor"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: list[Tensor], out_features: int
) -> Tensor:
    found = _checked("block_linear", x, index, out_features, x.shape[-1] if x.dim() else 0)
    _check("values", values, x, _shape(index, out_features, x.shape[-1]))
    if bias is not None:
        _check("bias", bias, x, (out_features,))
    tokens = x.reshape(-1, x.shape[-1])
    return _on(x).forward(tokens, values, bias, found).view(*x.shape[:-1], out_features)


def _input_grad(grad: Tensor, values: Tensor, index: list[Tensor], in_features: int) -> Tensor:
    out = grad.shape[-1] if grad.dim() else 0
    found = _checked("block_linear_input_grad", grad, index, out, in_features)
    _check("values", values, grad, _shape(index, out, in_features))
    tokens = grad.reshape(-1, out)
    return _on(grad).input_grad(tokens, values, found).view(*grad.shape[:-1], in_features)


def _weight_grad(grad: Tensor, x: Tensor, index: list[Tensor]) -> Tensor:
    out = grad.shape[-1] if grad.dim() else 0
    found = _checked("block_linear_weight_grad", x, index, out, x.shape[-1] if x.dim() else 0)
    _check("grad", grad, x, (*x.shape[:-1], out))
    return _on(x).weight_grad(grad.reshape(-1, out), x.reshape(-1, x.shape[-1]), found)


def _on(x: Tensor) -> Any:
    """The module that computes on x's device."""
    if not x.is_cuda:
        return reference
    from kernels.cuda import block_linear  # not at the top: nobody without a GPU needs it

    return block_linear


def _checked(name: str, x: Tensor, index: list[Tensor], out: int, channels: int) -> BlockIndex:
    """The index, whose shapes fit a weight (out, channels) and whose tensors lie on x's device."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: x must be one of {_DTYPES}, got {x.dtype}")
    kinds = {(part.dtype, part.device, part.is_contiguous()) for part in index}
    if len(index) != len(NAMES) or kinds != {(torch.int32, x.device, True)}:
        raise ValueError(
            f"{name}: index must be {len(NAMES)} contiguous int32 tensors on {x.device}, the "
            f"tensors of a BlockIndex, got {len(index)}: {kinds}"
        )
    rows, columns = len(index[0]) - 1, len(index[3]) - 1
    if not out or not channels or out % rows or channels % columns:
        raise ValueError(
            f"{name}: the index is of {rows} x {columns} blocks; it does not fit a weight of "
            f"out={out}, in={channels}"
        )
    return BlockIndex(out, channels, *index)


def _check(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    found = (tensor.dtype, tensor.device, tuple(tensor.shape))
    if found != (x.dtype, x.device, shape):
        raise ValueError(
            f"block_linear: {name} must be {x.dtype} {shape} on {x.device}, as x and the index "
            f"are, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def _shape(index: list[Tensor], out: int, channels: int) -> tuple[int, int, int]:
    """Of values."""
    columns, starts, column_starts = index[1], index[0], index[3]
    return len(columns), out // (len(starts) - 1), channels // (len(column_starts) - 1)


def _fake_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: list[Tensor], out_features: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _fake_input_grad(
    grad: Tensor, values: Tensor, index: list[Tensor], in_features: int
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], in_features))


def _fake_weight_grad(grad: Tensor, x: Tensor, index: list[Tensor]) -> Tensor:
    return x.new_empty(_shape(index, grad.shape[-1], x.shape[-1]))


def _save_forward(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, values, _, index, _ = inputs
    ctx.save_for_backward(x, values, *index)


def _forward_backward(ctx: Any, grad: Tensor) -> Any:
    x, values, *index = ctx.saved_tensors
    of_x, of_values, of_bias, *_ = ctx.needs_input_grad
    return (
        _ops().block_linear_input_grad(grad, values, index, x.shape[-1]) if of_x else None,
        _ops().block_linear_weight_grad(grad, x, index) if of_values else None,
        grad.reshape(-1, grad.shape[-1]).sum(0) if of_bias else None,
        [None] * len(index),
        None,
    )


def _save_input_grad(ctx: Any, inputs: Any, output: Tensor) -> None:
    grad, values, index, _ = inputs
    ctx.save_for_backward(grad, values, *index)


def _input_grad_backward(ctx: Any, twice: Tensor) -> Any:
    grad, values, *index = ctx.saved_tensors
    of_grad, of_values, *_ = ctx.needs_input_grad
    out = grad.shape[-1]
    return (
        _ops().block_linear(twice, values, None, index, out) if of_grad else None,
        _ops().block_linear_weight_grad(grad, twice, index) if of_values else None,
        [None] * len(index),
        None,
    )


def _save_weight_grad(ctx: Any, inputs: Any, output: Tensor) -> None:
    grad, x, index = inputs
    ctx.save_for_backward(grad, x, *index)


def _weight_grad_backward(ctx: Any, twice: Tensor) -> Any:
    grad, x, *index = ctx.saved_tensors
    of_grad, of_x, *_ = ctx.needs_input_grad
    return (
        _ops().block_linear(x, twice, None, index, grad.shape[-1]) if of_grad else None,
        _ops().block_linear_input_grad(grad, twice, index, x.shape[-1]) if of_x else None,
        [None] * len(index),
    )


def _ops() -> Any:
    return torch.ops.sparse_nas


def _autocast(name: str, device: str) -> None:
    """Under autocast x, values and bias are cast as those of `F.linear`, float64 not."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    off = torch._C.DispatchKeySet(key)

    def run(*given: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(off):
            return getattr(_ops(), name)(*(_cast(part, dtype) for part in given))

    calls.FRAGMENT.impl(name, run, f"Autocast{device.upper()}")  # type: ignore[no-untyped-call]


def _cast(part: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(part, Tensor) and part.is_floating_point()
    return part.to(dtype) if floating and part.dtype is not torch.float64 else part


def _define(
    schema: str, run: Any, fake: Any, save: Callable[..., None], backward: Callable[..., Any]
) -> None:
    calls.define(schema, run, fake, run)
    name = schema.split("(")[0]
    torch.library.register_autograd(
        f"sparse_nas::{name}", backward, setup_context=save, lib=calls.FRAGMENT
    )


_define(FORWARD, _forward, _fake_forward, _save_forward, _forward_backward)
_define(INPUT_GRAD, _input_grad, _fake_input_grad, _save_input_grad, _input_grad_backward)
_define(WEIGHT_GRAD, _weight_grad, _fake_weight_grad, _save_weight_grad, _weight_grad_backward)
_autocast("block_linear", "cpu")
_autocast("block_linear", "cuda")
