"""What a program computes: tensors, and the steps that write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

from torch import Tensor

from kernels import blob as b
from kernels.calls import ACTIVATIONS, out_size
from kernels.packed import Packed

Pair = tuple[int, int]
Shape = tuple[int, int, int]
X, Y = 0, 1  # the tensors that a program reads and writes
OPERATIONS = {"linear": 1, "conv2d": 2, "pool": 3, "mean": 4, "map": 5, "zero": 6}
POOLS = {"max": 0, "average": 1, "average_all": 2}


@dataclass(frozen=True, eq=False)
class Step:
    """One operation, from tensors to some channels of a tensor.

    Attributes:
        operation: a key of `OPERATIONS`. `map` copies, adds and activates; `zero` fills.
        source: the tensor that is read; of `zero` the one that is written.
        out: the tensor that is written, from channel `at` on.
        other: a tensor that is added before the activation, or None.
        packed: the weight of a linear layer or convolution, as are bias and activation.
        kind: of a pooling, a key of `POOLS`; `average_all` counts the padding.
        kernel: of a pooling or convolution, as are stride, padding and dilation; (height, width).
    """

    operation: str
    source: int
    out: int
    at: int = 0
    other: int | None = None
    packed: Packed | None = None
    bias: Tensor | None = None
    activation: str = "none"
    kind: str = "max"
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)

    @property
    def weight(self) -> b.Shape:
        """What the packed weight says of itself."""
        assert self.packed is not None
        return b.shape_of(self.packed.data.numpy())

    @property
    def copies(self) -> bool:
        """Whether it does nothing but copy."""
        plain = self.other is None and self.activation == "none" and self.stride == (1, 1)
        return self.operation == "map" and plain

    def reads(self) -> list[int]:
        """The tensors that it needs."""
        others = [] if self.other is None else [self.other]
        return [*([] if self.operation == "zero" else [self.source]), *others]


@dataclass
class Graph:
    """Tensors by number and steps in order; see `Step`.

    Attributes:
        shapes: (channels, height, width) of each; features are (features, 1, 1).
        dense: those that lie as NCHW even between steps, for linear layers to read.
        parts: 0, or those of an image in the lanes of a pixel (kernels/network/lanes.py).
    """

    shapes: list[Shape]
    dense: set[int] = field(default_factory=set)
    steps: list[Step] = field(default_factory=list)
    parts: int = 0

    def tensor(self, shape: Shape, dense: bool = False) -> int:
        """A new tensor, written by nobody yet."""
        self.shapes.append(shape)
        if dense:
            self.dense.add(len(self.shapes) - 1)
        return len(self.shapes) - 1

    def is_dense(self, tensor: int) -> bool:
        """Whether it lies as NCHW: from outside, single features, or asked for."""
        if tensor in (X, Y) or tensor in self.dense:
            return True
        return not self.parts and self.shapes[tensor][1:] == (1, 1)

    def check(self) -> None:
        """Raise ValueError for a step that does not fit its tensors or reads what is not there."""
        large = [s for s in self.shapes if prod(s) >= 2**31]
        _rule(not large, 0, "has tensors of less than 2^31 numbers", large)
        written: dict[int, list[tuple[int, int]]] = {X: [(0, self.shapes[X][0])]}
        for number, step in enumerate(self.steps):
            unread = [t for t in step.reads() if not _covers(written.get(t), self.shapes[t][0])]
            _rule(not unread, number, "reads tensors written before", unread)
            self._check_kind(number, step)
            _rule(
                step.out not in (X, *step.reads()), number, "writes a tensor of its own", step.out
            )
            channels, *size = self.shapes[step.out]
            given = (step.at + self.gives(number, step)[0], *self.gives(number, step)[1:])
            fits = 0 <= step.at and given[0] <= channels and list(given[1:]) == size
            _rule(fits, number, f"gives channels of {self.shapes[step.out]}", given)
            if step.other is not None:
                fits = self.shapes[step.other] == self.shapes[step.out] and step.at == 0
                _rule(fits, number, "adds a tensor of its output's shape", self.shapes[step.other])
            written.setdefault(step.out, []).append((step.at, given[0]))
        whole = _covers(written.get(Y), self.shapes[Y][0])
        _rule(whole, len(self.steps), "writes the output", sorted(written))

    def _check_kind(self, number: int, step: Step) -> None:
        """What an operation has no use for must not be there."""
        if step.operation in ("linear", "mean", "zero"):
            _rule(step.at == 0, number, "writes from channel 0 on", step.at)
        if step.operation in ("linear", "mean", "pool", "zero"):
            _rule(step.other is None, number, "adds nothing", step.other)
        if step.operation in ("linear", "mean"):
            own = self.gives(number, step) == self.shapes[step.out]
            _rule(own, number, "gives channels of a tensor of its own", self.shapes[step.out])
        if step.operation in ("mean", "pool", "zero"):
            _rule(step.activation == "none", number, "has no activation", step.activation)
        if step.operation == "zero":
            _rule(step.source == step.out, number, "fills what it names", step.source)

    def gives(self, number: int, step: Step) -> Shape:
        """The shape of what a step writes. Raises ValueError if its input does not fit."""
        channels, height, width = self.shapes[step.source]
        _check_arguments(number, step)
        if step.operation == "mean":
            return (channels, 1, 1)
        if step.operation == "linear":
            features = channels * height * width
            wanted = (step.weight.operation, step.weight.channels)
            fits = wanted == (b.LINEAR, features) and self.is_dense(step.source)
            _rule(fits, number, f"takes {wanted[1]} dense features", features)
            return (step.weight.rows, 1, 1)
        if step.operation == "conv2d":
            weight = step.weight
            same = weight.operation == b.CONV2D and weight.kernel == step.kernel
            fits = same and weight.channels * weight.groups == channels
            _rule(fits, number, f"takes a weight of {weight.weight_shape}", channels)
            channels = weight.rows
        axes = zip(
            (height, width), step.kernel, step.stride, step.padding, step.dilation, strict=True
        )
        height, width = (_out(*axis) for axis in axes)
        _rule(min(height, width) >= 1, number, "leaves some output", (height, width))
        return (channels, height, width)


def _check_arguments(number: int, step: Step) -> None:
    """What holds for the arguments of an operation, whatever it reads."""
    known = step.activation in ACTIVATIONS and step.operation in OPERATIONS
    _rule(known, number, "has a known operation and activation", step.activation)
    low = min(*step.kernel, *step.stride, *step.dilation)
    top = max(*step.kernel, *step.stride, *step.dilation, *map(abs, step.padding))
    _rule(1 <= low and top < 2**15, number, "has arguments from 1 to 32767", (low, top))
    if step.operation == "pool":
        inside = all(2 * p <= k and p >= 0 for p, k in zip(step.padding, step.kernel, strict=True))
        _rule(inside, number, "pads by at most half its kernel", step.padding)
        _rule(step.dilation == (1, 1), number, "pools without dilation", step.dilation)
    skips = min(step.padding) < 0 and step.operation not in ("linear", "mean")
    fits = step.operation == "conv2d" and step.kernel == (1, 1)
    _rule(not skips or fits, number, "is 1x1 where it skips pixels", step.padding)
    if step.operation == "map":
        _rule(step.stride[0] == step.stride[1], number, "has one stride", step.stride)
    if step.operation in ("zero", "map"):
        alone = step.kernel == (1, 1) and step.padding == (0, 0)
        _rule(alone, number, "has no kernel", step.kernel)


def _covers(parts: list[tuple[int, int]] | None, channels: int) -> bool:
    """Whether ranges of channels leave none out."""
    end = 0
    for first, last in sorted(parts or []):
        if first > end:
            return False
        end = max(end, last)
    return parts is not None and end >= channels


def _out(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Length of an axis; a negative padding skips pixels at its beginning alone."""
    return -(-size // stride) if padding < 0 else out_size(size, kernel, stride, padding, dilation)


def _rule(holds: bool, number: int, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"program: step {number} must be one that {rule}, got {value}")


def apart(graph: Graph, lineable: Sequence[bool]) -> Graph:
    """The graph with sums taken out of those convolutions that cannot add in place."""
    done = Graph(list(graph.shapes), set(graph.dense), parts=graph.parts)
    for step, fits in zip(graph.steps, lineable, strict=True):
        adds = step.operation == "conv2d" and step.other is not None
        if not adds or (fits and not graph.is_dense(step.other or 0)):
            done.steps.append(step)
            continue
        alone = done.tensor(graph.shapes[step.out])
        done.steps.append(replace(step, out=alone, other=None, activation="none"))
        done.steps.append(
            Step("map", alone, step.out, other=step.other, activation=step.activation)
        )
    return done
