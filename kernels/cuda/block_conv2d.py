"""`torch.ops.sparse_nas.block_conv2d` and its gradients on a GPU: Triton's kernels, or PyTorch."""

from collections.abc import Sequence
from math import prod
from threading import Lock

import torch
from torch import Tensor

from kernels.block_conv2d import reference
from kernels.block_index import BlockIndex, flat, is_whole, unflat, whole_shape
from kernels.cuda import block_linear, linear, step_time, ways
from kernels.cuda.conv2d import aligned, empty, images, pixels
from kernels.cuda.rounding import narrowed, precision
from kernels.cuda.step_time import INPUT, OUTPUT, PARTS, WEIGHT
from kernels.window import Pair, Window

ONE = (1, 1)
_SLOWER = 1.17  # times as long as a linear layer of as many multiply-adds
_LITTLE = 2e9  # FLOP; of fewer, cuDNN leaves room for a gradient beside another
_LEAST = 5e8  # of fewer, what cuDNN's benchmark takes leaves none
_LARGE = 3e10  # of as many, what a search finds is as fast as what is given without, or faster
_NARROW = 1.6  # times as long as their multiply-adds say cuDNN's take of fewer than 128 channels
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

    if is_whole(values) or not pays(index, x.dtype, out, window):
        weight = unflat(whole.matrix_of(values, index), window.kernel)
        searched = _searched(values, index, prod(out) // out[1], window)
        return _dense(last, weight, bias, window, searched)
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

    if is_whole(values) or not pays(index, grad.dtype, grad.shape, window, INPUT):
        weight = unflat(whole.matrix_of(values, index), window.kernel)
        searched = _searched(values, index, grad.numel() // grad.shape[1], window)
        return _dense(aligned(grad), weight, None, window, searched, to=size)
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

    if _alike(x.dtype) and not pays(index, x.dtype, grad.shape, window, WEIGHT):
        found = _dense_weight_grad(aligned(grad), aligned(x), index, window)
        return whole.blocks_of(flat(found), index)
    given = (index, aligned(grad), aligned(x), window)
    with torch.cuda.device(x.device):
        return sampled_conv2d.weight_grad(*given, precision=precision())


def masked_grad(grad: Tensor, x: Tensor, index: BlockIndex, window: Window) -> Tensor:
    """See `kernels.block_conv2d.reference`."""
    if not block_linear.takes(x, index):
        return reference.masked_grad(grad, x, index, window)
    if window.of_pixels:
        return block_linear.masked_grad(pixels(aligned(grad)), pixels(aligned(x)), index)
    from kernels.cuda import whole

    if _alike(x.dtype):
        found = _dense_weight_grad(aligned(grad), aligned(x), index, window)
        matrix = flat(found).contiguous()
        whole.mask_(matrix, index)
    else:
        matrix = whole.matrix_of(weight_grad(grad, x, index, window), index)
    return matrix.view(whole_shape(index))


def pays(
    index: BlockIndex,
    dtype: torch.dtype,
    out: Sequence[int],
    window: Window,
    part: str = OUTPUT,
) -> bool:
    """Whether our kernels are faster than PyTorch's; of what is dilated that was not measured."""
    if window.dilation != ONE:
        return True
    each = (index, dtype, prod(out) // out[1])
    dense = _dense_us(*each, part) + step_time.moving(index, dtype)
    return _blocks_us(*each, window, part) <= dense


def trains_dense(index: BlockIndex, dtype: torch.dtype, pixels: int, window: Window) -> bool:
    """Whether a step of training takes less time where the weight is held whole.

    As measured, else by a rule of thumb.
    """
    if window.of_pixels:
        return block_linear.trains_dense(index, dtype, pixels)
    if way := ways.fastest(ways.case_of(index, dtype, pixels, window)):
        return way.whole
    if not block_linear.fits(index, dtype):
        return True
    each = (index, dtype, pixels)
    times = [(_blocks_us(*each, window, part), _dense_us(*each, part)) for part in PARTS]
    dense = sum(time for _, time in times) + step_time.zeroing(index, dtype)
    measured = window.dilation == ONE and _alike(dtype)
    small = _flop(index, pixels) < _LITTLE
    return measured and block_linear.whole_pays(index, dtype, times, dense, small)


def _alike(dtype: torch.dtype) -> bool:
    """Whether PyTorch's gradient of a convolution's weight rounds it as our kernels do."""
    return narrowed(dtype, True) in ("", "matmul conv")


def _blocks_us(
    index: BlockIndex, dtype: torch.dtype, pixels: int, window: Window, part: str
) -> float:
    """Microseconds of our kernels on an H200; behind a stride zeros stand in the gradient.

    A launch; of a gradient what 64 pixels after another wait, until they are shared out; of a
    product its multiply-adds, or the steps of the longest row of blocks.
    """
    spread = prod(window.stride) if part == INPUT else 1
    each = _SLOWER * step_time.factor(index, dtype, part) * spread
    needed = each * step_time.compute(index, dtype, pixels)
    if part == WEIGHT:
        return 2.5 + min(0.48 * pixels / 64, 6) + needed
    return 2.4 + max(needed, 0.2 * step_time.steps_of(index, part))


def _dense_us(index: BlockIndex, dtype: torch.dtype, pixels: int, part: str) -> float:
    """Microseconds of cuDNN's: a launch, of a gradient longer with more pixels, and products."""
    narrow = min(index.out_features, index.channels) < 128
    needed = step_time.compute(index, dtype, pixels) * (_NARROW if narrow else 1)
    if part == WEIGHT:
        return min(2.5 + 0.103 * pixels**0.5, 14) + 1.05 * needed
    return 7 + 0.95 * needed


def _searched(values: Tensor, index: BlockIndex, pixels: int, window: Window) -> bool:
    """Whether cuDNN is to search for the fastest: as was measured, else by a rule of thumb.

    Where its benchmark is on, as of PyTorch's dense layers, so that these are no faster; but of
    what is small it takes what leaves no room beside it.
    """
    if way := ways.fastest(ways.case_of(index, values.dtype, pixels, window), is_whole(values)):
        return way.searched
    large = _flop(index, pixels) >= _LARGE and values.dtype.itemsize == 2
    return large and torch.backends.cudnn.benchmark


def _dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    searched: bool,
    to: Pair | None = None,
) -> Tensor:
    """PyTorch's convolution, channels last; or what leads back from its output to a size.

    Sums have one order, and float32 is rounded as our kernels round it, whatever its switches say.
    (Of 16 bits that switch changes nothing but what PyTorch keeps plans by, so that what was
    searched is kept beside what was not.)
    """
    over = [0, 0]
    if to is not None:  # rows and columns that a stride left out
        over = [size - found for size, found in zip(to, _reached(x, window), strict=True)]
    walk = (*map(list, window.pairs), to is not None, over, 1)
    narrow = searched if x.dtype.itemsize == 2 else precision() == "tf32"
    how = (searched, True, torch.backends.cudnn.enabled, narrow)
    return aligned(torch.ops.aten._convolution(x, weight, bias, *walk, *how))


def _reached(grad: Tensor, window: Window) -> list[int]:
    """Height and width of the smallest image that has such an output."""
    axes = zip(grad.shape[2:], window.kernel, *window.pairs, strict=True)
    return [
        (size - 1) * stride - 2 * padding + apart * (taps - 1) + 1
        for size, taps, stride, padding, apart in axes
    ]


def _dense_weight_grad(grad: Tensor, x: Tensor, index: BlockIndex, window: Window) -> Tensor:
    """PyTorch's gradient of the weight, its sums in one order.

    cuDNN's benchmark takes what is fastest alone: of the least images it fills a GPU, and leaves
    nothing to the gradient beside it. (PyTorch keeps what a thread's first call of sizes found.)
    """
    weight = empty(grad, (index.out_features, index.channels, *window.kernel))
    how = (None, *map(list, window.pairs), False, [0, 0], 1, [False, True, False])
    least = _flop(index, prod(grad.shape) // grad.shape[1]) < _LEAST
    with _SWITCH:  # convolutions of other threads see them too
        before = torch._C._get_cudnn_deterministic(), torch._C._get_cudnn_benchmark()
        try:
            torch._C._set_cudnn_deterministic(True)
            torch._C._set_cudnn_benchmark(before[1] and not least)
            found: Tensor = torch.ops.aten.convolution_backward(grad, x, weight, *how)[1]
        finally:
            torch._C._set_cudnn_deterministic(before[0])
            torch._C._set_cudnn_benchmark(before[1])
    return found


def _flop(index: BlockIndex, pixels: int) -> float:
    return 2.0 * pixels * index.out_features * index.in_features


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
