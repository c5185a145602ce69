"""Costs: named numbers with units, to be minimised, each with where it comes from.

Analytic costs are exact and need no torch. FLOPs count a multiply-add once, as the literature on
architecture search does, and only what is left of a sparse weight: non-zeros times positions.
`Latency` is measured on the packed network, beside its dense twin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from nas.choices import Pick
from nas.operations import Layer
from nas.space import Space
from nas.sparsity import kept

if TYPE_CHECKING:
    from torch import Tensor, nn

BYTES = 4  # of a float32
Picked = Mapping[str, Pick]


class Cost(Protocol):
    """What a network costs: a name for objectives and limits, and a unit."""

    name: ClassVar[str]
    unit: ClassVar[str]


@runtime_checkable
class Analytic(Cost, Protocol):
    """A cost that is computed from the architecture alone, before any training."""

    def value(self, space: Space, picks: Picked) -> float:
        """The cost of an architecture."""
        ...


@runtime_checkable
class Measured(Cost, Protocol):
    """A cost that is measured on the packed network."""

    def measure(self, network: nn.Module, twin: nn.Module, example: Tensor) -> dict[str, Any]:
        """Measure a masked network and its dense twin, both unpacked.

        Returns:
            Plain values: `value`, and all that tells where it comes from.
        """
        ...

    @property
    def batch(self) -> int:
        """Samples in the example."""
        ...


@dataclass(frozen=True)
class Parameters:
    """Weights, biases and batch-norm parameters, zeros included."""

    name: ClassVar[str] = "parameters"
    unit: ClassVar[str] = ""

    def value(self, space: Space, picks: Picked) -> float:
        """Exact."""
        return float(sum(prod(layer.shape) for layer in space.layers(picks)))


@dataclass(frozen=True)
class NonZeros:
    """Parameters that the masks keep."""

    name: ClassVar[str] = "nonzeros"
    unit: ClassVar[str] = ""

    def value(self, space: Space, picks: Picked) -> float:
        """Exact."""
        return float(sum(left(layer) for layer in space.layers(picks)))


@dataclass(frozen=True)
class Flops:
    """Multiply-adds of one sample in convolutions and linear layers, zeros left out."""

    name: ClassVar[str] = "flops"
    unit: ClassVar[str] = ""

    def value(self, space: Space, picks: Picked) -> float:
        """Exact."""
        return float(sum(left(layer) * layer.positions for layer in space.layers(picks)))


@dataclass(frozen=True)
class PeakMemory:
    """The most bytes of float32 activations alive at once, for one sample."""

    name: ClassVar[str] = "peak_memory_bytes"
    unit: ClassVar[str] = "B"

    def value(self, space: Space, picks: Picked) -> float:
        """Exact for a graph run node by node."""
        return float(BYTES * space.activations(picks).peak())


@dataclass(frozen=True)
class Latency:
    """Median time of one call of the packed network, in milliseconds.

    Args:
        device: `cpu` or `cuda`.
        threads: Of torch, while measuring.
        batch: Samples in a call.
    """

    device: str = "cpu"
    threads: int = 1
    batch: int = 1
    name: ClassVar[str] = "latency_ms"
    unit: ClassVar[str] = "ms"

    def measure(self, network: nn.Module, twin: nn.Module, example: Tensor) -> dict[str, Any]:
        """Pack both and measure them interleaved; see `nas.latency.measure`."""
        from nas.latency import measure
        from nas.packing import pack

        example = example.to(self.device)
        network = network.to(self.device)  # its layers' times are told too: they are taken now
        packed = pack(network, example, threads=self.threads, measure="anew")
        dense = pack(twin.to(self.device), example, kernels="dense", threads=self.threads)
        timing = measure(packed, dense, example, threads=self.threads)
        found = {"value": timing.median_ms, "kind": "measured", "batch": self.batch}
        layers: dict[str, float] = {}
        for line in packed.layers:  # one called twice has two
            layers[line.layer] = layers.get(line.layer, 0.0) + line.us / 1e3
        return {**found, **asdict(timing), "layers": layers}


COSTS: dict[str, type] = {c.name: c for c in (Parameters, NonZeros, Flops, PeakMemory, Latency)}


def left(layer: Layer) -> int:
    """Elements of a weight tensor that its sparsity keeps."""
    return kept(layer.sparsity, layer.shape)
