"""What the operators share: checks of arguments, and errors that name the values."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.native import library as native

FRAGMENT = torch.library.Library("sparse_nas", "FRAGMENT")  # type: ignore[no-untyped-call]
ACTIVATIONS = {"none": 0, "relu": 1, "relu6": 2, "silu": 3, "gelu": 4}


def define(schema: str, run: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Adds an inference operator to `torch.ops.sparse_nas`."""
    name = schema.split("(")[0]
    tags = (torch.Tag.pt2_compliant_tag,)
    FRAGMENT.define(schema, tags=tags)  # type: ignore[no-untyped-call]
    FRAGMENT.impl(name, run, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"sparse_nas::{name}", fake, lib=FRAGMENT)


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
    """Checks dtypes, devices and the bias's shape.

    Raises:
        ValueError: names the tensor, the rule and what was given.
    """
    if x.dtype is not torch.float32:
        raise ValueError(f"{name}: x must be float32, got {x.dtype}")
    flat = blob.dtype is torch.uint8 and blob.dim() == 1 and blob.is_contiguous()
    if not flat or blob.is_cuda:
        raise ValueError(
            f"{name}: the packed weight must be a contiguous (n,) uint8 tensor on x's device, "
            f"got {tuple(blob.shape)} {blob.dtype} on {blob.device}"
        )
    if bias is None:
        return
    if bias.dtype is not torch.float32 or bias.shape != (rows,) or bias.is_cuda:
        raise ValueError(
            f"{name}: bias must be float32 ({rows},) on x's device, "
            f"got {bias.dtype} {tuple(bias.shape)} on {bias.device}"
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


def conv2d_shape(
    x: Tensor,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """Shape of a convolution's output.

    Raises:
        ValueError: x is not (N, C, H, W), an argument is out of range, or the kernel is larger
            than the padded input.
    """
    if x.dim() != 4:
        raise ValueError(f"sparse_conv2d: x must be (N, C, H, W), got {tuple(x.shape)}")
    if min(stride) < 1 or min(dilation) < 1 or min(kernel) < 1 or min(padding) < 0:
        raise ValueError(
            "sparse_conv2d: kernel_size, stride and dilation must be positive and padding not "
            f"negative, got {list(kernel)}, {list(stride)}, {list(dilation)}, {list(padding)}"
        )
    images, _, height, width = x.shape
    out_h = out_size(height, kernel[0], stride[0], padding[0], dilation[0])
    out_w = out_size(width, kernel[1], stride[1], padding[1], dilation[1])
    if out_h < 1 or out_w < 1:
        raise ValueError(
            f"sparse_conv2d: kernel {list(kernel)} with dilation {list(dilation)} is larger than "
            f"the padded input, {height}x{width} with padding {list(padding)}"
        )
    return (images, out_channels, out_h, out_w)


def pair(values: Sequence[int]) -> tuple[int, int]:
    """(height, width) of an int[2] argument, where one number stands for both."""
    return (values[0], values[-1])
