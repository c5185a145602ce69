import json
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from nas.choices import Choice, Picks, Subset, When
from nas.graph import INPUT, Graph
from nas.operations import Identity, SparseConv2d, SparseLinear, Sum
from nas.space import Activations, Architecture, GraphSpace
from nas.sparsity import Dense, Unstructured
from search_spaces.mlp import mlp

SMALL: dict[str, Any] = {"depths": (1, 2), "widths": (4, 8), "sparsities": ("dense", "0.5")}
PICKS: Picks = {"depth": 1, "layer0/width": 8, "layer0/sparsity": "0.5"}


def test_the_size_counts_equal_networks_once() -> None:
    assert mlp((6,), 2, **SMALL).size() == 4 + 4 * 4


def test_equal_networks_are_equal_architectures_and_unequal_ones_are_not() -> None:
    space = mlp((6,), 2, **SMALL)
    backwards = dict(reversed([*PICKS.items(), ("layer1/width", 4)]))
    same, other = space.architecture(backwards), space.architecture({**PICKS, "layer0/width": 4})
    assert same == space.architecture(PICKS) and hash(same) == hash(space.architecture(PICKS))
    assert same.id == space.architecture(PICKS).id != other.id
    assert same.picks == PICKS


def test_every_sample_has_an_id_of_its_own() -> None:
    space, rng = mlp((6,), 2, **SMALL), np.random.default_rng(0)
    ids = {space.architecture(space.sample(rng)).id for _ in range(400)}
    assert len(ids) == space.size()


def test_an_architecture_is_plain_json() -> None:
    found = mlp((6,), 2, **SMALL).architecture(PICKS)
    back = json.loads(json.dumps({"text": found.text, "space": found.space}))
    assert Architecture(**back) == found


@pytest.mark.parametrize(
    "other",
    [
        mlp((7,), 2, **SMALL),
        mlp((6,), 3, **SMALL),
        mlp((6,), 2, **{**SMALL, "depths": (1, 3)}),
        mlp((6,), 2, **{**SMALL, "widths": (4, 16)}),
        mlp((6,), 2, **{**SMALL, "sparsities": ("dense", "0.6")}),
        mlp((6,), 2, **{**SMALL, "sparsities": ("0.5", "dense")}),
    ],
)
def test_spaces_that_differ_have_different_fingerprints(other: GraphSpace) -> None:
    assert other.fingerprint != mlp((6,), 2, **SMALL).fingerprint


def test_a_space_made_again_has_the_same_fingerprint() -> None:
    space = mlp((6,), 2, **SMALL)
    assert space.origin is not None
    assert space.origin.function == "search_spaces.mlp:mlp"
    arguments = json.loads(json.dumps(space.origin.arguments))
    assert mlp(**arguments).fingerprint == space.fingerprint


def test_smallest_and_largest_bound_the_weights_of_every_architecture() -> None:
    space, rng = mlp((6,), 2, **SMALL), np.random.default_rng(0)

    def kept(picks: Picks) -> int:
        network = space.build(picks)
        return sum(int((p != 0).sum()) for p in masked(network))

    least, most = kept(space.smallest()), kept(space.largest())
    for _ in range(30):
        assert least <= kept(space.sample(rng)) <= most
    assert space.largest()["layer1/sparsity"] == "dense"


def masked(network: torch.nn.Module) -> list[torch.Tensor]:
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
    return [layer.weight for layer in layers]


def test_the_largest_operation_is_the_one_with_the_most_weights_where_it_stands() -> None:
    op = Choice("op", {"c3": SparseConv2d(4, 3), "skip": Identity(), "c5": SparseConv2d(4, 5)})
    graph = Graph((4, 6, 6))
    graph.add("a", op, INPUT)
    space = GraphSpace(graph)
    assert (space.smallest(), space.largest()) == ({"op": "skip"}, {"op": "c5"})


def test_a_choice_that_conditions_ask_for_may_also_be_held_by_a_node() -> None:
    keep = Subset("inputs", ("0", "1"), 1)
    graph = Graph((4,))
    edges = [
        graph.add(f"edge{i}", SparseLinear(4, sparsity=ratio(i)), INPUT, when=at(i))
        for i in range(2)
    ]
    graph.add("sum", Sum(), *edges, keep=keep)
    assert [c.name for c in GraphSpace(graph, [keep]).choices] == ["inputs", "ratio0", "ratio1"]
    assert GraphSpace(graph, [keep]).size() == GraphSpace(graph).size() == 2 + 2


def ratio(i: int) -> Choice:
    return Choice(f"ratio{i}", (Dense(), Unstructured(0.5)))


def at(i: int) -> When:
    return When("inputs", (str(i),))


def test_picks_of_another_space_are_refused_by_name() -> None:
    space = mlp((6,), 2, **SMALL)
    with pytest.raises(ValueError, match="layer5/width: no such choice in this space"):
        space.architecture({**PICKS, "layer5/width": 4})
    with pytest.raises(ValueError, match=r"layer0/width: 5 is none of \[4, 8\]"):
        space.build({**PICKS, "layer0/width": 5})
    with pytest.raises(ValueError, match="layer0/sparsity: active, but not picked"):
        space.architecture({"depth": 1, "layer0/width": 4})


@pytest.mark.parametrize(("depths", "got"), [((), r"\[\]"), ((0, 2), r"\[0, 2\]")])
def test_an_mlp_has_a_hidden_layer(depths: tuple[int, ...], got: str) -> None:
    with pytest.raises(ValueError, match=f"mlp: depths must be at least 1, got {got}"):
        mlp((6,), 2, depths=depths)


@pytest.mark.parametrize(
    ("shape", "widths"), [((6,), (8,)), ((8,), (6, 8)), ((8,), (10, 16)), ((1, 3, 2), (8,))]
)
def test_a_sparsity_that_some_layer_does_not_admit_is_refused_at_once(
    shape: tuple[int, ...], widths: tuple[int, ...]
) -> None:
    with pytest.raises(
        ValueError, match=r"layer\d.linear.weight: NM\(2, 4\) needs in_features divis"
    ):
        mlp(shape, 2, depths=(1, 2), widths=widths, sparsities=("dense", "2:4"))


def test_each_activation_is_alive_from_where_it_is_made_to_where_it_is_last_read() -> None:
    assert Activations((4, 10, 3), (1, 2, 3)).peak() == 14
    assert Activations((4, 10, 3, 3), (3, 2, 3, 4)).peak() == 4 + 10 + 3


def test_a_drawing_tells_operations_shapes_and_sparsities() -> None:
    drawn = mlp((6,), 2, **SMALL).draw(PICKS)
    layer = drawn.nodes["layer0/linear"]
    assert (layer["shape"], layer["sparsity"]) == ((8,), "0.5")
    assert drawn.nodes["classifier"]["label"] == "SparseLinear"
    assert list(drawn.predecessors("classifier")) == ["layer0/relu"]
    assert mlp((6,), 2, **SMALL).draw({}).nodes["layer0/linear"]["sparsity"] == "open"


def test_neighbours_of_an_architecture_are_architectures() -> None:
    space = mlp((6,), 2, **SMALL)
    rng = np.random.default_rng(1)
    near = list(islice(space.neighbours(PICKS, rng), 20))
    assert len({space.architecture(p).id for p in near}) == len(near) == 3
