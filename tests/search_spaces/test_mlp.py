import numpy as np
import pytest
import torch

from search_spaces.mlp import mlp

SPACE = mlp((1, 8, 8), 10, depths=(1, 2), widths=(16, 32), sparsities=("dense", "0.5", "2:4"))


def test_the_size_counts_layers_that_are_there() -> None:
    layer = 2 * 3
    assert SPACE.size() == layer + layer**2


def test_every_sample_builds_with_its_widths_and_sparsities() -> None:
    for seed in range(8):
        picks = SPACE.sample(np.random.default_rng(seed))
        network = SPACE.build(picks)
        assert network(torch.randn(3, 1, 8, 8)).shape == (3, 10)
        hidden = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][:-1]
        assert [m.out_features for m in hidden] == [
            picks[f"layer{i}/width"] for i in range(int(str(picks["depth"])))
        ]
        kept = [float((m.weight != 0).float().mean()) for m in hidden]
        asked = {"dense": 1.0, "0.5": 0.5, "2:4": 0.5}
        assert kept == [asked[str(picks[f"layer{i}/sparsity"])] for i in range(len(hidden))]


@pytest.mark.parametrize("wrong", [{"depths": (0, 1)}, {"depths": ()}])
def test_no_hidden_layer_is_refused(wrong: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="depths must be at least 1"):
        mlp((4,), 2, **wrong)  # type: ignore[arg-type]
