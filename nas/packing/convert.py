"""From nodes of a traced graph to the steps of a program, one node at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

import kernels
from kernels.network import Graph, Step, X, Y
from nas.packing import constants
from nas.packing.layer import Layer, aten

Pair = tuple[int, int]
_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.relu6.default: "relu6",
    aten.silu.default: "silu",
    aten.silu_.default: "silu",
}
_ADDS = {aten.add.Tensor, aten.add_.Tensor}
_RESHAPES = {aten.flatten.using_ints, aten.reshape.default, aten.view.default}


@dataclass(frozen=True)
class _Lazy:
    """A tensor of which only some pixels are meant: from `start` on, every `stride`-th."""

    tensor: int
    start: Pair = (0, 0)
    stride: Pair = (1, 1)
    beyond: Pair = (0, 0)  # rows and columns of zeros behind the last


class Converter:
    """Takes nodes in order, as long as each can be a step.

    Args:
        module: holds the constants that nodes read.
        x: the node whose value is the program's input.
    """

    def __init__(self, module: nn.Module, x: Node) -> None:
        self.module = module
        self.graph = Graph([_shape(x) or (0, 0, 0), (0, 0, 0)])
        self.values: dict[Node, int | _Lazy] = {x: X}

    def take(self, node: Node) -> bool:
        """Add the steps of a node whose inputs were taken; False if there are none for it."""
        shape = _shape(node)
        inputs = [part for part in node.all_input_nodes if part.op != "get_attr"]
        if shape is None or not inputs or any(part not in self.values for part in inputs):
            return False
        if _writes(node) and (
            len(node.all_input_nodes[0].users) > 1 or self.values[node.all_input_nodes[0]] == X
        ):
            return False
        found = self._convert(node, shape)
        if found is None:
            return False
        self.values[node] = found
        return True

    def ends_at(self, node: Node) -> Graph | None:
        """The graph that gives this node's value, with sums and activations fused; or None."""
        tensor = self.values[node]
        if not isinstance(tensor, int) or tensor == X:
            return None
        graph = Graph(list(self.graph.shapes), set(self.graph.dense), list(self.graph.steps))
        graph.shapes[Y] = graph.shapes[tensor]
        graph.steps = [_renamed(step, tensor) for step in graph.steps]
        graph.dense.discard(tensor)
        _fuse(graph)
        _place_parts(graph)
        return _compact(graph)

    def _convert(self, node: Node, shape: tuple[int, int, int]) -> int | _Lazy | None:
        if isinstance(node.target, Layer):
            return self._layer(node, node.target, shape)
        if (activation := _activation(node)) is not None:
            source = self._tensor(node.args[0])
            return (
                None if source is None else self._new(shape, "map", source, activation=activation)
            )
        if node.target in _ADDS:
            return self._sum(node, shape)
        if node.target in _RESHAPES:
            return self._features(node, shape)
        convert = _CONVERTERS.get(node.target)
        return None if convert is None else convert(self, node, shape)

    def _tensor(self, node: Any) -> int | None:
        value = self.values.get(node)
        return value if isinstance(value, int) else None

    def _new(self, shape: tuple[int, int, int], operation: str, source: int, **rest: Any) -> int:
        out = self.graph.tensor(shape)
        self.graph.steps.append(Step(operation, source, out, **rest))
        return out

    def _layer(self, node: Node, layer: Layer, shape: tuple[int, int, int]) -> int | None:
        value = self.values[node.args[0]]  # type: ignore[index]
        fused = layer.fused()
        if layer.conv is None:
            flat = isinstance(value, int) and node.meta["val"].dim() == 2
            return (
                self._new(shape, "linear", value, **fused)
                if flat and isinstance(value, int)
                else None
            )
        conv, kernel = layer.conv, tuple(layer.weight.shape[2:])
        walk = {"kernel": kernel, "stride": conv.stride, "dilation": conv.dilation}
        padding: Pair = conv.padding
        if isinstance(value, _Lazy):
            skips = value.start == value.beyond and value.stride == (1, 1) and kernel == (1, 1)
            if not skips or padding != (0, 0) or min(conv.stride) <= max(value.start):
                return None
            padding, value = (-value.start[0], -value.start[1]), value.tensor
        return self._new(shape, "conv2d", value, padding=padding, **walk, **fused)

    def _norm(self, node: Node, shape: tuple[int, int, int]) -> int | None:
        """Batch norm that no layer took in, as a convolution of every channel by itself."""
        args: list[Any] = list(node.args)
        source = self._tensor(args[0])
        gamma, beta, mean, variance = (constants.value(self.module, part) for part in args[1:5])
        missing = any(
            (part is None) != (v is None) for part, v in zip(args[1:3], (gamma, beta), strict=True)
        )
        if source is None or mean is None or variance is None or missing or args[5]:
            return None
        scale = torch.rsqrt(variance.double() + args[7]) * (1.0 if gamma is None else gamma)
        shift = (0.0 if beta is None else beta) - mean * scale
        weight = scale.float().reshape(-1, 1, 1, 1)
        packed = kernels.pack_conv2d(weight, len(weight))
        return self._new(shape, "conv2d", source, packed=packed, bias=shift.float())

    def _sum(self, node: Node, shape: tuple[int, int, int]) -> int | None:
        if len(node.args) != 2 or node.kwargs or node.args[0] is node.args[1]:
            return None
        one, two = (self._tensor(part) for part in node.args)
        if one is None or two is None or self.graph.shapes[one] != self.graph.shapes[two]:
            return None
        return self._new(shape, "map", one, other=two)

    def _features(self, node: Node, shape: tuple[int, int, int]) -> int | None:
        source = self._tensor(node.args[0])
        if source is None or node.meta["val"].dim() != 2:
            return None
        given = self.graph.shapes[source]
        if prod(given) != shape[0] or source == X:
            return None
        if given[1:] == (1, 1):
            return source
        out = self.graph.tensor(given, dense=True)
        self.graph.steps.append(Step("map", source, out))
        return out

    def _pool(self, node: Node, shape: tuple[int, int, int]) -> int | None:
        source = self._tensor(node.args[0])
        rest: list[Any] = list(node.args[1:])
        kernel = _pair(rest[0])
        stride = _pair(rest[1]) if len(rest) > 1 and rest[1] else kernel
        padding = _pair(rest[2]) if len(rest) > 2 else (0, 0)
        if node.target is aten.max_pool2d.default:
            plain = all(part in ([1, 1], 1, [1], False) for part in rest[3:])
            kind = "max"
        else:
            plain = not (len(rest) > 3 and rest[3]) and not (len(rest) > 5 and rest[5])
            kind = "average" if len(rest) > 4 and rest[4] is False else "average_all"
        if source is None or not plain or node.kwargs:
            return None
        walk = {"kernel": kernel, "stride": stride, "padding": padding, "kind": kind}
        return self._new(shape, "pool", source, **walk)

    def _mean(self, node: Node, shape: tuple[int, int, int]) -> int | None:
        source = self._tensor(node.args[0])
        if node.target is aten.mean.dim:
            whole = sorted(d % 4 for d in node.args[1]) == [2, 3]  # type: ignore[union-attr,operator]
        else:
            whole = _pair(node.args[1]) == (1, 1)
        if source is None or not whole or node.kwargs or len(self.graph.shapes[source]) != 3:
            return None
        return self._new((self.graph.shapes[source][0], 1, 1), "mean", source)

    def _concat(self, node: Node, shape: tuple[int, int, int]) -> int | None:
        if len(node.args) != 2 or node.args[1] not in (1, -3) or node.meta["val"].dim() != 4:
            return None
        parts = [self._tensor(part) for part in node.args[0]]  # type: ignore[union-attr]
        if any(part is None for part in parts):
            return None
        out, at = self.graph.tensor(shape), 0
        for part in parts:
            assert part is not None
            self.graph.steps.append(Step("map", part, out, at=at))
            at += self.graph.shapes[part][0]
        return out

    def _slice(self, node: Node, shape: tuple[int, int, int]) -> _Lazy | None:
        args: list[Any] = [*node.args, *[None, 0, None, None, 1][len(node.args) :]]
        value = self.values[args[0]]
        lazy = value if isinstance(value, _Lazy) else _Lazy(value)
        axis, start, step = args[1] - 2, args[2] or 0, args[4]
        behind = args[3] is None or args[3] >= 2**31
        if axis < 0:  # all images, all channels
            return lazy if (start, behind, step) == (0, True, 1) else None
        if start < 0 or not behind or lazy.stride[axis] != 1:
            return None
        starts, strides = list(lazy.start), list(lazy.stride)
        starts[axis] += start
        strides[axis] = step
        return replace(lazy, start=_pair(starts), stride=_pair(strides))

    def _pad(self, node: Node, shape: tuple[int, int, int]) -> int | _Lazy | None:
        value = self.values[node.args[0]]  # type: ignore[index]
        widths = [*node.args[1], 0, 0, 0, 0, 0, 0][:6]  # type: ignore[misc]
        filled = node.args[2] if len(node.args) > 2 else 0
        mode = node.target is aten.pad.default and len(node.args) > 2
        if mode:
            filled = 0 if node.args[2] == "constant" and len(node.args) < 4 else 1
        if filled or node.kwargs or min(widths) < 0:
            return None
        left, right, top, bottom, before, after = widths
        if not (left or top or before or after) and isinstance(value, int):
            return _Lazy(value, beyond=(bottom, right))
        lazy = value if isinstance(value, _Lazy) else _Lazy(value)
        plain = lazy.start == lazy.beyond == (0, 0) and lazy.stride[0] == lazy.stride[1]
        if left or right or top or bottom or not plain:
            return None
        out = self.graph.tensor(shape)
        self.graph.steps.append(Step("zero", out, out))
        self.graph.steps.append(Step("map", lazy.tensor, out, at=before, stride=lazy.stride))
        return out


_CONVERTERS: dict[Any, Callable[[Converter, Node, tuple[int, int, int]], int | _Lazy | None]] = {
    aten.batch_norm.default: Converter._norm,
    aten.max_pool2d.default: Converter._pool,
    aten.avg_pool2d.default: Converter._pool,
    aten.adaptive_avg_pool2d.default: Converter._mean,
    aten.mean.dim: Converter._mean,
    aten.cat.default: Converter._concat,
    aten.slice.Tensor: Converter._slice,
    aten.pad.default: Converter._pad,
    aten.constant_pad_nd.default: Converter._pad,
}


def _shape(node: Node) -> tuple[int, int, int] | None:
    """(channels, height, width) of images, (features, 1, 1) of rows of them; None for others."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.device.type != "cpu":
        return None
    sizes = value.shape[1:]
    if value.dim() not in (2, 4) or not all(isinstance(size, int) for size in sizes):
        return None
    return (sizes[0], 1, 1) if value.dim() == 2 else (sizes[0], sizes[1], sizes[2])


def _writes(node: Node) -> bool:
    """Whether a node writes into its input."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _activation(node: Node) -> str | None:
    if node.target in (aten.hardtanh.default, aten.hardtanh_.default):
        return "relu6" if tuple(node.args[1:]) == (0.0, 6.0) else None
    if node.target is aten.gelu.default:
        return "gelu" if node.kwargs.get("approximate", "none") == "none" else None
    return _ACTIVATIONS.get(node.target)


def _pair(values: Any) -> Pair:
    return (values, values) if isinstance(values, int) else (values[0], values[-1])


def _renamed(step: Step, tensor: int) -> Step:
    """The step with `tensor` called `Y`."""
    names = {tensor: Y}
    other = None if step.other is None else names.get(step.other, step.other)
    source, out = (names.get(t, t) for t in (step.source, step.out))
    return replace(step, source=source, out=out, other=other)


def _readers(graph: Graph, tensor: int) -> list[int]:
    return [i for i, step in enumerate(graph.steps) if tensor in step.reads()]


def _writers(graph: Graph, tensor: int) -> list[int]:
    return [i for i, step in enumerate(graph.steps) if step.out == tensor]


def _fuse(graph: Graph) -> None:
    """Sums into the convolution that gives their last operand, activations into sums."""
    changed = True
    while changed:
        changed = any(_fused(graph, i) for i in range(len(graph.steps)))


def _fused(graph: Graph, number: int) -> bool:
    step = graph.steps[number]
    if step.operation != "map" or step.at or step.stride != (1, 1) or step.out in graph.dense:
        return False
    sources = [step.source] if step.other is None else [step.source, step.other]
    for source, rest in zip(sources, [step.other, step.source], strict=False):
        writers = _writers(graph, source)
        if len(writers) != 1 or source in (X, Y) or len(_readers(graph, source)) != 1:
            continue
        before = graph.steps[writers[0]]
        whole = before.operation in ("conv2d", "map") and not before.at and before.stride == (1, 1)
        both = before.other is not None and step.other is not None
        if before.activation != "none" or not whole or both:
            continue
        if step.other is not None and before.operation == "map":
            continue
        late = rest is not None and any(w > writers[0] for w in _writers(graph, rest))
        if late or (step.other is None and step.activation == "none"):
            continue
        other = before.other if step.other is None else rest
        graph.steps[writers[0]] = replace(
            before, out=step.out, other=other, activation=step.activation
        )
        del graph.steps[number]
        return True
    return False


def _place_parts(graph: Graph) -> None:
    """What is only copied into a part of another tensor is written there at once."""
    for step in [s for s in graph.steps if s.operation == "map"]:
        plain = step.stride == (1, 1) and step.other is None and step.activation == "none"
        writers, readers = _writers(graph, step.source), _readers(graph, step.source)
        if not plain or len(writers) != 1 or len(readers) != 1 or step.source in (X, Y):
            continue
        before = graph.steps[writers[0]]
        movable = before.operation in ("conv2d", "pool") and before.other is None
        if movable and graph.is_dense(step.source) == graph.is_dense(step.out):
            graph.steps[writers[0]] = replace(before, out=step.out, at=step.at)
            graph.steps.remove(step)


def _compact(graph: Graph) -> Graph:
    """The graph without tensors that nobody uses, and steps that nobody reads."""
    needed, steps = {Y}, []
    for step in reversed(graph.steps):
        if step.out in needed:
            needed |= set(step.reads())
            steps.append(step)
    numbers = {t: i for i, t in enumerate([X, Y, *sorted(needed - {X, Y})])}
    shapes = [graph.shapes[t] for t in numbers]
    dense = {numbers[t] for t in graph.dense if t in numbers}
    done = Graph(shapes, dense)
    for step in reversed(steps):
        other = None if step.other is None else numbers[step.other]
        source, out = numbers[step.source], numbers[step.out]
        done.steps.append(replace(step, source=source, out=out, other=other))
    return done
