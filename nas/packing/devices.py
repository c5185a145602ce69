"""What packing does otherwise on a GPU than on a CPU: all of it, in one place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import kernels
from kernels.reference import activate
from kernels.window import Pair, Window
from nas.packing.layer import Kernel, Layer, aten, rounding_bound
from nas.packing.residual import fuse_residuals

_UNIT = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of one rounding


@dataclass(frozen=True)
class Cpu:
    """A CPU, where sparse kernels take float32.

    Attributes:
        kind: as torch names it.
        dtypes: what the sparse kernels compute in.
        core: whether the C core runs there: many layers in one call, the limits of its vectors.
        channels_last: whether activations of convolutions always lie so.
        cold: whether layers are timed with their weights in no cache.
    """

    kind: str = "cpu"
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    core: bool = True
    channels_last: bool = False
    cold: bool = False

    def objection(self, tensors: Sequence[Tensor]) -> str:
        """Why no sparse kernel computes with these tensors, or ""."""
        places = {(part.device.type, part.dtype) for part in tensors}
        if len(places) == 1 and places <= {(self.kind, dtype) for dtype in self.dtypes}:
            return ""
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        return f"sparse kernels take one of {names} on one {self.kind.upper()}"

    def check(self, module: nn.Module, example: tuple[Tensor, ...]) -> None:
        """Raise ValueError, naming two of them, where not all tensors are on one device."""
        tensors = [*module.named_parameters(), *module.named_buffers(), *_inputs(example)]
        _one("device", [(name, tensor.device) for name, tensor in tensors])

    def lay_out(self, module: GraphModule) -> None:
        """Lay out, in place, what a fused graph holds."""

    def finish(self, module: GraphModule) -> None:
        """Rewrite, in place, a graph of kernels as this device runs it faster."""

    def offered(self, kernel: Kernel, layer: Layer, x: Tensor, anew: bool) -> Kernel | None:
        """The sparse operator under the name of what runs in it; None where that is dense."""
        return kernel

    def difference(self, layer: Layer, x: Tensor, result: Tensor) -> str:
        """Why `result` is not `layer(x)` within rounding, or "" where it is."""
        return _difference(result, layer(x), rounding_bound(layer, x))

    def wider(self, module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
        """A copy that computes more precisely, where the module itself does so too roughly."""
        return None


@dataclass(frozen=True)
class Gpu(Cpu):
    """An NVIDIA GPU: three dtypes, one in a network, and every result checked in float64."""

    kind: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    core: bool = False
    channels_last: bool = True
    cold: bool = True

    def check(self, module: nn.Module, example: tuple[Tensor, ...]) -> None:
        """Raise ValueError, with names, where tensors are on two devices or of two dtypes."""
        super().check(module, example)
        tensors = [*module.named_parameters(), *_inputs(example)]
        floats = [(name, part.dtype) for name, part in tensors if part.is_floating_point()]
        _one("floating dtype", floats)
        for name, dtype in floats:
            if dtype not in self.dtypes:
                known = ", ".join(map(str, self.dtypes))
                raise ValueError(f"pack: on a GPU takes {known}, got {dtype} of {name}")

    def lay_out(self, module: GraphModule) -> None:
        """Weights of convolutions channels-last; what was a view may have to be a copy then."""
        laid: dict[Layer, Layer] = {}
        for node in module.graph.nodes:
            if isinstance(node.target, Layer) and node.target.conv is not None:
                node.target = laid.setdefault(node.target, _channels_last(node.target))
            elif node.target is aten.view.default:
                node.target = aten.reshape.default

    def finish(self, module: GraphModule) -> None:
        """Sums with shortcuts go into the kernels before them."""
        fuse_residuals(module)

    def offered(self, kernel: Kernel, layer: Layer, x: Tensor, anew: bool) -> Kernel | None:
        """Of a linear layer that of its kernels that is measured to be the fastest.

        Of a convolution the one that its operator takes: `kernels.tune` would compare it with a
        plain product, which is not what PyTorch's convolution takes with its bias and activation.
        """
        if layer.conv is not None:
            name = _of_a_convolution(layer, x)
        else:
            us = kernels.tune(layer.packed, x, anew)
            name = min(us, key=us.__getitem__, default="dense")
        return None if name == "dense" else replace(kernel, name=f"{kernel.name}[{name}]")

    def difference(self, layer: Layer, x: Tensor, result: Tensor) -> str:
        """Against float64: sums as exact as in float32, rounded to the dtype twice at most."""
        wide, given = layer.to(torch.float64), x.double().contiguous()
        before = replace(wide, activation="none")(given)
        bound = rounding_bound(wide, given).add_(before.abs(), alpha=3 * _UNIT[x.dtype])
        bound += torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
        return _difference(result.double(), activate(before, layer.activation), bound)

    def wider(self, module: nn.Module, dtype: torch.dtype) -> nn.Module | None:
        """In float64 of what is float32, since convolutions round that to TF32; else float32."""
        narrow = dtype in (torch.bfloat16, torch.float16)
        return copy.deepcopy(module).to(torch.float32 if narrow else torch.float64)


CPU, GPU = Cpu(), Gpu()


def of(tensor: Tensor) -> Cpu:
    """The kind of device that `tensor` is on."""
    return GPU if tensor.is_cuda else CPU


def _of_a_convolution(layer: Layer, x: Tensor) -> str:
    from kernels.cuda import blob, conv2d  # nobody without a GPU needs them

    assert layer.conv is not None
    blocks, conv = blob.read(layer.packed.data), layer.conv
    window = Window(blocks.form.kernel, *map(_pair, (conv.stride, conv.padding, conv.dilation)))
    return conv2d.name(blocks, x, conv2d.shape_of(blocks, x, window), window)


def _pair(given: Sequence[int]) -> Pair:
    height, width = given
    return height, width


def _inputs(example: tuple[Tensor, ...]) -> Iterator[tuple[str, Tensor]]:
    yield from ((f"input {index}", tensor) for index, tensor in enumerate(example))


def _one(what: str, found: Sequence[tuple[str, object]]) -> None:
    """Raise ValueError where tensors differ in it, with the first one of each."""
    first: dict[object, str] = {}
    for name, value in found:
        first.setdefault(value, name)
    if len(first) > 1:
        names = ", ".join(f"{name} ({value})" for value, name in first.items())
        raise ValueError(f"pack: module and example_input must have one {what}, got {names}")


def _channels_last(layer: Layer) -> Layer:
    return replace(layer, weight=layer.weight.contiguous(memory_format=torch.channels_last))


def _difference(result: Tensor, expected: Tensor, bound: Tensor) -> str:
    if result.shape != expected.shape:
        return f"gave shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    if bool(((result - expected).abs() <= bound).all()):
        return ""
    return f"differs from dense by up to {float((result - expected).abs().max()):.3g}"
