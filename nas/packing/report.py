"""What packing did, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass

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
        kernel: what runs it; `sparse_chain[2]` is the third run of layers in one call.
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


def describe(choice: Choice) -> PackedLayer:
    """The row of one choice."""
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
    rows = [head, *map(_cells, layers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _cells(row: PackedLayer) -> tuple[str, ...]:
    return (
        row.layer,
        "x".join(map(str, row.weight_shape)),
        "x".join(map(str, row.input_shape)),
        row.pattern,
        f"{row.sparsity:.3f}",
        row.kernel,
        f"{row.us:.1f}",
        f"{row.dense_us:.1f}",
        f"{row.ratio:.2f}",
    )
