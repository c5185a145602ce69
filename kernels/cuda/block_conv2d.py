"""`torch.ops.sparse_nas.block_conv2d` and its gradients on a GPU: Triton's kernels, or PyTorch."""

from collections.abc import Sequence
from math import prod
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.block_conv2d import reference
from kernels.block_index import BlockIndex, flat, unflat
from kernels.cuda import block_linear, linear
from kernels.cuda.conv2d import aligned, empty, images, pixels
from kernels.cuda.rounding import narrowed, precision
from kernels.window import Pair, Window

ONE = (1, 1)
_SWITCH = Lock()  # autograd has a thread for each device


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex, window: Window
) -> Tensor:
    """See `kernels.block_conv2d.reference`."""
    if not block_linear.takes(x, index):
        return reference.forward(x, values, bias, index, window)
    last, out = aligned(x), (len(x), index.out_features, *window.out(x.shape[2:]))
    if window.of_pixels:
        return images(block_linear.forward(pixels(last), values, bias, index), out)
    from kernels.cuda import implicit, many, whole  # not at the top: Triton comes where needed

    if not _pays(index, x.dtype, out):
        weight = unflat(whole.matrix_of(values, index), window.kernel)
        return aligned(F.conv2d(last, weight, bias, *window.pairs))
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
    from kernels.cuda import implicit, many, whole

    if not _pays(index, grad.dtype, grad.shape):
        weight = unflat(whole.matrix_of(values, index), window.kernel)
        return aligned(_dense_gradient(aligned(grad), empty(grad, out), weight, window, 0))
    turned = turned_window(window)
    full = Window(window.kernel, ONE, window.padding, window.dilation).out(size)
    last, walk = (
        aligned(spread(grad, window.stride, full)),
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
    from kernels.cuda import sampled_conv2d, whole

    if not _pays(index, x.dtype, grad.shape, of_weight=True):
        weight = empty(grad, (index.out_features, index.channels, *window.kernel))
        found = _dense_gradient(aligned(grad), aligned(x), weight, window, 1)
        return whole.blocks_of(flat(found), index)
    given = (index, aligned(grad), aligned(x), window)
    with torch.cuda.device(x.device):
        return sampled_conv2d.weight_grad(*given, precision=precision())


def _pays(
    index: BlockIndex, dtype: torch.dtype, out: Sequence[int], of_weight: bool = False
) -> bool:
    """Whether our kernels are faster than PyTorch's, or that would round otherwise."""
    if narrowed(dtype, True) not in ("", "matmul conv"):
        return True
    return block_linear.pays(index, dtype, prod(out) // out[1], of_weight)


def _dense_gradient(grad: Tensor, x: Tensor, weight: Tensor, window: Window, which: int) -> Tensor:
    """PyTorch's gradient of x (0) or of the weight (1), its sums in one order."""
    how = (None, *map(list, window.pairs), False, [0, 0], 1, [which == 0, which == 1, False])
    cudnn = torch.backends.cudnn
    with _SWITCH:
        before, cudnn.deterministic = cudnn.deterministic, True
        try:
            found: Tensor = torch.ops.aten.convolution_backward(grad, x, weight, *how)[which]
        finally:
            cudnn.deterministic = before
    return found


def turned_window(window: Window) -> Window:
    """That of the flipped kernel, which leads from outputs at a stride of 1 back to inputs."""
    sides = zip(window.kernel, window.padding, window.dilation, strict=True)
    top, left = (apart * (taps - 1) - padding for taps, padding, apart in sides)
    return Window(window.kernel, ONE, (top, left), window.dilation)


def spread(x: Tensor, stride: Pair, size: Pair) -> Tensor:
    """Images (N, C, *size), channels last: x at every stride, zeros elsewhere."""
    if stride == ONE:
        return x
    wide = empty(x, (*x.shape[:2], *size)).zero_()
    wide[:, :, :: stride[0], :: stride[1]] = x
    return wide
