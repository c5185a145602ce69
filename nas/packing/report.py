"""What packing did, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from nas.packing.runs import Run
from nas.packing.tune import Choice


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
        kernel: what runs it; `sparse_chain[0]` is the first run of layers in one call.
        us: median microseconds of that kernel called by itself. In a run: the run's time, shared
            out as its layers' own times are.
        dense_us: the dense kernel's, from the same rounds.
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

    @property
    def ratio(self) -> float:
        """How many times faster than dense."""
        return self.dense_us / self.us


def describe(choices: Mapping[Node, Choice], runs: Sequence[Run]) -> tuple[PackedLayer, ...]:
    """The rows of all choices, those in a run with their share of its time."""
    rows = {node: row(choice) for node, choice in choices.items()}
    for index, run in enumerate(runs):
        layers = [node for node in run.nodes if node in rows]
        apart = sum(rows[node].us for node in layers)
        for node in layers:
            share = rows[node].us / apart * run.us
            rows[node] = replace(rows[node], kernel=f"sparse_chain[{index}]", us=share)
    return tuple(rows.values())


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
    )


def table(layers: tuple[PackedLayer, ...], notes: tuple[str, ...]) -> str:
    """A plain text table of `layers`, with `notes` below it."""
    head = ("layer", "weight", "input", "pattern", "sparsity", "kernel", "us", "dense us", "ratio")
    cells = [head, *map(_cells, layers)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _cells(line: PackedLayer) -> tuple[str, ...]:
    return (
        line.layer,
        "x".join(map(str, line.weight_shape)),
        "x".join(map(str, line.input_shape)),
        line.pattern,
        f"{line.sparsity:.3f}",
        line.kernel,
        f"{line.us:.1f}",
        f"{line.dense_us:.1f}",
        f"{line.ratio:.2f}",
    )
