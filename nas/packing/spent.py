"""Where the time of one call of many layers goes, as timed inside the C core."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

from torch import Tensor
from torch.fx import Node

from kernels import network
from kernels.native.library import library
from nas.latency import no_gc
from nas.packing.layer import Kernel, Layer

SECONDS = 0.05
ROUNDS = 5  # at least


@dataclass(frozen=True)
class Spent:
    """Median microseconds of the parts of one call.

    Attributes:
        layers_us: of each layer, that of its own step. Linear layers that run as one step share
            its time as they take time by themselves; so do all layers where no core is compiled.
        between_us: of all other steps: pooling, sums, copies, norms that no layer took in.
        call_us: of a call from Python on a batch of 0, which computes nothing, made when the run
            has just left the caches: about that is what a call takes beside its steps.
    """

    layers_us: Mapping[Node, float]
    between_us: float
    call_us: float


def own_steps(graph: network.Graph, program: Tensor, layers: list[Node]) -> dict[Node, int]:
    """The number of each layer's step in the program that was written from `graph`.

    Writing may add steps, but keeps those with a weight in their order.
    """
    weights = [step.packed for step in graph.steps if step.packed is not None]
    theirs = {id(node.target.packed) for node in layers if isinstance(node.target, Layer)}
    numbered = zip(network.weighted_steps(program), weights, strict=True)
    return dict(zip(layers, (n for n, packed in numbered if id(packed) in theirs), strict=True))


def spent(
    kernel: Kernel, x: Tensor, us: float, steps: Mapping[Node, int], alone_us: Mapping[Node, float]
) -> Spent:
    """Time the steps of a program on `x`, and turn by turn a call of it on a batch of 0.

    Args:
        kernel: calls the program first.
        x: its input.
        us: microseconds of a call of it.
        steps: the number of each layer's step, in their order.
        alone_us: microseconds of each layer by itself.
    """
    if library() is None:
        return Spent(_shared(us, list(steps), alone_us), 0.0, 0.0)
    call_us, steps_us = _timed(kernel, x, max(ROUNDS, int(SECONDS / us * 1e6)))
    layers_us: dict[Node, float] = {}
    for nodes in _together(steps_us, steps):
        layers_us |= _shared(steps_us[steps[nodes[0]]], nodes, alone_us)
    others = steps_us.keys() - set(steps.values())
    between_us = sum(steps_us[number] for number in others)
    return Spent(layers_us, between_us, call_us)


def _timed(kernel: Kernel, x: Tensor, rounds: int) -> tuple[float, dict[int, float]]:
    """Median microseconds of an empty call, and of each step."""
    program, tail = kernel.steps[0].args
    steps_s, calls_s, empty = list[list[float]](), list[float](), x[:0]
    with no_gc():
        for _ in range(rounds):
            steps_s.append(network.step_s(x, program, tail))
            calls_s.append(_seconds(kernel, empty))
    medians = map(statistics.median, zip(*steps_s, strict=True))
    steps_us = {number: seconds * 1e6 for number, seconds in enumerate(medians)}
    return statistics.median(calls_s) * 1e6, steps_us


def _seconds(kernel: Kernel, x: Tensor) -> float:
    begun = perf_counter()
    kernel(x)
    return perf_counter() - begun


def _together(steps_us: Mapping[int, float], steps: Mapping[Node, int]) -> list[list[Node]]:
    """Layers that run as one step: the first has its time, the others none."""
    found: list[list[Node]] = []
    for node, number in steps.items():
        if steps_us[number] > 0 or not found:
            found.append([])
        found[-1].append(node)
    return found


def _shared(us: float, nodes: list[Node], alone_us: Mapping[Node, float]) -> dict[Node, float]:
    whole = sum(alone_us[node] for node in nodes)
    return {node: alone_us[node] / whole * us for node in nodes}
