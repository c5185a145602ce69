"""Images beside each other: the graph of a program whose pixels are vectors of images."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from kernels.network.graph import Graph, Step, X

PIXEL = 16  # floats: images, or parts of fewer images
PARTS = (1, 2, 4, 8)
NEAR = 2**20  # floats that a step of a group reads and writes


def fits(graph: Graph, parts: int) -> bool:
    """Whether a graph can run with `PIXEL // parts` images beside each other, each in parts.

    Of several parts every height must be divisible, strides must divide evenly, and pools may
    not reach from one part into another; no stride between columns may exceed 2.
    """
    steps = [step for step in graph.steps if step.operation != "linear"]
    if any(step.operation == "conv2d" and step.stride[1] > 2 for step in steps):
        return False
    return parts == 1 or all(_divides(graph, step, parts) for step in steps)


def parts_for(graph: Graph, batch: int) -> int:
    """The fewest parts that a batch fills and whose groups stay near; 0 where there are none."""
    largest = max(sum(prod(graph.shapes[t]) for t in (s.source, s.out)) for s in graph.steps)
    for parts in PARTS:
        images = PIXEL // parts
        if images <= batch and images * largest <= NEAR and fits(graph, parts):
            return parts
    return 0


def _divides(graph: Graph, step: Step, parts: int) -> bool:
    given, gives = graph.shapes[step.source][1], graph.shapes[step.out][1]
    if step.operation == "mean":
        return given % parts == 0
    alone = step.operation != "pool" or (step.kernel[0] <= step.stride[0] and not step.padding[0])
    whole = given % parts == 0 and gives % parts == 0 and given == step.stride[0] * gives
    return whole and alone and edge(graph, step) <= given // parts


def edge(graph: Graph, step: Step) -> int:
    """Pixels around its input that a convolution reads."""
    if step.operation != "conv2d":
        return 0
    shapes = zip(graph.shapes[step.source][1:], graph.shapes[step.out][1:], strict=True)
    walks = zip(step.kernel, step.stride, step.padding, step.dilation, strict=True)
    reach = [0]
    for (given, gives), (kernel, stride, padding, dilation) in zip(shapes, walks, strict=True):
        last = (gives - 1) * stride + (kernel - 1) * dilation - padding
        reach += [padding, last - (given - 1)]
    return max(reach)


def laned(graph: Graph, parts: int) -> Graph:
    """The graph with copies where lanes meet dense tensors; one of lanes is left as it is.

    What linear layers and means write is dense, as are x and y; so is what linear layers read.
    """
    rows = {s.out for s in graph.steps if s.operation in ("linear", "mean")}
    done = Graph(list(graph.shapes), graph.dense | rows, parts=parts)
    entered: dict[int, int] = {}

    def lanes(tensor: int) -> int:
        if not done.is_dense(tensor):
            return tensor
        if tensor not in entered:
            copy = done.tensor(done.shapes[tensor])
            done.steps.append(Step("map", tensor, copy))
            if tensor != X:  # others may be written again
                return copy
            entered[tensor] = copy
        return entered[tensor]

    for number, step in enumerate(graph.steps):
        if step.operation == "zero" or step.copies:
            done.steps.append(step)
        elif step.operation == "linear":
            source = step.source
            if not done.is_dense(source):
                source = done.tensor(done.shapes[source], dense=True)
                done.steps.append(Step("map", step.source, source))
            done.steps.append(replace(step, source=source))
        else:
            other = None if step.other is None else lanes(step.other)
            source, out, at = lanes(step.source), step.out, step.at
            leaves = step.operation != "mean" and done.is_dense(out)
            if leaves:
                out, at = done.tensor(graph.gives(number, step)), 0
            done.steps.append(replace(step, source=source, other=other, out=out, at=at))
            if leaves:
                done.steps.append(Step("map", out, step.out, at=step.at))
    return done
