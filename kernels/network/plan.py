"""Where the tensors of a program lie: layouts, borders, memory and the offsets of non-zeros."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from kernels import blob as b
from kernels.network.graph import Graph, Step, X, Y

Ints = npt.NDArray[np.int32]
FROM, TO, LINE, DENSE = range(4)
NEAR = 160 * 1024  # floats that are to stay near the core
MOST_IMAGES = 64
ALL = 2**30  # images of a group where nothing lies in the arena
SLACK = 16  # floats of the widest vector


@dataclass
class Place:
    """Where a tensor lies, in floats; see `Tensor` in kernels/native/blob.h."""

    kind: int
    pitch: int
    border: int
    channel: int
    image: int
    offset: int = 0
    lead: int = 0
    size: int = 0


@dataclass
class Plan:
    """How a graph runs.

    Attributes:
        images: of a group.
        arena: floats.
        places: of each tensor.
        runs: for each step how many linear steps from it on are one call; 0 inside of one.
        offsets: by step, of its non-zeros on lines.
        inside: by step, which positions of a line are pixels.
    """

    images: int
    arena: int
    places: list[Place]
    runs: list[int]
    offsets: dict[int, Ints]
    inside: dict[int, Ints]


def plan(graph: Graph) -> Plan:
    """The plan of a checked graph; equal graphs have equal plans."""
    classes, borders = _classes(graph), [0] * len(graph.shapes)
    for tensor, root in enumerate(classes):
        needs = [
            max(s.padding) for s in graph.steps if lineable(graph, s) and classes[s.source] == root
        ]
        borders[tensor] = max(needs, default=0)
    runs = _runs(graph)
    images = _images(graph, runs)
    places = [_place(graph, t, borders[t], images) for t in range(len(graph.shapes))]
    arena = _allocate(graph, places, runs)
    found = Plan(images, arena, places, runs, {}, {})
    for number, step in enumerate(graph.steps):
        if lineable(graph, step):
            _on_lines(found, graph, number, step)
    return found


def lineable(graph: Graph, step: Step) -> bool:
    """Whether a convolution's outputs can lie as its inputs do."""
    if step.operation != "conv2d" or step.stride != (1, 1) or _has_own_kernel(step):
        return False
    same = all(
        2 * p == d * (k - 1)
        for p, k, d in zip(step.padding, step.kernel, step.dilation, strict=True)
    )
    return same and not graph.is_dense(step.source) and not graph.is_dense(step.out)


def _has_own_kernel(step: Step) -> bool:
    shape = step.weight
    depthwise = shape.channels == 1 and shape.groups == shape.rows
    return depthwise and step.kernel in ((3, 3), (5, 5))


def _classes(graph: Graph) -> list[int]:
    """A number for each tensor, the same for those that must have one geometry."""
    roots = list(range(len(graph.shapes)))

    def root(tensor: int) -> int:
        while roots[tensor] != tensor:
            tensor = roots[tensor]
        return tensor

    for step in graph.steps:
        if lineable(graph, step):
            for tensor in step.reads():
                if not graph.is_dense(tensor):
                    roots[root(tensor)] = root(step.out)
    return [root(tensor) for tensor in roots]


def _runs(graph: Graph) -> list[int]:
    """Linear steps each of which alone reads the one before it run as one."""
    readers: dict[int, int] = {}
    for step in graph.steps:
        for tensor in step.reads():
            readers[tensor] = readers.get(tensor, 0) + 1
    runs, head = [1] * len(graph.steps), 0
    for i, (before, step) in enumerate(zip(graph.steps, graph.steps[1:], strict=False), start=1):
        both = before.operation == step.operation == "linear"
        if both and step.source == before.out and readers[before.out] == 1:
            head = head if runs[i - 1] == 0 else i - 1
            runs[head] += 1
            runs[i] = 0
    return runs


def _images(graph: Graph, runs: list[int]) -> int:
    if len([run for run in runs if run]) == 1 and graph.steps[0].operation == "linear":
        return ALL
    live = [sum(prod(graph.shapes[t]) for t in alive) for alive in _alive(graph, runs)]
    return max(1, min(MOST_IMAGES, NEAR // max(1, *live)))


def _alive(graph: Graph, runs: list[int]) -> list[set[int]]:
    """Tensors in the arena that are needed during each step."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, step in enumerate(graph.steps):
        for tensor in (*step.reads(), step.out):
            if tensor not in (X, Y):
                first.setdefault(tensor, i)
                last[tensor] = i
    inner = {s.out for i, s in enumerate(graph.steps) if i + 1 < len(runs) and runs[i + 1] == 0}
    steps = range(len(graph.steps))
    return [{t for t in first if first[t] <= i <= last[t] and t not in inner} for i in steps]


def _place(graph: Graph, tensor: int, border: int, images: int) -> Place:
    channels, height, width = graph.shapes[tensor]
    if graph.is_dense(tensor):
        kind = {X: FROM, Y: TO}.get(tensor, DENSE)
        size = 0 if kind != DENSE else images * channels * height * width + SLACK
        return Place(kind, width, 0, height * width, channels * height * width, size=_lines(size))
    pitch = width + border
    image = (height + border) * pitch
    lead = _lines(border * (pitch + 1))
    channel = _lines(lead + images * image + border + SLACK)
    channel += 16 * (channel // 16 % 2 == 0)  # an odd number of cache lines: no two channels clash
    return Place(LINE, pitch, border, channel, image, lead=lead, size=channels * channel + SLACK)


def _lines(floats: int) -> int:
    return -(-floats // 16) * 16


def _allocate(graph: Graph, places: list[Place], runs: list[int]) -> int:
    """Gives each tensor the lowest place that nobody needs at the same time; returns the end."""
    alive = _alive(graph, runs)
    taken: dict[int, tuple[int, int]] = {}
    end = 0
    for now in alive:
        for tensor in sorted(now - taken.keys()):
            during = {t for other in alive if tensor in other for t in other} & taken.keys()
            start, size = 0, _lines(places[tensor].size)
            for low, high in sorted(taken[t] for t in during):
                if start + size <= low:
                    break
                start = max(start, high)
            taken[tensor] = (start, start + size)
            places[tensor].offset = start + places[tensor].lead
            end = max(end, start + size)
    return end


def _on_lines(found: Plan, graph: Graph, number: int, step: Step) -> None:
    assert step.packed is not None
    source, raw = found.places[step.source], step.packed.data.numpy()
    border = source.border
    if step.kernel != (1, 1):
        (kh, kw), (ph, pw), (dh, dw) = step.kernel, step.padding, step.dilation
        rows, cols = np.arange(kh) * dh - ph, np.arange(kw) * dw - pw
        taps = (rows[:, None] * source.pitch + cols[None]).ravel()
        columns = b.entries_of(raw).columns.astype(np.int64)
        offsets = columns // len(taps) * source.channel + taps[columns % len(taps)]
        found.offsets[number] = offsets.astype("<i4")
    if border:
        _, height, width = graph.shapes[step.source]
        at = np.arange(found.images * source.image + 2 * SLACK)
        pixel = (at % source.pitch < width) & (at % source.image // source.pitch < height)
        found.inside[number] = -(pixel & (at < found.images * source.image)).astype("<i4")
