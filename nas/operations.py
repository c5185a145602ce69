"""Operations: frozen values that name what a node does.

Each knows the shape it gives `(C, H, W)` or `(F,)`, without the batch, the weights it has
(`layers`, for costs), and how to build its `nn.Module`. A field may hold a `Choice`, which
`nas.choices.settle` replaces. Channels may be real numbers: expected ones, of a supernet. This
file imports torch only when a module is built: arguments are checked with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nas.choices import Choice
from nas.sparsity import Dense, Sparsity

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, ...]
DENSE = Dense()


@dataclass(frozen=True)
class Layer:
    """One weight tensor of an operation, as costs see it.

    Args:
        path: Its name below the node, such as `dw1.weight`.
        shape: The tensor's shape.
        positions: Multiply-adds that each of its weights takes part in, per sample.
        sparsity: A Sparsity, or the Choice of one.
    """

    path: str
    shape: Shape
    positions: int = 0
    sparsity: Any = DENSE


class Operation:
    """What a node does; the default is an operation without weights that keeps the shape."""

    def shape(self, *inputs: Shape) -> Shape:
        """The output's shape. Raises ValueError for inputs that do not fit."""
        return inputs[0]

    def layers(self, *inputs: Shape) -> tuple[Layer, ...]:
        """The weights of the operation on inputs of these shapes."""
        return ()

    def module(self, *inputs: Shape) -> nn.Module:
        """The dense module; masks are attached by the network that it is built into."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Operation):
    """Passes its input on."""

    def module(self, *inputs: Shape) -> nn.Module:
        from torch import nn

        return nn.Identity()


@dataclass(frozen=True)
class Zero(Operation):
    """DARTS' `none`: nothing passes. It exists in supernets only, where it takes weight."""

    stride: int = 1

    def shape(self, *inputs: Shape) -> Shape:
        channels, *space = inputs[0]
        return (channels, *(-(-s // self.stride) for s in space))

    def module(self, *inputs: Shape) -> nn.Module:
        from nas import modules

        return modules.Zero(self.stride)


@dataclass(frozen=True)
class Activation(Operation):
    """An element-wise function: relu, relu6, silu or gelu."""

    kind: str = "relu"

    def module(self, *inputs: Shape) -> nn.Module:
        from torch import nn

        return {"relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "gelu": nn.GELU}[self.kind]()


@dataclass(frozen=True)
class Flatten(Operation):
    """(C, H, W) to (C * H * W,)."""

    def shape(self, *inputs: Shape) -> Shape:
        size = 1
        for s in inputs[0]:
            size *= s
        return (size,)

    def module(self, *inputs: Shape) -> nn.Module:
        from torch import nn

        return nn.Flatten()


@dataclass(frozen=True)
class BatchNorm(Operation):
    """Batch normalisation over channels; affine or not."""

    affine: bool = True

    def layers(self, *inputs: Shape) -> tuple[Layer, ...]:
        size = (inputs[0][0],)
        return (Layer("weight", size), Layer("bias", size)) if self.affine else ()

    def module(self, *inputs: Shape) -> nn.Module:
        from torch import nn

        if len(inputs[0]) == 1:
            return nn.BatchNorm1d(inputs[0][0], affine=self.affine)
        return nn.BatchNorm2d(inputs[0][0], affine=self.affine)


@dataclass(frozen=True)
class Pool(Operation):
    """Max or average pooling; the average leaves padding out of its count, as DARTS does."""

    kind: str
    kernel: int = 3
    stride: int = 1
    padding: int = 1

    def shape(self, *inputs: Shape) -> Shape:
        channels, *space = inputs[0]
        return (
            channels,
            *((s + 2 * self.padding - self.kernel) // self.stride + 1 for s in space),
        )

    def module(self, *inputs: Shape) -> nn.Module:
        from torch import nn

        size: tuple[int, int, int] = (self.kernel, self.stride, self.padding)
        if self.kind == "max":
            return nn.MaxPool2d(*size)
        return nn.AvgPool2d(*size, count_include_pad=False)


@dataclass(frozen=True)
class GlobalAveragePool(Operation):
    """(C, H, W) to (C,): the mean over positions."""

    def shape(self, *inputs: Shape) -> Shape:
        return inputs[0][:1]

    def module(self, *inputs: Shape) -> nn.Module:
        from nas import modules

        return modules.GlobalAveragePool()


@dataclass(frozen=True)
class Sum(Operation):
    """The sum of its inputs, which have one shape."""

    def shape(self, *inputs: Shape) -> Shape:
        if len(set(map(str, inputs))) != 1:
            raise ValueError(f"Sum: inputs must have one shape, got {list(inputs)}")
        return inputs[0]

    def module(self, *inputs: Shape) -> nn.Module:
        from nas import modules

        return modules.Sum()


@dataclass(frozen=True)
class Concat(Operation):
    """Its inputs, one after another along the channels."""

    def shape(self, *inputs: Shape) -> Shape:
        return (sum(i[0] for i in inputs), *inputs[0][1:])

    def module(self, *inputs: Shape) -> nn.Module:
        from nas import modules

        return modules.Concat()


@dataclass(frozen=True)
class SparseLinear(Operation):
    """A linear layer on (F,) with a sparsity of its weight.

    Args:
        out: Output features: an int, or a Choice of ints.
        bias: Whether it has one.
        sparsity: A Sparsity, or a Choice of them.
    """

    out: int | Choice
    bias: bool = True
    sparsity: Sparsity | Choice = DENSE

    def shape(self, *inputs: Shape) -> Shape:
        if len(inputs[0]) != 1:
            raise ValueError(f"SparseLinear: needs an input of shape (F,), got {inputs[0]}")
        return (widest(self.out),)

    def layers(self, *inputs: Shape) -> tuple[Layer, ...]:
        (out,) = self.shape(*inputs)
        bias = (Layer("bias", (out,)),) if self.bias else ()
        return (Layer("weight", (out, inputs[0][0]), 1, self.sparsity), *bias)

    def module(self, *inputs: Shape) -> nn.Module:
        from nas import nn as sparse

        return sparse.SparseLinear(inputs[0][0], widest(self.out), bias=self.bias)


@dataclass(frozen=True)
class SparseConv2d(Operation):
    """A convolution on (C, H, W) with a sparsity of its weight.

    Args:
        out: Output channels: an int, or a Choice of ints.
        kernel: Side of the kernel.
        stride: Step in both directions.
        padding: None keeps the size at stride 1: dilation * (kernel - 1) // 2.
        dilation: Distance of the kernel's taps.
        depthwise: One group a channel.
        bias: Whether it has one.
        sparsity: A Sparsity, or a Choice of them.
    """

    out: int | Choice
    kernel: int = 3
    stride: int = 1
    padding: int | None = None
    dilation: int = 1
    depthwise: bool = False
    bias: bool = False
    sparsity: Sparsity | Choice = DENSE

    def _padding(self) -> int:
        return self.dilation * (self.kernel - 1) // 2 if self.padding is None else self.padding

    def shape(self, *inputs: Shape) -> Shape:
        if len(inputs[0]) != 3:
            raise ValueError(f"SparseConv2d: needs an input of shape (C, H, W), got {inputs[0]}")
        reach = 2 * self._padding() - self.dilation * (self.kernel - 1) - 1
        height, width = ((s + reach) // self.stride + 1 for s in inputs[0][1:])
        if min(height, width) < 1:
            raise ValueError(f"SparseConv2d: kernel {self.kernel} does not fit into {inputs[0]}")
        return (widest(self.out), height, width)

    def layers(self, *inputs: Shape) -> tuple[Layer, ...]:
        out, height, width = self.shape(*inputs)
        fan_in = 1 if self.depthwise else inputs[0][0]
        shape = (out, fan_in, self.kernel, self.kernel)
        bias = (Layer("bias", (out,)),) if self.bias else ()
        return (Layer("weight", shape, height * width, self.sparsity), *bias)

    def module(self, *inputs: Shape) -> nn.Module:
        from nas import nn as sparse

        channels = inputs[0][0]
        return sparse.SparseConv2d(
            channels,
            widest(self.out),
            self.kernel,
            stride=self.stride,
            padding=self._padding(),
            dilation=self.dilation,
            groups=channels if self.depthwise else 1,
            bias=self.bias,
        )


@dataclass(frozen=True)
class Sequence(Operation):
    """Named operations, one after another.

    Args:
        parts: (name, operation) pairs; a part's weights are found under its name.
    """

    parts: tuple[tuple[str, Any], ...]

    def steps(self, *inputs: Shape) -> list[tuple[str, Any, Shape]]:
        """(name, operation, shape of its input) of each part."""
        found, shape = [], inputs[0]
        for name, part in self.parts:
            found.append((name, part, shape))
            shape = part.shape(shape)
        return found

    def shape(self, *inputs: Shape) -> Shape:
        _, part, shape = self.steps(*inputs)[-1]
        return part.shape(shape)

    def layers(self, *inputs: Shape) -> tuple[Layer, ...]:
        return tuple(
            replace(layer, path=f"{name}.{layer.path}")
            for name, part, shape in self.steps(*inputs)
            for layer in part.layers(shape)
        )

    def module(self, *inputs: Shape) -> nn.Module:
        from collections import OrderedDict

        from torch import nn

        steps = self.steps(*inputs)
        return nn.Sequential(
            OrderedDict((name, part.module(shape)) for name, part, shape in steps)
        )


@dataclass(frozen=True)
class FactorizedReduce(Operation):
    """Halves height and width by two strided 1x1 convolutions side by side (1806.09055)."""

    out: int
    sparsity: Sparsity | Choice = DENSE

    def _halves(self) -> tuple[SparseConv2d, SparseConv2d]:
        left = self.out // 2
        whole = SparseConv2d(self.out, 1, 2, padding=0, sparsity=self.sparsity)
        return replace(whole, out=left), replace(whole, out=self.out - left)

    def shape(self, *inputs: Shape) -> Shape:
        return (self.out, *self._halves()[0].shape(*inputs)[1:])

    def layers(self, *inputs: Shape) -> tuple[Layer, ...]:
        named = zip(("left", "right"), self._halves(), strict=True)
        inner = [
            replace(x, path=f"{n}.{x.path}") for n, half in named for x in half.layers(*inputs)
        ]
        norm = BatchNorm().layers(self.shape(*inputs))
        return (*inner, *(replace(x, path=f"norm.{x.path}") for x in norm))

    def module(self, *inputs: Shape) -> nn.Module:
        from nas import modules

        left, right = (half.module(*inputs) for half in self._halves())
        return modules.FactorizedReduce(left, right, BatchNorm().module(self.shape(*inputs)))


@dataclass(frozen=True)
class PaddedShortcut(Operation):
    """Every stride-th position, new channels zero on both sides (1512.03385, option A)."""

    out: int
    stride: int = 2

    def shape(self, *inputs: Shape) -> Shape:
        channels, *space = inputs[0]
        if channels > self.out:
            raise ValueError(f"PaddedShortcut: {channels} channels do not fit into {self.out}")
        return (self.out, *(-(-s // self.stride) for s in space))

    def module(self, *inputs: Shape) -> nn.Module:
        from nas import modules

        return modules.PaddedShortcut(self.out - inputs[0][0], self.stride)


def widest(out: int | Choice) -> int:
    """The largest of the options: what a supernet is built with, and what settles shapes."""
    return max(map(int, out.labels)) if isinstance(out, Choice) else out
