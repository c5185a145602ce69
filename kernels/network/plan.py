"""Where the tensors of a program lie: layouts, borders, memory and the offsets of non-zeros."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from kernels import blob as b
from kernels.network.graph import Graph, Pair, Step, X, Y
from kernels.network.lanes import PIXEL, edge

Ints = npt.NDArray[np.int32]
FROM, TO, LINE, DENSE, PIXELS = range(5)
NEAR = 160 * 1024  # floats that are to stay near the core
MOST_IMAGES = 64
MOST = 2**31  # floats of all activations of a group
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
    runs = _runs(graph)
    images = _images(graph, runs)
    borders = _edges(graph) if graph.parts else _borders(graph)
    places = [_place(graph, t, border, images) for t, border in enumerate(borders)]
    arena = _allocate(graph, places, runs)
    if arena >= MOST:
        raise ValueError(f"program: activations must be less than {MOST} floats, got {arena}")
    found = Plan(images, arena, places, runs, {}, {})
    for number, step in enumerate(graph.steps):
        if graph.parts and step.operation == "conv2d":
            _in_lanes(found, number, step)
        elif lineable(graph, step):
            _on_lines(found, graph, number, step)
    return found


def lineable(graph: Graph, step: Step) -> bool:
    """Whether a convolution's outputs can lie as its inputs do."""
    if graph.parts or step.operation != "conv2d" or step.stride != (1, 1) or _has_own_kernel(step):
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


def _borders(graph: Graph) -> list[int]:
    """Of each tensor on lines, the zeros that any reader of its class needs."""
    classes, borders = _classes(graph), [0] * len(graph.shapes)
    for tensor, root in enumerate(classes):
        needs = [
            max(s.padding) for s in graph.steps if lineable(graph, s) and classes[s.source] == root
        ]
        borders[tensor] = max(needs, default=0)
    return borders


def _edges(graph: Graph) -> list[int]:
    """Of each tensor in lanes, the pixels around it that its readers need."""
    edges = [0] * len(graph.shapes)
    for step in graph.steps:
        edges[step.source] = max(edges[step.source], edge(graph, step))
    return edges


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
    writers = Counter(step.out for step in graph.steps)
    runs, head = [1] * len(graph.steps), 0
    for i, (before, step) in enumerate(zip(graph.steps, graph.steps[1:], strict=False), start=1):
        both = before.operation == step.operation == "linear"
        alone = readers.get(before.out) == 1 and writers[before.out] == 1
        if both and step.source == before.out and alone:
            head = head if runs[i - 1] == 0 else i - 1
            runs[head] += 1
            runs[i] = 0
    return runs


def _images(graph: Graph, runs: list[int]) -> int:
    if graph.parts:
        return PIXEL // graph.parts
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
    if graph.parts:
        return _pixels(channels, height // graph.parts, width, border)
    pitch = width + border
    image = (height + border) * pitch
    lead = _lines(border * (pitch + 1))
    channel = _apart(_lines(lead + images * image + border + SLACK))
    return Place(LINE, pitch, border, channel, image, lead=lead, size=channels * channel + SLACK)


def _pixels(channels: int, height: int, width: int, border: int) -> Place:
    pitch, around = (width + border) * PIXEL, border * PIXEL
    lead = border * pitch + around
    channel = _apart(lead + (height + border) * pitch)
    return Place(PIXELS, pitch, border, channel, 0, lead=lead, size=channels * channel)


def _lines(floats: int) -> int:
    return -(-floats // 16) * 16


def _apart(channel: int) -> int:
    """An odd number of cache lines, so that no two channels clash."""
    return channel + 16 * (channel // 16 % 2 == 0)


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


def _in_lanes(found: Plan, number: int, step: Step) -> None:
    if step.kernel != (1, 1):
        source, (dh, dw) = found.places[step.source], step.dilation
        taps = (dh * source.pitch, dw * PIXEL)
        found.offsets[number] = _offsets(step, source.channel, taps, (0, 0))


def _offsets(step: Step, channel: int, apart: Pair, first: Pair) -> Ints:
    """Of the non-zeros of a convolution, taps so many floats `apart` from the `first` on."""
    assert step.packed is not None
    rows, cols = (f + np.arange(k) * a for k, a, f in zip(step.kernel, apart, first, strict=True))
    taps = (rows[:, None] + cols[None]).ravel()
    columns = b.entries_of(step.packed.data.numpy()).columns.astype(np.int64)
    offsets = columns // len(taps) * channel + taps[columns % len(taps)]
    if len(offsets) and (reach := max(-offsets.min(), offsets.max())) >= 2**31:
        raise ValueError(f"program: offsets of non-zeros must be less than 2^31, got {reach}")
    return offsets.astype("<i4")


def _on_lines(found: Plan, graph: Graph, number: int, step: Step) -> None:
    source = found.places[step.source]
    border = source.border
    if step.kernel != (1, 1):
        (ph, pw), (dh, dw) = step.padding, step.dilation
        apart, first = (dh * source.pitch, dw), (-ph * source.pitch, -pw)
        found.offsets[number] = _offsets(step, source.channel, apart, first)
    if border:
        _, height, width = graph.shapes[step.source]
        at = np.arange(found.images * source.image + 2 * SLACK)
        pixel = (at % source.pitch < width) & (at % source.image // source.pitch < height)
        found.inside[number] = -(pixel & (at < found.images * source.image)).astype("<i4")
