"""`torch.ops.sparse_nas.block_conv2d` and its gradients on a GPU: Triton's kernels, or PyTorch."""

import torch
from torch import Tensor

from kernels.block_conv2d import reference
from kernels.block_index import BlockIndex
from kernels.cuda import block_linear, linear
from kernels.cuda.conv2d import aligned, images, pixels
from kernels.cuda.rounding import precision
from kernels.window import Pair, Window

ONE = (1, 1)


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex, window: Window
) -> Tensor:
    """See `kernels.block_conv2d.reference`."""
    if not block_linear.takes(x, index):
        return reference.forward(x, values, bias, index, window)
    last, out = aligned(x), (len(x), index.out_features, *window.out(x.shape[2:]))
    if window.of_pixels:
        return images(block_linear.forward(pixels(last), values, bias, index), out)
    from kernels.cuda import implicit, many  # not at the top: Triton comes where it is needed

    walk = many.by_rows(index, linear.aligned(values))
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device(x.device):
        return implicit.conv2d(walk, last, bias, window, out, rounding=precision())


def input_grad(
    grad: Tensor, values: Tensor, index: BlockIndex, window: Window, size: Pair
) -> Tensor:
    """See `kernels.block_conv2d.reference`.

    At a stride of 1 it is the convolution of the output's gradient with the flipped kernel; else
    zeros stand between the pixels of that gradient.
    """
    if not block_linear.takes(grad, index):
        return reference.input_grad(grad, values, index, window, size)
    out = (len(grad), index.channels, *size)
    if window.kernel == ONE and window.padding == (0, 0):
        found = block_linear.input_grad(pixels(aligned(grad)), values, index)
        small = images(found, (*out[:2], *grad.shape[2:]))
        return spread(small, window.stride, size)
    from kernels.cuda import implicit, many

    turned = turned_window(window)
    whole = Window(window.kernel, ONE, window.padding, window.dilation).out(size)
    last, walk = (
        aligned(spread(grad, window.stride, whole)),
        many.by_columns(index, linear.aligned(values)),
    )
    with torch.cuda.device(grad.device):
        return implicit.conv2d(walk, last, None, turned, out, rounding=precision())


def weight_grad(grad: Tensor, x: Tensor, index: BlockIndex, window: Window) -> Tensor:
    """See `kernels.block_conv2d.reference`."""
    if not block_linear.takes(x, index):
        return reference.weight_grad(grad, x, index, window)
    if window.of_pixels:
        return block_linear.weight_grad(pixels(aligned(grad)), pixels(aligned(x)), index)
    from kernels.cuda import sampled_conv2d

    given = (index, aligned(grad), aligned(x), window)
    with torch.cuda.device(x.device):
        return sampled_conv2d.weight_grad(*given, precision=precision())


def turned_window(window: Window) -> Window:
    """That of the flipped kernel, which leads from outputs at a stride of 1 back to inputs."""
    sides = zip(window.kernel, window.padding, window.dilation, strict=True)
    top, left = (apart * (taps - 1) - padding for taps, padding, apart in sides)
    return Window(window.kernel, ONE, (top, left), window.dilation)


def spread(x: Tensor, stride: Pair, size: Pair) -> Tensor:
    """Images (N, C, *size), channels last: x at every stride, zeros elsewhere."""
    if stride == ONE:
        return x
    shape, last = (*x.shape[:2], *size), torch.channels_last
    wide = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=last).zero_()
    wide[:, :, :: stride[0], :: stride[1]] = x
    return wide
