"""A space: a graph with choices in it. An architecture: the picks that leave none.

`Space` is what strategies, costs and the loop see; `GraphSpace` is one written down as a graph,
`nas.sparsify` makes one of any module. This file imports torch only to build.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np

from nas.choices import Choice, Choices, Decision, Label, Pick, Picks, Subset, fingerprint
from nas.graph import Graph, Node
from nas.inside import merge
from nas.operations import Layer, Operation, Shape
from nas.sparsity import check

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Architecture:
    """One point of a space: a hashable value and plain JSON.

    Args:
        text: Canonical picks as JSON; use `Space.architecture` to make one.
        space: Fingerprint of the space.
    """

    text: str
    space: str

    @property
    def picks(self) -> Picks:
        """Label by choice, active choices only, in the space's order."""
        return json.loads(self.text)

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits, the same for equal architectures."""
        return hashlib.sha256(f"{self.space}{self.text}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Origin:
    """How to make a space again: a function of `search_spaces` and its plain arguments."""

    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Space:
    """Choices and what they build; see `GraphSpace` and `nas.sparsify`.

    Args:
        choices: All choices, conditions before what depends on them.
        input_shape: Shape of one sample, without the batch.
        shapes: What else tells this space from another (plain JSON), for its fingerprint.
        origin: How to make it again, where that is possible.
    """

    def __init__(
        self,
        choices: Iterable[Decision],
        input_shape: Shape,
        shapes: Any,
        origin: Origin | None = None,
    ) -> None:
        self.choices = Choices(choices)
        self.input_shape = tuple(input_shape)
        self.origin = origin
        self.fingerprint = fingerprint(self.choices.describe(), list(input_shape), shapes)

    def size(self) -> int:
        """The number of architectures."""
        return self.choices.size()

    def sample(self, rng: np.random.Generator, fixed: Mapping[str, Pick] | None = None) -> Picks:
        """Picks of one architecture, each choice uniformly."""
        return self.choices.sample(rng, fixed)

    def neighbours(self, picks: Picks, rng: np.random.Generator | None = None) -> Iterator[Picks]:
        """Picks that differ in one decision."""
        return self.choices.neighbours(picks, rng)

    def mutate(self, picks: Picks, rng: np.random.Generator) -> Picks:
        """Picks that differ in one decision, drawn."""
        return self.choices.mutate(picks, rng)

    def architecture(self, picks: Mapping[str, Pick]) -> Architecture:
        """The architecture of these picks, canonical. Raises ValueError if they are not valid."""
        text = json.dumps(self.choices.canonical(picks), separators=(",", ":"))
        return Architecture(text, self.fingerprint)

    def open(self, picks: Mapping[str, Pick]) -> tuple[str, ...]:
        """Names of the choices that the picks leave open; none: it is an architecture."""
        return self.choices.open(picks)

    def smallest(self) -> Picks:
        """Each choice at its option of the least weights."""
        return self._extreme(largest=False)

    def largest(self) -> Picks:
        """Each choice at its option of the most weights: at sparsity 0, the dense parent."""
        return self._extreme(largest=True)

    def _extreme(self, largest: bool) -> Picks:
        picks: Picks = {}
        for choice in self.choices:
            if self.choices.active(choice, picks):
                picks[choice.name] = self._extreme_pick(choice, largest)
        return self.choices.canonical(picks)

    def _extreme_pick(self, choice: Decision, largest: bool) -> Pick:
        if isinstance(choice, Subset):
            return list(choice.items[-choice.k :] if largest else choice.items[: choice.k])
        pick = max if largest else min
        return pick(choice.labels, key=lambda label: self.weight(choice, label))

    def weight(self, choice: Choice, label: Label) -> float:
        """What an option adds to a network's size, to compare options of one choice."""
        value = choice.value(label)
        if hasattr(value, "ratio"):
            return 1 - value.ratio
        return float(value) if isinstance(value, int | float) else 0.0

    def build(self, picks: Mapping[str, Pick], masked: bool = True) -> nn.Module:
        """A plain module; with choices left open, the supernet.

        Args:
            picks: Picks, all or some.
            masked: Whether weights are masked; without, the dense twin.
        """
        raise NotImplementedError

    def layers(self, picks: Mapping[str, Pick]) -> list[Layer]:
        """Every weight tensor of an architecture, under its full path; for costs."""
        raise NotImplementedError

    def activations(self, picks: Mapping[str, Pick]) -> Activations:
        """Sizes of what flows through an architecture, and until when each is needed."""
        raise NotImplementedError

    def draw(self, picks: Mapping[str, Pick]) -> nx.DiGraph[str]:
        """The graph of an architecture; nodes carry `label`, `shape`, `sparsity` and `path`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Activations:
    """Elements of each step's output, per sample, and the last step that reads it."""

    sizes: tuple[int, ...]
    last_use: tuple[int, ...]

    def peak(self) -> int:
        """The most elements alive at once, each step's inputs and output together."""
        alive = (
            sum(s for j, s in enumerate(self.sizes[: i + 1]) if self.last_use[j] >= i)
            for i in range(len(self.sizes))
        )
        return max(alive)


class GraphSpace(Space):
    """A space that is written down: a graph with choices in it.

    Args:
        graph: The graph; its output is the network's.
        first: Choices that conditions of nodes ask for and no node holds (such as a depth).
        origin: How to make it again.
    """

    def __init__(
        self, graph: Graph, first: Iterable[Decision] = (), origin: Origin | None = None
    ) -> None:
        self.graph = graph
        self._widest = graph.shapes()
        self._holders = {
            getattr(n.operation, "name", ""): n for n in reversed(graph.nodes.values())
        }
        shapes = [[name, list(shape)] for name, shape in self._widest.items()]
        choices = merge([*first, *graph.choices()])
        super().__init__(choices, graph.input_shape, shapes, origin)
        _check_sparsities(graph, choices)

    def settled(self, picks: Mapping[str, Pick]) -> Graph:
        """The graph under these picks; what they leave open stays a choice."""
        picks = self.choices.partial(picks)
        return self.graph.settle(picks, self.choices.open(picks))

    def build(self, picks: Mapping[str, Pick], masked: bool = True) -> nn.Module:
        """See `Space.build`."""
        from nas.network import Network

        still_open = [self.choices[name] for name in self.open(self.choices.partial(picks))]
        return Network(self.settled(picks), still_open, masked)

    def layers(self, picks: Mapping[str, Pick]) -> list[Layer]:
        """See `Space.layers`."""
        return [layer for _, _, layer in self.settled(picks).layers()]

    def activations(self, picks: Mapping[str, Pick]) -> Activations:
        """See `Space.activations`."""
        graph = self.settled(picks)
        order = {name: i for i, name in enumerate(["input", *graph.nodes])}
        last = dict.fromkeys(order, 0) | {graph.output: len(order)}
        for node in graph.nodes.values():
            last |= {i: max(last[i], order[node.name]) for i in node.inputs}
        sizes = tuple(prod(shape) for shape in graph.shapes().values())
        return Activations(sizes, tuple(last.values()))

    def weight(self, choice: Choice, label: Label) -> float:
        """See `Space.weight`; an operation weighs what its weights do where it first stands."""
        value = choice.value(label)
        if not isinstance(value, Operation):
            return super().weight(choice, label)
        inputs = (self._widest[i] for i in self._holders[choice.name].inputs)
        return float(sum(prod(layer.shape) for layer in value.layers(*inputs)))

    def draw(self, picks: Mapping[str, Pick]) -> nx.DiGraph[str]:
        """See `Space.draw`."""
        graph, shapes = self.settled(picks), self.settled(picks).shapes()
        drawn = graph.networkx()
        for name, node in graph.nodes.items():
            drawn.nodes[name].update(label=_title(node), shape=shapes[name])
        for node, _, layer in graph.layers():
            if len(layer.shape) > 1:
                held = drawn.nodes[node.name]
                held.setdefault("sparsity", getattr(layer.sparsity, "label", "open"))
        return drawn


def _check_sparsities(graph: Graph, choices: Iterable[Decision]) -> None:
    """Raise ValueError for a sparsity that its tensor does not admit at every width."""
    names = {c.name for c in choices}
    outs = [getattr(node.operation, "out", None) for node in graph.nodes.values()]
    widths = {out.name: out for out in outs if isinstance(out, Choice)}
    each: list[Picks] = [{name: size} for name, w in widths.items() for size in w.labels]
    for picks in ({}, *each):
        for _, _, layer in graph.settle(picks, names - set(picks)).layers():
            for sparsity in _options(layer.sparsity):
                check(sparsity, layer.shape, layer.path)


def _options(sparsity: Any) -> list[Any]:
    return [x for _, x in sparsity.options] if isinstance(sparsity, Choice) else [sparsity]


def _title(node: Node) -> str:
    return str(node.label or type(node.operation).__name__)
