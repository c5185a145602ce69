from math import comb

import numpy as np
import pytest
import torch

from nas.choices import Choice, Picks, Subset
from search_spaces.cell import CONVOLUTIONS, KINDS, cell

SPACE = cell((3, 16, 16), 10, cells=3, channels=4)


def test_a_cell_has_fourteen_edges_of_eight_operations_and_keeps_two_inputs_a_node() -> None:
    for kind in KINDS:
        mine = [c for c in SPACE.choices if c.name.startswith(f"{kind}/")]
        edges = [c for c in mine if c.name.endswith("/op")]
        nodes = [c for c in mine if isinstance(c, Subset)]
        assert len(edges) == 14 and all(len(c.open_labels) == 8 for c in edges)
        assert all("none" not in c.labels for c in edges)
        assert [len(c.items) for c in nodes] == [2, 3, 4, 5] and all(c.k == 2 for c in nodes)


def test_the_size_is_what_counting_by_hand_gives() -> None:
    plain, searchable, levels = 3, len(CONVOLUTIONS), 4
    normal_edge = plain + searchable * levels
    per_node = [comb(n, 2) * normal_edge**2 for n in (2, 3, 4, 5)]
    normal = int(np.prod([levels**2, *per_node], dtype=object))
    first = 2 + (searchable + 1) * levels  # at stride 2 the skip is a convolution too
    reduction = levels**2
    for n in (2, 3, 4, 5):
        edges = [first if j < 2 else normal_edge for j in range(n)]
        pairs = (edges[i] * edges[j] for i in range(n) for j in range(i))
        reduction *= sum(pairs)
    assert SPACE.size() == levels * normal * reduction


def test_cells_of_a_kind_share_their_choices_and_every_convolution_has_a_sparsity() -> None:
    picks = SPACE.sample(np.random.default_rng(1))
    layers = [x for x in SPACE.layers(picks) if len(x.shape) == 4]
    assert layers and all(x.path.rpartition(".")[0] for x in layers)
    masked = SPACE.build({**picks, **_all(picks, "0.9")})
    zeros = [float((p == 0).float().mean()) for p in _convolutions(masked)]
    assert len(zeros) == len(layers) and min(zeros) > 0.6


def _all(picks: Picks, label: str) -> dict[str, str]:
    return {name: label for name in picks if name.endswith("sparsity")}


def _convolutions(network: torch.nn.Module) -> list[torch.Tensor]:
    return [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d)]


@pytest.mark.parametrize("cells", [1, 3, 5])
def test_any_number_of_cells_gives_a_network(cells: int) -> None:
    space = cell((1, 8, 8), 7, cells=cells, channels=4, nodes=2)
    picks = space.sample(np.random.default_rng(0))
    assert space.build(picks)(torch.randn(2, 1, 8, 8)).shape == (2, 7)
    assert sum(map(len, space.places.values())) == cells


def test_a_sparsity_that_depthwise_convolutions_do_not_admit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"NM\(n?=?2, m?=?4\).*divisible by 4"):
        cell((3, 16, 16), 10, cells=1, sparsities=("dense", "2:4"))


def test_drawn_cells_name_operation_sparsity_and_nodes_of_each_kept_edge() -> None:
    picks = SPACE.sample(np.random.default_rng(2))
    drawn = SPACE.cells(picks)["cell_normal"]
    edges = [d for _, _, d in drawn.edges(data=True) if d["label"]]
    assert len(edges) == 8
    names = set(SPACE.settled(picks).nodes)
    assert all(set(d["path"]) <= names for d in edges)
    ops = {c.name: c for c in SPACE.choices if isinstance(c, Choice)}
    assert {d["label"] for d in edges} <= set(ops["cell_normal/0-2/op"].labels)
