import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nas.choices import Choice, Picks, When
from nas.costs import (
    COSTS,
    Analytic,
    Flops,
    Latency,
    Measured,
    NonZeros,
    Parameters,
    PeakMemory,
)
from nas.graph import INPUT, Graph
from nas.masks import weights
from nas.operations import (
    Activation,
    BatchNorm,
    Concat,
    FactorizedReduce,
    Flatten,
    GlobalAveragePool,
    Sequence,
    SparseConv2d,
    SparseLinear,
    Sum,
)
from nas.space import GraphSpace
from nas.sparsity import NM, Block, Channel, Dense, Unstructured
from search_spaces.cell import cell
from search_spaces.mlp import mlp

ROOT = Path(__file__).parents[2]
PICKS: Picks = {
    "depth": 2,
    "layer0/width": 16,
    "layer0/sparsity": "0.75",
    "layer1/width": 8,
    "layer1/sparsity": "2:4",
}


def small_mlp() -> GraphSpace:
    return mlp(
        (2, 2, 3), 3, depths=(1, 2), widths=(8, 16), sparsities=("dense", "0.75", "2:4", "0.9")
    )


def patterns() -> GraphSpace:
    """Every pattern on a convolution, with batch norm, bias, stride, depthwise and a residual."""
    ratios = (Dense(), Unstructured(0.9), NM(2, 4), Block(4, 1, 0.5), Channel(0.25))
    graph = Graph((4, 9, 7))
    stem = graph.add("stem", SparseConv2d(8, 3, 2, bias=True, sparsity=Choice("a", ratios)), INPUT)
    depth = graph.add("depth", SparseConv2d(8, 3, depthwise=True), stem)
    norm = graph.add("norm", BatchNorm(), depth)
    mixed = Sequence(
        (("relu", Activation()), ("conv", SparseConv2d(8, 1, sparsity=Choice("b", ratios))))
    )
    point = graph.add("point", mixed, norm, when=When("deep", (True,)))
    total = graph.add("sum", Sum(), point, stem)
    halved = graph.add("halved", FactorizedReduce(12), total)
    pooled = graph.add("pool", GlobalAveragePool(), halved)
    graph.add("classifier", SparseLinear(5, sparsity=Choice("c", ratios[:3])), pooled)
    return GraphSpace(graph, [Choice("deep", (False, True))])


SPACES = {
    "mlp": small_mlp(),
    "patterns": patterns(),
    "cell": cell((3, 16, 16), 10, cells=3, channels=4, nodes=2, sparsities=("dense", "0.8")),
}


def some_picks(space: GraphSpace, n: int = 8) -> list[Picks]:
    return [space.sample(np.random.default_rng(i)) for i in range(n)]


def test_costs_of_a_hand_computed_mlp() -> None:
    space = small_mlp()
    first, second, third = 12 * 16, 16 * 8, 8 * 3
    assert Parameters().value(space, PICKS) == first + 16 + second + 8 + third + 3
    assert NonZeros().value(space, PICKS) == first // 4 + 16 + second // 2 + 8 + third + 3
    assert Flops().value(space, PICKS) == first // 4 + second // 2 + third


def test_flops_of_a_hand_computed_convolution() -> None:
    graph = Graph((4, 10, 8))
    graph.add("conv", SparseConv2d(6, 3, 2, bias=True, sparsity=Unstructured(0.5)), INPUT)
    space = GraphSpace(graph)
    assert Flops().value(space, {}) == (6 * 4 * 9 / 2) * (5 * 4)
    assert NonZeros().value(space, {}) == 6 * 4 * 9 / 2 + 6
    assert Parameters().value(space, {}) == 6 * 4 * 9 + 6


@pytest.mark.parametrize("name", SPACES)
def test_parameters_are_those_of_the_module(name: str) -> None:
    space = SPACES[name]
    for picks in some_picks(space):
        module = space.build(picks, masked=False)
        assert Parameters().value(space, picks) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", SPACES)
def test_nonzeros_are_what_is_left_in_the_masked_module(name: str) -> None:
    space = SPACES[name]
    for picks in some_picks(space):
        module = space.build(picks)
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(1)
        state = weights(module)
        parameters = dict(space.build(picks, masked=False).named_parameters())
        left = sum(int((state[key] != 0).sum()) for key in parameters)
        assert NonZeros().value(space, picks) == left


@pytest.mark.parametrize("name", SPACES)
def test_dense_flops_are_half_of_what_torch_counts(name: str) -> None:
    space = SPACES[name]
    for picks in some_picks(space, 4):
        dense: Picks = {
            n: ("dense" if "dense" in space.choices[n].labels else p) for n, p in picks.items()
        }
        counter = FlopCounterMode(display=False)
        module = space.build(dense).eval()
        with torch.no_grad(), counter:
            module(torch.randn(1, *space.input_shape))
        assert Flops().value(space, dense) == counter.get_total_flops() / 2


def test_a_chain_needs_most_memory_where_a_step_s_input_and_output_are_largest() -> None:
    graph = Graph((1, 2, 4))
    flat = graph.add("flat", Flatten(), INPUT)
    wide = graph.add("wide", SparseLinear(100), flat)
    relu = graph.add("relu", Activation(), wide)
    graph.add("out", SparseLinear(3), relu)
    assert PeakMemory().value(GraphSpace(graph), {}) == 4 * (100 + 100)


def test_a_residual_is_kept_until_it_is_added() -> None:
    graph = Graph((10,))
    first = graph.add("first", SparseLinear(20), INPUT)
    a = graph.add("a", SparseLinear(50), first)
    b = graph.add("b", SparseLinear(20), a)
    graph.add("sum", Sum(), b, first)
    assert PeakMemory().value(GraphSpace(graph), {}) == 4 * (20 + 50 + 20)


def test_both_branches_are_alive_where_they_are_joined() -> None:
    graph = Graph((10,))
    a = graph.add("a", SparseLinear(30), INPUT)
    b = graph.add("b", SparseLinear(40), INPUT)
    joined = graph.add("joined", Concat(), a, b)
    graph.add("out", SparseLinear(1), joined)
    assert PeakMemory().value(GraphSpace(graph), {}) == 4 * (30 + 40 + 70)


def test_the_input_counts_while_something_still_reads_it() -> None:
    graph = Graph((100,))
    a = graph.add("a", SparseLinear(10), INPUT)
    b = graph.add("b", SparseLinear(100), a)
    graph.add("sum", Sum(), b, INPUT)
    assert PeakMemory().value(GraphSpace(graph), {}) == 4 * (100 + 100 + 100)


def test_costs_say_what_they_are() -> None:
    assert COSTS.keys() == {
        "parameters",
        "nonzeros",
        "flops",
        "peak_memory_bytes",
        "latency_ms",
    }
    for cost in (Parameters(), NonZeros(), Flops(), PeakMemory()):
        assert isinstance(cost, Analytic) and not isinstance(cost, Measured)
    assert isinstance(Latency(), Measured) and not isinstance(Latency(), Analytic)
    assert (PeakMemory.unit, Latency.unit) == ("B", "ms")


def test_analytic_costs_need_no_torch() -> None:
    code = """
import sys
import nas
from search_spaces.mlp import mlp
space = mlp((4,), 2)
picks = space.smallest()
costs = [nas.Flops(), nas.NonZeros(), nas.Parameters(), nas.PeakMemory()]
assert all(cost.value(space, picks) > 0 for cost in costs)
assert space.size() and space.fingerprint and list(space.neighbours(picks))
assert nas.Problem(space, (nas.Objective("error"),), {}, 1, 1)
assert "torch" not in sys.modules, "torch was imported"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    """Its time in a packed network is the sum of its calls'."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.last(self.layer(self.layer(x).abs())))

    x = torch.randn(4, 64)
    found = Latency().measure(Twice(), Twice(), x)["layers"]
    assert found.keys() == {"layer", "last"}
    assert found["layer"] > 1.2 * found["last"]
