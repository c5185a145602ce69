"""What the operators share: checks of arguments, and errors that name the values."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels.native import library as native

DIRECT: dict[object, Callable[..., Tensor]] = {}  # what an operator runs on CPU tensors
FRAGMENT = torch.library.Library("sparse_nas", "FRAGMENT")  # type: ignore[no-untyped-call]
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2, "silu": 3, "gelu": 4}


def define(
    schema: str,
    run: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    cuda: Callable[..., Tensor] | None = None,
) -> None:
    """Adds an inference operator to `torch.ops.sparse_nas`, for the CPU and perhaps for GPUs.

    Its name may end in that of an overload: `sparse_linear.residual`.
    """
    name = schema.split("(")[0]
    tags = (torch.Tag.pt2_compliant_tag,)
    FRAGMENT.define(schema, tags=tags)  # type: ignore[no-untyped-call]
    FRAGMENT.impl(name, run, "CPU")  # type: ignore[no-untyped-call]
    if cuda is not None:
        FRAGMENT.impl(name, cuda, "CUDA")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sparse_nas::{name}", fake, lib=FRAGMENT)
    DIRECT[operator(name)] = run


def operator(name: str) -> Callable[..., Tensor]:
    """The operator of a name, perhaps with that of an overload behind a dot."""
    packet, _, overload = name.partition(".")
    found: Callable[..., Tensor]
    found = getattr(getattr(torch.ops.sparse_nas, packet), overload or "default")
    return found


def autocast(name: str, device: str, dtype_of: Callable[..., torch.dtype]) -> None:
    """Under autocast an operator's floating tensors, but float64, are cast to a dtype.

    Args:
        name: of the operator.
        device: `cpu` or `cuda`.
        dtype_of: gives that dtype for the operator's arguments.
    """
    off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def run(*given: Any, **rest: Any) -> Tensor:
        dtype = dtype_of(*given)
        with torch._C._ExcludeDispatchKeyGuard(off):
            return operator(name)(*(_cast(part, dtype) for part in given), **rest)

    FRAGMENT.impl(name, run, f"Autocast{device.upper()}")  # type: ignore[no-untyped-call]


def _cast(part: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(part, Tensor) and part.is_floating_point()
    return part.to(dtype) if floating and part.dtype is not torch.float64 else part


def packed_dtype(x: Tensor, weight: Tensor, *rest: object) -> torch.dtype:
    """The dtype of a weight that was packed on a GPU; of one that only stands for it, a guess."""
    if type(weight) not in (Tensor, torch.nn.Parameter):  # of torch.compile
        return torch.get_autocast_dtype("cuda")
    from kernels.cuda import blob  # not at the top: nobody without a GPU needs it

    return blob.read(weight).values.dtype


def in_float32(run: Callable[..., Tensor], x: Tensor, *rest: object) -> Tensor:
    """What `run` gives for an x in bfloat16: computed in float32, rounded at the end."""
    wide = (r.float() if isinstance(r, Tensor) and r.dtype is x.dtype else r for r in rest)
    return run(x.float(), *wide).bfloat16()


def check_residual(name: str, residual: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    """Checks what is added to a result before its activation.

    Raises:
        ValueError: it has not the result's shape, dtype and device.
    """
    like = (residual.dtype, residual.device) == (x.dtype, x.device)
    if not like or tuple(residual.shape) != shape:
        raise ValueError(
            f"{name}: residual must be {x.dtype} {shape} on {x.device}, "
            f"got {residual.dtype} {tuple(residual.shape)} on {residual.device}"
        )


def activation_code(name: str, activation: str) -> int:
    """The number of an activation in the C core.

    Raises:
        ValueError: it is not one of `ACTIVATIONS`.
    """
    code = ACTIVATIONS.get(activation)
    if code is None:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"{name}: activation must be one of {known}, got {activation!r}")
    return code


def check_tensors(name: str, x: Tensor, blob: Tensor, bias: Tensor | None, rows: int) -> None:
    """Checks devices, dtypes and shapes.

    Raises:
        ValueError: names the tensor, the rule and what was given.
    """
    if x.dtype is not torch.float32:
        raise ValueError(f"{name}: x must be float32 or bfloat16, got {x.dtype}")
    if not (x.is_cpu and blob.is_cpu and (bias is None or bias.is_cpu)):
        places = [str(tensor.device) for tensor in (x, blob, bias) if tensor is not None]
        raise ValueError(f"{name}: all tensors must be on the CPU, got {', '.join(places)}")
    if blob.dtype is not torch.uint8 or blob.dim() != 1 or not blob.is_contiguous():
        raise ValueError(
            f"{name}: the packed weight must be a contiguous (n,) uint8 tensor, "
            f"got {tuple(blob.shape)} {blob.dtype}"
        )
    if bias is None:
        return
    if bias.dtype is not torch.float32 or bias.shape != (rows,) or not bias.is_contiguous():
        raise ValueError(
            f"{name}: bias must be contiguous float32 ({rows},), "
            f"got {bias.dtype} {tuple(bias.shape)} strides {bias.stride()}"
        )


def settle(
    lib: native.Library,
    function: Callable[..., int],
    arguments: tuple[object, ...],
    blob: Tensor,
    check: Callable[[Tensor], None],
    mismatch: Callable[[], str],
) -> None:
    """After a refusal: checks a blob that the C core has not met as a whole, and calls again.

    Raises:
        ValueError: the blob is malformed, or does not fit the arguments.
    """
    check(blob)
    lib.mark_checked(blob.data_ptr(), blob.numel())
    if function(*arguments) != native.OK:
        raise ValueError(mismatch())


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Length of one axis of a convolution's output."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers lie; None for None."""
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class Geometry:
    """A convolution beside its tensors: the output's shape, and the numbers for the C core."""

    out: tuple[int, int, int, int]
    numbers: ctypes.Array[ctypes.c_int64]


@lru_cache(maxsize=4096)
def geometry(
    x: tuple[int, ...],
    out_channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    name: str = "sparse_conv2d",
) -> Geometry:
    """The geometry of a convolution of an input of shape `x`; name: of its operator.

    Raises:
        ValueError: x is not (N, C, H, W), an argument is out of range, or the kernel is larger
            than the padded input.
    """
    if len(x) != 4:
        raise ValueError(f"{name}: x must be (N, C, H, W), got {tuple(x)}")
    if min(*kernel, *stride, *dilation, groups) < 1 or min(padding) < 0:
        raise ValueError(
            f"{name}: kernel_size, stride, dilation and groups must be positive and padding "
            f"not negative, got {kernel}, {stride}, {dilation}, {groups}, {padding}"
        )
    axes = zip(x[2:], kernel, stride, padding, dilation, strict=True)
    height, width = (out_size(*axis) for axis in axes)
    if height < 1 or width < 1:
        raise ValueError(
            f"{name}: kernel {kernel} with dilation {dilation} is larger than the padded "
            f"input, {x[2]}x{x[3]} with padding {padding}"
        )
    numbers = (*x, out_channels, *kernel, *stride, *padding, *dilation, groups, height, width)
    array = (ctypes.c_int64 * len(numbers))(*numbers)
    return Geometry((x[0], out_channels, height, width), array)
