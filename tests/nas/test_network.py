from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nas.choices import Choice, Label, Pick, Picks, Subset, When
from nas.graph import INPUT, Graph
from nas.latency import using_threads
from nas.masks import original, sparse_weights, training_state, weights
from nas.network import Network, inherit
from nas.operations import (
    Activation,
    BatchNorm,
    Concat,
    Flatten,
    GlobalAveragePool,
    Identity,
    Pool,
    Sequence,
    SparseConv2d,
    SparseLinear,
    Sum,
    Zero,
)
from nas.space import GraphSpace
from nas.sparsity import NM, Dense, Unstructured, kept
from search_spaces.mlp import mlp


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only lose by more."""
    with using_threads(1):
        yield


RATIOS = (Dense(), Unstructured(0.5), NM(1, 4))


def ratio(name: str) -> Choice:
    return Choice(name, RATIOS)


def conv_space() -> GraphSpace:
    """Widths, sparsities, operations, an optional node, a residual and batch norm."""
    width = Choice("width", (4, 8), ordered=True)
    op = Choice(
        "op",
        {
            "none": Zero(),
            "conv3": Sequence(
                (
                    ("conv", SparseConv2d(8, 3, sparsity=ratio("op/sparsity"))),
                    ("norm", BatchNorm()),
                )
            ),
            "conv1": SparseConv2d(8, 1, bias=True, sparsity=ratio("op/sparsity")),
            "pool": Pool("max"),
            "skip": Identity(),
        },
        open_only=("none",),
    )
    graph = Graph((4, 6, 6))
    stem = graph.add("stem/conv", SparseConv2d(8, 3, sparsity=ratio("stem/sparsity")), INPUT)
    norm = graph.add("stem/norm", BatchNorm(), stem)
    relu = graph.add("stem/relu", Activation(), norm)
    mixed = graph.add("cell/0-1", op, relu)
    extra = graph.add("extra", SparseConv2d(8, 3), mixed, when=When("deep", (True,)))
    total = graph.add("sum", Sum(), extra, relu)
    wide = graph.add("wide/conv", SparseConv2d(width, 3, bias=True), total)
    wide = graph.add("wide/norm", BatchNorm(), wide)
    wide = graph.add("wide/act", Activation("silu"), wide)
    last = graph.add("last", SparseConv2d(8, 3, sparsity=ratio("last/sparsity")), wide)
    pooled = graph.add("pool", GlobalAveragePool(), last)
    graph.add("classifier", SparseLinear(3), pooled)
    return GraphSpace(graph, [Choice("deep", (False, True))])


SPACES = {
    "mlp": mlp((8,), 3, depths=(1, 2, 3), widths=(8, 16), sparsities=("dense", "0.5", "1:4")),
    "conv": conv_space(),
}


def some_picks(space: GraphSpace, n: int = 12) -> list[Picks]:
    return [space.sample(np.random.default_rng(i)) for i in range(n)]


def dense_where_narrow(picks: Picks) -> Picks:
    """A slice of a masked tensor has a mask of its own: where widths are cut, compare dense."""
    cut = any(pick in (4, 8) for name, pick in picks.items() if name.endswith("width"))
    cut = cut and picks.get("width") != 8
    return {n: "dense" if cut and n.endswith("sparsity") else pick for n, pick in picks.items()}


def trained_supernet(space: GraphSpace, picks: Mapping[str, Pick] | None = None) -> nn.Module:
    """A supernet with weights and statistics that are not those it was born with."""
    torch.manual_seed(0)
    net = space.build(picks or {})
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    net.train()
    for path, sparse in sparse_weights(net).items():
        sparse.set_scores(original(net, path).detach().abs())
    for _ in range(3):
        net(torch.randn(16, *space.input_shape))
    return net.eval()


def set_one_hot(net: nn.Module, space: GraphSpace, picks: Picks) -> None:
    mixture = net.mixture
    assert not isinstance(mixture, Tensor | nn.Module)
    for name in mixture.names():
        choice = space.choices[name]
        position = choice.open_labels.index(picks[name]) if name in picks else 0
        mixture[name] = nn.functional.one_hot(
            torch.tensor(position), len(choice.open_labels)
        ).float()


@pytest.mark.parametrize("name", SPACES)
def test_weights_have_the_same_names_in_the_supernet_and_in_every_architecture(name: str) -> None:
    space = SPACES[name]
    whole = set(weights(space.build({})))
    for picks in some_picks(space):
        assert set(weights(space.build(picks))) <= whole
        assert set(space.build(picks, masked=False).state_dict()) == set(
            weights(space.build(picks))
        )


@pytest.mark.parametrize("name", SPACES)
def test_the_layers_that_costs_count_are_the_weights_that_are_built(name: str) -> None:
    space = SPACES[name]
    for picks in some_picks(space):
        built = dict(space.build(picks, masked=False).named_parameters())
        counted = {layer.path: layer.shape for layer in space.layers(picks)}
        assert counted == {key: tuple(p.shape) for key, p in built.items()}


@pytest.mark.parametrize("name", SPACES)
def test_a_supernet_at_one_corner_computes_what_the_closed_network_does(name: str) -> None:
    space = SPACES[name]
    supernet = trained_supernet(space)
    state, x = training_state(supernet), torch.randn(5, *space.input_shape)
    for picks in map(dense_where_narrow, some_picks(space, 25)):
        closed = space.build(picks)
        inherit(closed, state)
        set_one_hot(supernet, space, picks)
        with torch.no_grad():
            torch.testing.assert_close(supernet(x), closed.eval()(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SPACES)
def test_a_supernet_with_some_choices_closed_agrees_too(name: str) -> None:
    space = SPACES[name]
    for i, picks in enumerate(map(dense_where_narrow, some_picks(space, 8))):
        first = dict([*picks.items()][: i % len(picks)])
        supernet, x = trained_supernet(space, first), torch.randn(3, *space.input_shape)
        closed = space.build(picks)
        inherit(closed, training_state(supernet))
        set_one_hot(supernet, space, picks)
        with torch.no_grad():
            torch.testing.assert_close(supernet(x), closed.eval()(x), atol=1e-5, rtol=1e-4)


def test_sparsity_is_mixed_on_the_weight_by_one_product() -> None:
    graph = Graph((8,))
    graph.add("a", SparseLinear(4, bias=False, sparsity=ratio("s")), INPUT)
    net = GraphSpace(graph).build({})
    assert len(list(net.parameters())) == 1
    p, (sparse,) = torch.tensor([0.2, 0.5, 0.3]), sparse_weights(net).values()
    set_mixture(net, "s", p)
    x = torch.randn(2, 8)
    dense = dict(net.named_parameters())["a.parametrizations.weight.original"]
    mixed = dense * torch.tensordot(p, sparse.masks, dims=1)
    torch.testing.assert_close(net(x), x @ mixed.T)


def set_mixture(net: nn.Module, name: str, value: Tensor) -> None:
    mixture = net.mixture
    assert not isinstance(mixture, Tensor | nn.Module)
    mixture[name] = value


@pytest.mark.parametrize("name", SPACES)
def test_gradients_reach_every_weight_of_the_mixture_and_of_the_network(name: str) -> None:
    space = SPACES[name]
    net = trained_supernet(space).train()
    leaves: dict[str, Tensor] = {}
    for choice in space.choices:
        if isinstance(choice, Choice):
            size = len(choice.open_labels)
            leaves[choice.name] = torch.full((size,), 1 / size, requires_grad=True)
            set_mixture(net, choice.name, leaves[choice.name])
    torch.autograd.backward(net(torch.randn(6, *space.input_shape)).square().sum())
    for choice_name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0, choice_name
    assert all(p.grad is not None for p in net.parameters())


def test_the_gradient_of_a_mixture_is_that_of_finite_differences() -> None:
    space = SPACES["mlp"]
    net, x = trained_supernet(space).double(), torch.randn(4, 8, dtype=torch.double)
    choice = "layer0/sparsity"

    def at(p: Tensor) -> Tensor:
        set_mixture(net, choice, p)
        return net(x).square().sum()

    start = torch.tensor([0.5, 0.2, 0.3], dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(at, start)


@pytest.mark.parametrize("name", SPACES)
def test_masks_keep_what_the_sparsity_says_and_the_dense_twin_has_none(name: str) -> None:
    space = SPACES[name]
    for picks in some_picks(space, 6):
        net = space.build(picks)
        for path, sparse in sparse_weights(net).items():
            count = kept(sparse.sparsities[0], sparse.masks.shape[1:])
            assert int((weights(net)[path] != 0).sum()) == count
        twin = space.build(picks, masked=False)
        assert not sparse_weights(twin)
        assert all((value != 0).all() for key, value in twin.named_parameters() if value.ndim > 1)


def test_a_network_without_open_choices_is_plain_modules() -> None:
    net = SPACES["mlp"].build({"depth": 1, "layer0/width": 8, "layer0/sparsity": "dense"})
    assert set(net.state_dict()) == {
        "layer0.linear.weight",
        "layer0.linear.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_inheriting_slices_leading_channels() -> None:
    space = SPACES["mlp"]
    big = trained_supernet(space)
    small = space.build({"depth": 1, "layer0/width": 8, "layer0/sparsity": "dense"})
    state = training_state(big)
    inherit(small, state)
    assert torch.equal(weights(small)["layer0.linear.weight"], state["layer0.linear.weight"][:8])
    assert torch.equal(weights(small)["classifier.weight"], state["classifier.weight"][:, :8])


def test_inheriting_crops_kernels_at_their_centre() -> None:
    conv = nn.Conv2d(2, 2, 3, bias=False)
    big = torch.arange(2 * 2 * 25.0).reshape(2, 2, 5, 5)
    inherit(conv, {"weight": big})
    assert torch.equal(conv.weight, big[:, :, 1:4, 1:4])


def test_inheriting_masks_by_the_magnitudes_that_come() -> None:
    space = SPACES["mlp"]
    picks: Picks = {"depth": 1, "layer0/width": 16, "layer0/sparsity": "0.5"}
    net, state = space.build(picks), training_state(trained_supernet(space))
    inherit(net, state)
    dense = state["layer0.linear.weight"]
    held = weights(net)["layer0.linear.weight"]
    smallest_kept = held[held != 0].abs().min()
    assert (held != 0).sum() == 64 and smallest_kept >= dense[held == 0].abs().max()


def test_what_cannot_be_inherited_is_refused_by_name_and_nothing_is_changed() -> None:
    layer = nn.Linear(4, 4)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="bias: not among the weights to inherit"):
        inherit(layer, {"weight": torch.zeros(4, 4)})
    with pytest.raises(ValueError, match=r"weight: cannot cut shape \(4, 4\) out of \(3, 4\)"):
        inherit(layer, {"weight": torch.zeros(3, 4), "bias": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"weight: cannot cut shape \(4, 4\) out of \(4,\)"):
        inherit(layer, {"weight": torch.zeros(4), "bias": torch.zeros(4)})
    assert torch.equal(layer.weight, before)


def test_statistics_of_batch_norm_are_inherited() -> None:
    space = SPACES["conv"]
    big = trained_supernet(space)
    net = space.build(some_picks(space)[0])
    inherit(net, training_state(big))
    state = net.state_dict()
    assert torch.equal(state["stem.norm.running_mean"], big.state_dict()["stem.norm.running_mean"])
    assert int(state["stem.norm.num_batches_tracked"]) == 3


def test_an_open_subset_is_summed_and_weighed_once_its_items_have_weights() -> None:
    keep = Subset("inputs", ("0", "1"), 1)
    graph = Graph((4,))
    edges = [
        graph.add(f"edge{i}", SparseLinear(4), INPUT, when=When("inputs", (str(i),)))
        for i in range(2)
    ]
    graph.add("sum", Sum(), *edges, keep=keep)
    net, x = GraphSpace(graph).build({}), torch.randn(3, 4)
    assert isinstance(net, Network)
    a, b = (net.get_submodule(f"edge{i}")(x) for i in range(2))
    torch.testing.assert_close(net(x), a + b)
    net.mixture.add("inputs", 2)
    set_mixture(net, "inputs", torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(net(x), 0.25 * a + 0.75 * b)


def test_nothing_passes_through_zero_and_it_takes_weight() -> None:
    op = Choice("op", {"none": Zero(), "skip": Identity()}, open_only=("none",))
    graph = Graph((2, 4, 4))
    graph.add("a", op, INPUT)
    net, x = GraphSpace(graph).build({}), torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(net(x), 0.5 * x)


def test_an_open_node_that_changes_the_shape_is_refused_by_name() -> None:
    graph = Graph((4,))
    a = graph.add("a", SparseLinear(8), INPUT, when=When("deep", (True,)))
    graph.add("b", SparseLinear(2), a)
    space = GraphSpace(graph, [Choice("deep", (False, True))])
    assert space.build({"deep": False})(torch.randn(2, 4)).shape == (2, 2)
    with pytest.raises(ValueError, match=r"a: .* one shape, got \(4,\) and \(8,\)"):
        space.build({})


def test_an_open_choice_that_no_mixture_would_reach_is_refused_by_name() -> None:
    width = Choice("width", (4, 8))
    inside = Sequence((("linear", SparseLinear(width)), ("act", Activation("relu"))))
    for operation in (inside, Choice("op", {"a": SparseLinear(width), "b": SparseLinear(8)})):
        graph = Graph((4,))
        graph.add("a", operation, INPUT)
        space = GraphSpace(graph)
        with pytest.raises(ValueError, match=r"a: a supernet mixes .*, not width: pick it"):
            space.build({})
        assert space.build({"width": 8})(torch.randn(2, 4)).shape == (2, 8)


def test_a_deep_copy_of_a_supernet_shares_nothing() -> None:
    import copy

    space = SPACES["mlp"]
    net, x = trained_supernet(space), torch.randn(2, 8)
    twin = copy.deepcopy(net)
    before = twin(x).detach()
    set_one_hot(net, space, some_picks(space)[0])
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    torch.testing.assert_close(twin(x), before)


def test_flattened_and_joined_channels_keep_their_places() -> None:
    graph = Graph((2, 3, 3))
    joined = graph.add("joined", Concat(), INPUT, INPUT)
    flat = graph.add("flat", Flatten(), joined)
    graph.add("out", SparseLinear(2), flat)
    net, x = GraphSpace(graph).build({}), torch.randn(1, 2, 3, 3)
    out = net.get_submodule("out")
    torch.testing.assert_close(net(x), out(torch.cat([x, x], 1).flatten(1)))


def test_labels_are_parts_of_the_names_of_weights() -> None:
    keys = set(weights(SPACES["conv"].build({})))
    label: Label = "conv3"
    assert f"cell.0-1.{label}.conv.weight" in keys and "cell.0-1.conv1.weight" in keys
