"""What packing did, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch.fx import Node

from kernels.limits import limits
from nas.packing import devices
from nas.packing.layer import Layer
from nas.packing.runs import Run
from nas.packing.tune import Choice

_BYTES = 4  # of a float32
_HEAD = ("layer", "weight", "input", "pattern", "sparsity", "kernel")
_TIMES = ("us", "of limit", "dense us", "ratio")


@dataclass(frozen=True)
class PackedLayer:
    """One call of a layer in a packed network.

    Attributes:
        layer: the path of its module.
        operation: `linear` or `conv2d`.
        weight_shape: (out, in) or (out, in / groups, kh, kw).
        input_shape: the shape that was measured, batch first.
        pattern: how the packed weight is laid out, or `-` where none was made.
        sparsity: the share of zeros in the weight; 0.9 is 90 % zeros.
        kernel: what runs it; `sparse_chain[0]` is the first run of layers in one call,
            `sparse_linear[few]` the operator and its kernel on a GPU.
        us: median microseconds of that kernel called by itself. In a run: of the layer's own step,
            as timed inside the C core on what reaches it, no call from Python in it; linear layers
            that run as one step share its time as they take time by themselves.
        dense_us: the dense kernel's, called by itself.
        limit_us: the least time that the cores could take with the zeros left out: the larger of
            multiply-adds (non-zeros times samples, or output pixels) over a core's peak and bytes
            (non-zeros, input and output once each) over its bandwidth from a buffer of that size;
            of several threads each has an equal part of both. None without a compiled core, and on
            a GPU.
        measured: `now`, as it was packed; `earlier`: both times come from such a layer that was
            measured before; `dense earlier`: only dense_us does.
    """

    layer: str
    operation: str
    weight_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    pattern: str
    sparsity: float
    kernel: str
    us: float
    dense_us: float
    limit_us: float | None
    measured: str = "now"

    @property
    def ratio(self) -> float:
        """How many times faster than dense."""
        return self.dense_us / self.us


@dataclass(frozen=True)
class PackedRun:
    """Layers computed in one call: what it takes beside their own steps.

    Attributes:
        kernel: `sparse_chain[0]` for the first, as in the rows of its layers.
        between_us: median microseconds inside the C core of all steps that are no layer: pooling,
            sums, copies, norms that no layer took in.
        call_us: of the call from Python, timed on a batch of 0, right after the run. With it the
            layers' and `between_us` add up to what the run takes.
    """

    kernel: str
    between_us: float
    call_us: float


def describe(
    choices: Mapping[Node, Choice], runs: Sequence[Run]
) -> tuple[tuple[PackedLayer, ...], tuple[PackedRun, ...]]:
    """The rows of all choices, those in a run with their own part of its time, and the runs."""
    rows, parts = {node: row(choice) for node, choice in choices.items()}, []
    for index, run in enumerate(runs):
        kernel = f"sparse_chain[{index}]"
        for node, us in run.spent.layers_us.items():
            when = "dense earlier" if choices[node].earlier else "now"
            rows[node] = replace(rows[node], kernel=kernel, us=us, measured=when)
        parts.append(PackedRun(kernel, run.spent.between_us, run.spent.call_us))
    return tuple(rows.values()), tuple(parts)


def row(choice: Choice) -> PackedLayer:
    """The row of one choice, its layer called by itself."""
    layer = choice.layer
    pattern = "-" if choice.sparse is None else str(layer.packed.meta["pattern"])
    return PackedLayer(
        layer.name,
        layer.operation,
        tuple(layer.weight.shape),
        choice.shape,
        pattern,
        layer.sparsity,
        choice.kernel.name,
        choice.us,
        choice.dense_us,
        limit_us(layer, choice.shape, torch.get_num_threads()),
        "earlier" if choice.earlier else "now",
    )


def limit_us(layer: Layer, given: tuple[int, ...], threads: int) -> float | None:
    """See `PackedLayer.limit_us`; `given` is the shape of the input."""
    core = limits() if devices.of(layer.weight).core else None
    if core is None:
        return None
    kept, positions = layer.nonzeros, layer.positions(given)
    size = _BYTES * (kept + prod(given) + positions * len(layer.weight))
    return core.least_us(kept * positions / threads, size / threads)


def table(
    layers: tuple[PackedLayer, ...], runs: tuple[PackedRun, ...], notes: tuple[str, ...]
) -> str:
    """A plain text table of `layers` and of what else `runs` do, with `notes` below it.

    Where a time was measured earlier, a last column says of which rows.
    """
    cells = [(*_HEAD, *_TIMES, "measured"), *_rows(layers, {run.kernel: run for run in runs})]
    if all(layer.measured == "now" for layer in layers):
        cells = [line[:-1] for line in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _rows(
    layers: tuple[PackedLayer, ...], runs: Mapping[str, PackedRun]
) -> Iterator[tuple[str, ...]]:
    """The layers in order, behind the last one of a run the rest of it."""
    last = {line.kernel: index for index, line in enumerate(layers)}
    for index, line in enumerate(layers):
        yield _cells(line)
        if line.kernel in runs and last[line.kernel] == index:
            yield from _rest(runs[line.kernel])


def _cells(line: PackedLayer) -> tuple[str, ...]:
    return (
        line.layer,
        "x".join(map(str, line.weight_shape)),
        "x".join(map(str, line.input_shape)),
        line.pattern,
        f"{line.sparsity:.3f}",
        line.kernel,
        f"{line.us:.1f}",
        "-" if line.limit_us is None else f"{line.limit_us / line.us:.0%}",
        f"{line.dense_us:.1f}",
        f"{line.ratio:.2f}",
        line.measured,
    )


def _rest(run: PackedRun) -> Iterator[tuple[str, ...]]:
    parts = {"(pooling, sums, copies)": run.between_us, "(the call)": run.call_us}
    for name, us in parts.items():
        if us:
            yield (name, "-", "-", "-", "-", run.kernel, f"{us:.1f}", "-", "-", "-", "now")
