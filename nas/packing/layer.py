"""A layer as packing sees it: one product with what was fused into it, and the kernels for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels import measured
from kernels.calls import out_size

aten = torch.ops.aten

OUT_FIRST = {aten.linear.default, aten.conv2d.default, aten.conv2d.padding}  # in their weights
MATRIX_PRODUCTS = {aten.mm.default, aten.matmul.default}
PRODUCTS = OUT_FIRST | MATRIX_PRODUCTS | {aten.addmm.default}

ACTIVATIONS: dict[str, tuple[Any, tuple[Any, ...]] | None] = {
    "none": None,
    "relu": (aten.relu_.default, ()),
    "relu6": (aten.hardtanh_.default, (0.0, 6.0)),
    "silu": (aten.silu_.default, ()),
    "gelu": (aten.gelu_.default, ()),
}


@dataclass(frozen=True)
class ConvArgs:
    """How a 2-D convolution walks: symmetric padding, pairs are (height, width)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear map (`conv` is None) or 2-D convolution, its bias and its activation.

    Attributes:
        name: the path of the weight's module, as the user wrote it.
        weight: (out, in) or (out, in / groups, kh, kw).
        bias: (out,), of the weight's dtype, or None.
        conv: the convolution's arguments, or None for a linear map.
        activation: a key of `ACTIVATIONS`.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    conv: ConvArgs | None = None
    activation: str = "none"

    @property
    def operation(self) -> str:
        """`linear` or `conv2d`."""
        return "linear" if self.conv is None else "conv2d"

    @property
    def sparsity(self) -> float:
        """The share of zeros in the weight."""
        return 1.0 - self.nonzeros / max(1, self.weight.numel())

    @cached_property
    def nonzeros(self) -> int:
        """How many elements of the weight are not zero."""
        return int(torch.count_nonzero(self.weight))

    def positions(self, given: tuple[int, ...]) -> int:
        """Where the weight is applied to an input of this shape: samples, or output pixels."""
        if self.conv is None:
            return prod(given[:-1])
        conv, kernel = self.conv, self.weight.shape[2:]
        axes = zip(given[2:], kernel, conv.stride, conv.padding, conv.dilation, strict=True)
        return given[0] * prod(out_size(*axis) for axis in axes)

    @cached_property
    def packed(self) -> kernels.Packed:
        """The weight for the sparse kernels, packed when first asked for."""
        if self.conv is None:
            return kernels.pack_linear(self.weight)
        return kernels.pack_conv2d(self.weight, self.conv.groups)

    @cached_property
    def wide_bias(self) -> Tensor | None:
        """The bias in float32, as sparse kernels add it; itself where it is."""
        return None if self.bias is None else self.bias.float()

    def to(self, dtype: torch.dtype) -> Layer:
        """The layer in another dtype."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype).contiguous(), bias=bias)

    def case(self, x: Tensor, packed: bool) -> str:
        """What the times of its kernels on `x` depend on, in words.

        Args:
            x: the input.
            packed: whether a kernel for the packed weight is among them.
        """
        words = [self.operation, _size(self.weight.shape), str(self.weight.dtype)]
        if packed:
            kept, meta = measured.share(self.nonzeros, self.weight.numel()), self.packed.meta
            words += ["kept", kept, meta["pattern"], "stored", meta["block"]]
        if self.conv is not None:
            words += [f"{name} {value}" for name, value in asdict(self.conv).items()]
        words += [self.activation, *(["bias"] if self.bias is not None else [])]
        words += ["of", _size(x.shape), *([] if x.is_contiguous() else [str(x.stride())])]
        return " ".join([*words, "threads", str(torch.get_num_threads())])

    def fused(self) -> dict[str, Any]:
        """What a step of a program needs of it beside its arguments."""
        return {"packed": self.packed, "bias": self.bias, "activation": self.activation}

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer densely."""
        return dense_kernel(self, x.dim())(x)


def _size(shape: torch.Size) -> str:
    return "x".join(map(str, shape))


@dataclass(frozen=True)
class Step:
    """One operator call: `target(x, *args)`."""

    target: Callable[..., Tensor]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Kernel:
    """A named way to compute a layer or a run of layers: steps, each fed the one before."""

    name: str
    steps: tuple[Step, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """Apply all steps to `x`."""
        for step in self.steps:
            x = step.target(x, *step.args)
        return x


def dense_kernel(layer: Layer, dims: int) -> Kernel:
    """PyTorch's own kernel for `layer` on an input of `dims`, the activation in place.

    Of more than two dimensions, as attention transposes them, PyTorch makes a batch of products
    with copies of the weight, which takes 1.1 to 3 times as long, unless they lie as one matrix.
    """
    activation = ACTIVATIONS[layer.activation]
    before = (Step(aten.contiguous.default, ()),) if layer.conv is None and dims > 2 else ()
    after = () if activation is None else (Step(*activation),)
    return Kernel("dense", (*before, _dense_product(layer), *after))


def _dense_product(layer: Layer) -> Step:
    if layer.conv is None:
        return Step(aten.linear.default, (layer.weight, layer.bias))
    conv = layer.conv
    walk = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
    return Step(aten.conv2d.default, (layer.weight, layer.bias, *walk))


def sparse_kernel(layer: Layer) -> Kernel:
    """The sparse operator for `layer`, bias and activation fused."""
    ops = torch.ops.sparse_nas
    out = layer.weight.shape[0]
    if layer.conv is None:
        args = (layer.packed.data, layer.wide_bias, out, layer.activation)
        return Kernel("sparse_linear", (Step(ops.sparse_linear.default, args),))
    conv = layer.conv
    walk = [list(pair) for pair in (conv.stride, conv.padding, conv.dilation)]
    size = list(layer.weight.shape[2:])
    shape = (out, size, *walk, conv.groups, layer.activation)
    all_args = (layer.packed.data, layer.wide_bias, *shape)
    return Kernel("sparse_conv2d", (Step(ops.sparse_conv2d.default, all_args),))


def rounding_bound(layer: Layer, x: Tensor) -> Tensor:
    """How far two right results for `layer(x)` may lie apart, per output element.

    The rounding error of a sum in float32 scales with the sum of its terms' magnitudes, not with
    its value; the activations stretch a difference by at most 1.13. Depthwise kernels share
    products between two rows of outputs: what cancels in an output of its own was in its sum.
    """
    bias, size, conv = None if layer.bias is None else layer.bias.abs(), x.abs(), layer.conv
    if conv is not None and layer.weight.shape[1] == 1 < conv.groups:
        rows, (above, beside) = layer.weight.shape[2], conv.padding
        near = F.pad(size, (0, 0, above, above))
        size = F.max_pool2d(near, (2 * rows + 1, 1), 1, (rows, 0))
        conv = replace(conv, padding=(0, beside))
    magnitude = Layer(layer.name, layer.weight.abs(), bias, conv)(size)
    return magnitude.mul_(1e-5)
