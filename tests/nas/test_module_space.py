from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nas.allocation import ALLOCATIONS
from nas.costs import Flops, NonZeros, Parameters, PeakMemory
from nas.masks import original, sparse_weights
from nas.module_space import LEVELS, ModuleSpace, sparsify
from nas.sparsity import DENSE, kept


class Language(nn.Module):
    """Tied embeddings, and one linear layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.relu(self.body(torch.relu(self.body(self.embed(tokens)))))
        return self.head(self.norm(hidden))


class Branching(nn.Module):
    """Control flow that depends on data, which no export follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden if hidden.mean() > 0 else -hidden)


def image_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 5),
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, tuple[Any, Tensor]] = {
    "images": (image_model, torch.zeros(2, 3, 8, 8)),
    "encoder": (encoder, torch.zeros(2, 5, 8)),
    "language": (Language, torch.zeros(2, 6, dtype=torch.int64)),
    "branching": (Branching, torch.zeros(2, 8)),
}


def space_of(name: str, *args: Any, **kwargs: Any) -> ModuleSpace:
    make, example = MODELS[name]
    return sparsify(make(), example, *args, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_has_one_choice_and_each_other_parameter_a_reason(name: str) -> None:
    space = space_of(name)
    parameters = {path for path, _ in MODELS[name][0]().named_parameters()}
    assert space.size() == len(LEVELS) ** len(space.tensors)
    assert len(space.choices) == len(space.tensors)
    assert space.tensors.keys() | space.left_out.keys() == parameters
    assert not space.tensors.keys() & space.left_out.keys()
    assert all(space.left_out.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_costs_count_what_the_built_module_has(name: str, seed: int) -> None:
    space = space_of(name)
    picks = space.sample(np.random.default_rng(seed))
    module = space.build(picks)
    sparse = sparse_weights(module)
    masked = {path: int(s.masks.sum()) for path, s in sparse.items()}
    plain = MODELS[name][0]()
    sizes = {path: p.numel() for path, p in plain.named_parameters()}
    assert NonZeros().value(space, picks) == sum((sizes | masked).values())
    assert Parameters().value(space, picks) == sum(sizes.values())


def test_what_is_left_out_says_why() -> None:
    left_out = space_of("language").left_out
    assert left_out["norm.weight"] == "not a weight matrix: 1 dimension"
    assert left_out["body.bias"] == "not a weight matrix: 1 dimension"
    alone = sparsify(nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 2)), torch.tensor([[1, 2]]))
    assert alone.left_out["0.weight"] == "an embedding: looking up rows multiplies nothing"
    wide = sparsify(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm((4, 8))), torch.zeros(1, 4, 8))
    assert wide.left_out["1.weight"] == "a normalisation"
    assert space_of("images", skip=["5.weight"]).left_out["5.weight"] == "skipped"


def test_tied_weights_have_one_choice_and_one_mask() -> None:
    space = space_of("language")
    assert list(space.tensors) == ["embed.weight", "body.weight"]
    module: Any = space.build({"embed/weight/sparsity": "0.5", "body/weight/sparsity": "dense"})
    assert torch.equal(module.embed.weight, module.head.weight)
    assert int((module.head.weight != 0).sum()) == 48


def test_a_module_called_twice_has_one_choice_and_counts_its_work_twice() -> None:
    layers = {layer.path: layer for layer in space_of("language").layers({})}
    assert layers["body.weight"].positions == 2 * 6
    assert layers["embed.weight"].positions == 6


def test_attention_input_weights_are_masked_and_the_output_follows() -> None:
    space = space_of("encoder")
    path = "layers.0.self_attn.in_proj_weight"
    assert path in space.tensors
    dense = space.largest()
    module: Any = space.build({**dense, path.replace(".", "/") + "/sparsity": "0.95"})
    weight = module.get_submodule("layers.0.self_attn").in_proj_weight
    assert int((weight != 0).sum()) == round(0.05 * 24 * 8)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        masked, plain = module.eval()(x), space.build(dense).eval()(x)
    assert not torch.allclose(masked, plain, atol=1e-4)


def test_options_that_a_shape_does_not_admit_are_dropped_for_that_tensor() -> None:
    space = space_of("images", ["dense", "0.5", "2:4"])
    labels = {path: [o.label for o in options] for path, options in space.tensors.items()}
    assert labels["0.weight"] == ["dense", "0.5"]  # 3 input channels
    assert labels["3.weight"] == ["dense", "0.5", "2:4"]  # 8 in 2 groups


def test_a_tensor_with_one_option_left_is_left_out_with_the_rule() -> None:
    space = space_of("images", ["dense", "2:4"])
    assert "0.weight" not in space.tensors
    assert "in_channels / groups divisible by 4, got 3" in space.left_out["0.weight"]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'6.weight', which is not a parameter"):
        space_of("images", skip=["6.weight"])
    with pytest.raises(ValueError, match="per is tensor or model, got 'layer'"):
        space_of("images", per="layer")
    with pytest.raises(ValueError, match="a global ratio is unstructured"):
        space_of("images", ["dense", "2:4"], per="model")
    with pytest.raises(ValueError, match="nothing can be made sparse"):
        sparsify(nn.LayerNorm(4), torch.zeros(1, 4))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_global_ratio_is_spread_and_keeps_the_budget(allocation: str) -> None:
    space = space_of("images", ["dense", "0.5", "0.8"], per="model")
    assert space.size() == 3 * len(ALLOCATIONS)
    module = space.build({"ratio": 0.8, "allocation": allocation})
    total = sum(p.numel() for n, p in image_model().named_parameters() if n in space.tensors)
    masked = sum(int(s.masks.sum()) for s in sparse_weights(module).values())
    unmasked = sum(
        p.numel()
        for n, p in module.named_parameters()
        if n in space.tensors and n not in sparse_weights(module)
    )
    assert abs(masked + unmasked - 0.2 * total) <= len(space.tensors)


def test_a_global_ratio_cannot_be_left_open() -> None:
    space = space_of("images", ["dense", "0.5"], per="model")
    with pytest.raises(ValueError, match="ratio and allocation cannot be left open"):
        space.build({"ratio": 0.5})


@pytest.mark.parametrize("name", MODELS)
def test_flops_of_the_dense_parent_are_half_of_what_torch_counts(name: str) -> None:
    space, (make, example) = space_of(name), MODELS[name]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        make()(example)  # in training mode, where attention is not fused
    attention = {"encoder": 2 * 2 * 5 * 5 * 8}.get(name, 0)  # multiplies no weights
    counted = counter.get_total_flops() / 2 / len(example) - attention
    assert Flops().value(space, space.largest()) == counted


def test_flops_leave_out_what_is_zero() -> None:
    space = sparsify(nn.Linear(8, 4), torch.zeros(2, 8))
    assert Flops().value(space, {"weight/sparsity": "0.5"}) == 16


def test_trials_start_from_the_weights_that_the_model_has_and_leave_them() -> None:
    model = image_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    space = sparsify(model, torch.zeros(2, 3, 8, 8))
    picks = {**space.largest(), "5/weight/sparsity": "0.8"}
    module = space.build(picks)
    for path in space.tensors:
        assert torch.equal(original(module, path), before[path])
    with torch.no_grad():
        original(module, "5.weight").zero_()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_kept_weights_are_the_largest() -> None:
    model = nn.Linear(8, 4)
    module: Any = sparsify(model, torch.zeros(1, 8)).build({"weight/sparsity": "0.5"})
    held = module.weight != 0
    sizes = model.weight.detach().abs()
    assert sizes[held].min() >= sizes[~held].max()


def test_picks_left_open_build_a_supernet_that_knows_its_cost() -> None:
    space = space_of("images")
    module: Any = space.build({"0/weight/sparsity": "dense"})
    assert module.mixture.names() == ["3/weight/sparsity", "5/weight/sparsity"]
    for name in module.mixture.names():
        module.mixture[name] = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0], requires_grad=True)
    closed = {"0/weight/sparsity": "dense"} | dict.fromkeys(module.mixture.names(), "0.9")
    for cost in (NonZeros(), Flops()):
        found = module.expected_cost(module.mixture, cost.name)
        assert found.requires_grad
        assert float(found.detach()) == pytest.approx(cost.value(space, closed), rel=0.01)


def test_a_closed_module_has_nothing_of_a_supernet() -> None:
    module = space_of("images").build(space_of("images").smallest())
    assert not hasattr(module, "mixture") and not hasattr(module, "expected_cost")


def test_without_masks_the_module_is_as_it_was() -> None:
    space = space_of("images")
    twin = space.build(space.smallest(), masked=False)
    assert not sparse_weights(twin)
    assert twin.state_dict().keys() == image_model().state_dict().keys()


def test_peak_memory_of_a_chain_is_its_widest_step() -> None:
    chain = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    space = sparsify(chain, torch.zeros(2, 8))
    assert PeakMemory().value(space, space.largest()) == 4 * (32 + 32)


def test_peak_memory_is_known_where_export_fails() -> None:
    space = space_of("branching")
    assert PeakMemory().value(space, space.largest()) == 4 * (8 + 32)


def test_the_smallest_and_the_largest_are_the_ends_of_the_levels() -> None:
    space = space_of("images")
    assert set(space.smallest().values()) == {"0.95"}
    assert set(space.largest().values()) == {DENSE.label}
    kept_least = sum(kept(o[-1], space._trace.shapes[p]) for p, o in space.tensors.items())
    left = sum(p.numel() for n, p in image_model().named_parameters() if n in space.left_out)
    assert NonZeros().value(space, space.smallest()) == kept_least + left


def test_the_drawing_follows_the_order_of_use() -> None:
    space = space_of("language")
    drawn = space.draw({"body/weight/sparsity": "0.9"})
    assert list(drawn.edges) == [("body.weight", "embed.weight")]
    assert drawn.nodes["body.weight"]["sparsity"] == "0.9"
    assert drawn.nodes["embed.weight"]["sparsity"] == "open"
