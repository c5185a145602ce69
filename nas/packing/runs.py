"""Runs: layers computed in one call, with what lies between them, where that is faster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from kernels import network
from nas.packing.convert import Converter
from nas.packing.layer import Kernel, Layer, Step, aten
from nas.packing.lower import Placement, lower
from nas.packing.spent import Spent, own_steps, spent
from nas.packing.straight import straight
from nas.packing.tune import WORTH_PACKING, Choice, as_dense, close, time_us

SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """Layers computed by one call.

    Attributes:
        nodes: theirs and those between, in order.
        source: what the first of them reads.
        kernel: the chain.
        us: its median time, microseconds.
        apart_us: that of the layers' own fastest kernels in turn, from the same rounds.
        spent: on what.
    """

    nodes: tuple[Node, ...]
    source: Node
    kernel: Kernel
    us: float
    apart_us: float
    spent: Spent


@dataclass(frozen=True)
class _Stretch:
    """Nodes that follow each other, what feeds them, what computes them, layers by which step.

    What `graph` gives has the shape of what `last` does; None: of any leading dimensions.
    """

    graph: network.Graph
    nodes: tuple[Node, ...]
    source: Node
    last: Node | None
    kernel: Kernel
    steps: Mapping[Node, int]

    def beside(self, batch: int) -> list[_Stretch]:
        """The same with images beside each other, where a batch has enough small ones."""
        parts = 0 if self.last is None else network.lanes.parts_for(self.graph, batch)
        taken = (self.graph, self.nodes, self.source, self.last)
        return [_stretch(*taken, parts)] if parts else []


def find_runs(
    module: GraphModule,
    choices: Mapping[Node, Choice],
    example: tuple[Tensor, ...],
    sparse_too: bool = True,
) -> list[Run]:
    """The runs of `module` that are faster in one call, as timed on what reaches them.

    The longest are tried first; where one loses, those of its stretches are tried whose layers
    all chose their sparse kernel. Without `sparse_too` layers with zeros to leave out stay out:
    a dense twin may gain by being one call, not by its zeros.
    """
    right = {node for node, choice in choices.items() if not choice.note}
    if not sparse_too:
        right = {node for node in right if choices[node].layer.sparsity < WORTH_PACKING}
    sparse = {node for node in right if choices[node].kernel is choices[node].sparse}
    candidates = _stretches(module, right)
    if sparse != right:
        candidates += _stretches(module, sparse)
    finder = _Finder(module, choices, candidates)
    if candidates:
        finder.run(*(tensor.clone() for tensor in example))
    return finder.runs


def _stretches(module: GraphModule, among: set[Node]) -> list[_Stretch]:
    """The longest stretches of images, and of linear layers alone."""
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    found: list[_Stretch] = []
    start = 0
    while start < len(nodes):
        stretch = _images(module, nodes[start:], among) or _features(nodes[start:], among)
        if stretch is not None:
            found.append(stretch)
        start += len(stretch.nodes) if stretch else 1
    return found


def _images(module: nn.Module, nodes: list[Node], among: set[Node]) -> _Stretch | None:
    """The longest stretch from the first node on that reads one value and gives one."""
    sources = [part for part in nodes[0].all_input_nodes if part.op != "get_attr"]
    value = sources[0].meta.get("val") if len(sources) == 1 else None
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    converter, taken, last = Converter(module, sources[0]), list[Node](), 0
    for node in nodes:
        layer = isinstance(node.target, Layer)
        if (layer and node not in among) or not converter.take(node):
            break
        taken.append(node)
        inside = set(taken)
        outside = [n for n in taken[:-1] if not inside.issuperset(n.users)]
        if not outside and converter.ends_at(node) is not None:
            last = len(taken)
    whole = tuple(taken[:last])
    graph = converter.ends_at(whole[-1]) if len(_layers(whole)) > 1 else None
    return None if graph is None else _stretch(graph, whole, sources[0], whole[-1])


def _features(nodes: list[Node], among: set[Node]) -> _Stretch | None:
    """Linear layers one after the other, on inputs of any leading dimensions."""
    taken: list[Node] = []
    for node in nodes:
        linear = isinstance(node.target, Layer) and node.target.conv is None and node in among
        if not linear or (taken and (node.args[0] is not taken[-1] or len(taken[-1].users) != 1)):
            break
        taken.append(node)
    if len(taken) < 2:
        return None
    layers = [node.target for node in taken]
    graph = network.Graph([_features_of(layers[0], 1), _features_of(layers[-1], 0)])
    value = network.X
    for layer in layers:
        assert isinstance(layer, Layer)
        last = layer is layers[-1] and len(graph.steps) + 1 == len(layers)
        out = network.Y if last else graph.tensor(_features_of(layer, 0))
        graph.steps.append(network.Step("linear", value, out, **layer.fused()))
        value = out
    return _stretch(graph, tuple(taken), taken[0].all_input_nodes[0], None)


def _features_of(layer: Any, axis: int) -> tuple[int, int, int]:
    return (int(layer.weight.shape[axis]), 1, 1)


def _layers(nodes: Iterable[Node]) -> list[Node]:
    return [node for node in nodes if isinstance(node.target, Layer)]


def _stretch(
    graph: network.Graph,
    nodes: tuple[Node, ...],
    source: Node,
    last: Node | None,
    parts: int = 0,
) -> _Stretch:
    shape, program = graph.shapes[network.Y], network.write(graph, parts)
    tail = list(shape[:1] if last is None else shape)
    chain = Step(torch.ops.sparse_nas.sparse_chain.default, (program, tail))
    flat = last is not None and last.meta["val"].dim() == 2
    kernel = Kernel("sparse_chain", (chain, *([Step(aten.flatten.using_ints, (1,))] * flat)))
    steps = own_steps(graph, program, _layers(nodes))
    return _Stretch(graph, nodes, source, last, kernel, steps)


class _Finder(Interpreter):
    """Runs a graph and times each candidate on the very input that reaches it."""

    def __init__(
        self, module: GraphModule, choices: Mapping[Node, Choice], candidates: list[_Stretch]
    ) -> None:
        super().__init__(module)
        self.choices = choices
        self.candidates = candidates
        self.runs: list[Run] = []

    def run_node(self, n: Node) -> Any:
        for stretch in self.candidates:
            taken = {node for run in self.runs for node in run.nodes}
            if stretch.nodes[0] is n and taken.isdisjoint(stretch.nodes):
                self.runs += self._tried(stretch, self.env[stretch.source])
        return super().run_node(n)

    def _tried(self, stretch: _Stretch, x: Tensor) -> list[Run]:
        dense = {node: as_dense(choice) for node, choice in self.choices.items()}
        expected = _apart(self.module, stretch, dense)(x.clone())
        ways = [stretch, *stretch.beside(len(x))]
        right = [way for way in ways if close(way.kernel(x), expected)]
        apart = _apart(self.module, stretch, self.choices)
        apart_us, *all_us = time_us([apart, *(way.kernel for way in right)], x, SECONDS)
        us, best = min(
            zip(all_us, right, strict=True), key=itemgetter(0), default=(apart_us, None)
        )
        if best is None or us >= apart_us:
            return []
        alone_us = {node: self.choices[node].us for node in best.steps}
        parts = spent(best.kernel, x, us, best.steps, alone_us)
        return [Run(best.nodes, best.source, best.kernel, us, apart_us, parts)]


def _apart(module: nn.Module, stretch: _Stretch, choices: Mapping[Node, Choice]) -> Kernel:
    """The nodes of a stretch in turn, layers by their chosen kernels, or dense where none is."""
    part, env = Graph(), dict[Node, Node]()
    env[stretch.source] = part.placeholder("x")
    for node in stretch.nodes:
        held = [p for p in node.all_input_nodes if p.op == "get_attr" and p not in env]
        env |= {constant: part.node_copy(constant) for constant in held}
        env[node] = part.node_copy(node, env.__getitem__)
    part.output(env[stretch.nodes[-1]])
    of = {env[node]: node for node in stretch.nodes}
    placements = [
        Placement((copied,), copied.all_input_nodes[0], choices[node].kernel)
        for copied, node in of.items()
        if node in choices
    ]
    return Kernel("apart", (Step(straight(lower(module, part, placements)), ()),))
