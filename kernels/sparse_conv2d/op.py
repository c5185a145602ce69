"""`torch.ops.sparse_nas.sparse_conv2d`: act(x * W + b) with a packed weight.

`sparse_conv2d.residual` adds a tensor of the result's shape before the activation.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, bfloat16, channels_last, get_num_threads

from kernels import calls
from kernels.blob import CONV2D, shape_of
from kernels.native.library import library
from kernels.packed import check_blob, unpack
from kernels.reference import activate
from kernels.sparse_conv2d import reference

SCHEMA = (
    "sparse_conv2d(Tensor x, Tensor weight, Tensor? bias, int out_channels, int[2] kernel_size, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, "
    'str activation="none") -> Tensor'
)

ADDED = (
    "sparse_conv2d.residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual, "
    "int out_channels, int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation, "
    'int groups, str activation="none") -> Tensor'
)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
) -> Tensor:
    walk = (kernel_size, stride, padding, dilation, groups, activation)
    if x.dtype is bfloat16:
        return calls.in_float32(_run, x, weight, bias, out_channels, *walk)
    code = calls.activation_code("sparse_conv2d", activation)
    calls.check_tensors("sparse_conv2d", x, weight, bias, out_channels)
    pairs = (tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
    geometry = calls.geometry(x.shape, out_channels, *pairs, groups)
    lib = library()
    if lib is None:
        _check_fit(x, weight, out_channels, kernel_size, groups)
        x, dense = x.contiguous(), unpack(weight)
        return reference.sparse_conv2d(x, dense, bias, *pairs[1:], groups, activation)
    x, y = x.contiguous(), x.new_empty(*geometry.out)
    arguments = (
        x.data_ptr(),
        geometry.numbers,
        weight.data_ptr(),
        weight.numel(),
        calls.pointer(bias),
        y.data_ptr(),
        code,
        get_num_threads(),
    )
    if lib.conv2d(*arguments):
        refusal = partial(_mismatch, x, weight, out_channels, kernel_size, groups)
        calls.settle(lib, lib.conv2d, arguments, weight, check_blob, refusal)
    return y


def _check_fit(
    x: Tensor, weight: Tensor, out_channels: int, kernel_size: Sequence[int], groups: int
) -> None:
    check_blob(weight)
    shape = shape_of(weight.numpy())
    given = (CONV2D, out_channels, tuple(kernel_size), groups, x.shape[1])
    packed = (shape.operation, shape.rows, shape.kernel, shape.groups, shape.channels * groups)
    if given != packed:
        raise ValueError(_mismatch(x, weight, out_channels, kernel_size, groups))


def _mismatch(
    x: Tensor, weight: Tensor, out_channels: int, kernel_size: Sequence[int], groups: int
) -> str:
    packed = shape_of(weight.numpy())
    return (
        f"sparse_conv2d: the weight was packed as {packed.weight_shape} with "
        f"groups={packed.groups}; it does not fit in={x.shape[1]}, out_channels={out_channels}, "
        f"kernel_size={tuple(kernel_size)}, groups={groups}"
    )


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
) -> Tensor:
    size = [
        calls.out_size(*axis)
        for axis in zip(x.shape[2:], kernel_size, stride, padding, dilation, strict=True)
    ]
    y = x.new_empty((x.shape[0], out_channels, *size))
    return y.contiguous(memory_format=channels_last) if x.is_cuda else y


def _run_cuda(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
) -> Tensor:
    from kernels.cuda import conv2d  # not at the top: nobody without a GPU needs it

    walk = (kernel_size, stride, padding, dilation, groups, activation)
    return conv2d.run(x, weight, bias, out_channels, *walk)


def _added(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *walk: Any, **rest: Any
) -> Tensor:
    walk, activation = _parted(walk, rest)
    calls.activation_code("sparse_conv2d", activation)
    y = _run(x, weight, bias, *walk)
    calls.check_residual("sparse_conv2d", residual, x, tuple(y.shape))
    return activate(y.add_(residual), activation)


def _added_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *walk: Any, **rest: Any
) -> Tensor:
    return _fake(x, weight, bias, *walk, **rest)


def _added_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *walk: Any, **rest: Any
) -> Tensor:
    from kernels.cuda import conv2d

    walk, activation = _parted(walk, rest)
    run: Any = conv2d.run
    added: Tensor = run(x, weight, bias, *walk, activation=activation, residual=residual)
    return added


def _parted(walk: tuple[Any, ...], rest: dict[str, Any]) -> tuple[tuple[Any, ...], str]:
    """The six arguments that say how it walks, and the activation."""
    return walk[:6], walk[6] if len(walk) > 6 else rest.get("activation", "none")


calls.define(SCHEMA, _run, _fake, _run_cuda)
calls.define(ADDED, _added, _added_fake, _added_cuda)
for _name in ("sparse_conv2d", "sparse_conv2d.residual"):
    calls.autocast(_name, "cuda", calls.packed_dtype)
