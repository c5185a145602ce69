import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from nas.masks import (
    Mixture,
    SparseWeight,
    attach,
    bake,
    load_training_state,
    original,
    sparse_weights,
    training_state,
    weights,
)
from nas.sparsity import DENSE, NM, Block, Channel, Sparsity, Unstructured, kept

HALF = (Unstructured(0.5),)
LEVELS = (DENSE, Unstructured(0.5), Unstructured(0.9))


class Language(nn.Module):
    """Tied embeddings, and a linear layer whose own forward is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.fc = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = F.linear(self.embed(tokens), self.fc.weight, self.fc.bias)
        return self.head(self.norm(hidden))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs, inputs, inputs)[0]


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs))


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1))


sequence = torch.linspace(-1, 1, 80).view(2, 5, 8).sin()
tokens = torch.arange(10) % 7
pictures = torch.linspace(-1, 1, 2 * 4 * 36).view(2, 4, 6, 6).cos()

MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv": (images, pictures),
    "conv1d": (lambda: nn.Conv1d(8, 8, 3), sequence.mT),
    "linear": (lambda: nn.Linear(8, 4), sequence),
    "tied": (Language, tokens),
    "attention": (Attention, sequence),
    "transformer": (transformer, sequence),
    "lstm": (lambda: nn.LSTM(8, 8, batch_first=True), sequence),
    "twice": (Twice, sequence),
}
over_models = pytest.mark.parametrize(("make", "inputs"), MODELS.values(), ids=list(MODELS))
in_both_modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def matrices(module: nn.Module) -> list[str]:
    return [path for path, value in module.named_parameters() if value.ndim > 1]


def sparsified(make: Callable[[], nn.Module], options: tuple[Sparsity, ...] = HALF) -> nn.Module:
    module, mixture = make(), Mixture()
    for path in matrices(module):
        attach(module, path, options, choice=path, mixture=mixture)
    return module


def output(module: nn.Module, inputs: Tensor) -> Tensor:
    result: Any = module(inputs)
    return result[0] if isinstance(result, tuple) else result


@over_models
@in_both_modes
def test_masked_to_zero_the_model_computes_with_zero_weights(
    make: Callable[[], nn.Module], inputs: Tensor, training: bool
) -> None:
    module = sparsified(make).train(training)
    twin = copy.deepcopy(module)
    before = output(module, inputs)
    for sparse in sparse_weights(module).values():
        sparse.masks.zero_()
    zeroed = bake(twin)
    with torch.no_grad():
        for path in matrices(zeroed):
            zeroed.get_parameter(path).zero_()
    torch.testing.assert_close(output(module, inputs), output(zeroed, inputs))
    assert not torch.allclose(output(module, inputs), before)


@over_models
@in_both_modes
def test_a_baked_copy_computes_the_same_with_plain_parameters(
    make: Callable[[], nn.Module], inputs: Tensor, training: bool
) -> None:
    module = sparsified(make, LEVELS).train(training)
    output(module, inputs)
    plain = bake(copy.deepcopy(module))
    assert not any(parametrize.is_parametrized(part) for part in plain.modules())
    assert dict(plain.named_parameters()).keys() == dict(make().named_parameters()).keys()
    torch.testing.assert_close(output(plain, inputs), output(module, inputs), rtol=0, atol=0)


@over_models
def test_weights_are_those_of_the_baked_copy_and_share_no_memory(
    make: Callable[[], nn.Module], inputs: Tensor
) -> None:
    module = sparsified(make, LEVELS)
    state, plain = weights(module), bake(copy.deepcopy(module)).state_dict()
    assert state.keys() == plain.keys()
    for key, value in state.items():
        assert torch.equal(value, plain[key]) and value.is_contiguous()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    make().load_state_dict(state)


def test_a_recurrent_layer_can_be_baked_before_it_was_ever_called() -> None:
    module = bake(sparsified(lambda: nn.LSTM(8, 8, batch_first=True)))
    assert torch.isfinite(output(module, sequence)).all()


def test_a_baked_copy_can_be_exported() -> None:
    module = bake(sparsified(transformer)).eval()
    program = torch.export.export(module, (sequence,))
    torch.testing.assert_close(program.module()(sequence), module(sequence))


def test_the_parameter_stays_the_same_object_so_that_optimisers_hold() -> None:
    module = Language()
    parameter = module.fc.weight
    optimiser = torch.optim.SGD(module.parameters(), lr=1.0)
    attach(module, "fc.weight", HALF)
    assert original(module, "fc.weight") is parameter
    before = parameter.detach().clone()
    module(tokens).square().sum().backward()
    optimiser.step()
    kept_mask = sparse_weights(module)["fc.weight"].masks[0] == 1
    assert torch.equal(parameter[~kept_mask], before[~kept_mask])
    assert not torch.equal(parameter[kept_mask], before[kept_mask])
    assert bake(module).get_parameter("fc.weight") is parameter


def test_tied_tensors_are_masked_as_one() -> None:
    module = Language()
    sparse = attach(module, "head.weight", LEVELS, "level")
    assert original(module, "embed.weight") is original(module, "head.weight")
    assert sparse_weights(module) == {"embed.weight": sparse}
    sparse.masks.zero_()
    assert not module.embed.weight.any() and not module.head.weight.any()


def test_a_tie_survives_copying_and_baking() -> None:
    module = Language()
    attach(module, "embed.weight", LEVELS, "level")
    twin = copy.deepcopy(module)
    assert original(twin, "embed.weight") is original(twin, "head.weight")
    assert original(twin, "embed.weight") is not original(module, "embed.weight")
    mixed = twin.embed.weight.detach().clone()
    bake(twin)
    assert twin.embed.weight is twin.head.weight
    assert torch.equal(twin.embed.weight, mixed)


def test_changing_a_copy_leaves_its_source_whole() -> None:
    source = Attention()
    attach(source, "attention.in_proj_weight", HALF)
    before = source(sequence)
    attach(copy.deepcopy(source), "attention.in_proj_bias", HALF)
    bake(copy.deepcopy(source))
    assert torch.equal(source(sequence), before)


def test_a_copy_shares_its_mixture_within_but_not_with_its_source() -> None:
    module, mixture = images(), Mixture()
    for path in matrices(module):
        attach(module, path, LEVELS, "level", mixture)
    mixture["level"] = torch.tensor([0.0, 0.0, 1.0], requires_grad=True).softmax(0)
    twin = copy.deepcopy(module)
    first, second = sparse_weights(twin).values()
    assert first.mixture is second.mixture
    assert torch.equal(first.mixture["level"], mixture["level"])
    first.mixture["level"] = torch.tensor([1.0, 0.0, 0.0])
    dense = original(module, "0.weight")
    assert torch.equal(weights(twin)["0.weight"], dense)
    assert not torch.equal(weights(module)["0.weight"], dense)


@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_an_open_weight_is_mixed_on_the_weight_and_the_mixture_learns(p: list[float]) -> None:
    module = nn.Linear(8, 8)
    sparse = attach(module, "weight", LEVELS, "level")
    mixture = torch.tensor(p, requires_grad=True)
    sparse.mixture["level"] = mixture
    wanted = sum(w * m for w, m in zip(p, sparse.masks, strict=True)) * original(module, "weight")
    torch.testing.assert_close(module.weight, wanted)
    torch.autograd.backward(module.weight.sum())
    slopes = [(original(module, "weight") * m).sum().item() for m in sparse.masks]
    assert mixture.grad is not None
    torch.testing.assert_close(mixture.grad, torch.tensor(slopes), rtol=1e-4, atol=1e-4)


def test_a_new_mixture_is_uniform() -> None:
    module = nn.Linear(8, 8)
    sparse = attach(module, "weight", LEVELS, "level")
    assert sparse.mixture.names() == ["level"]
    torch.testing.assert_close(sparse.mixture["level"], torch.full((3,), 1 / 3))


def test_masks_start_from_magnitude_and_hold_their_counts() -> None:
    options = (Unstructured(0.9), NM(2, 4), Block(4, 1, 0.5), Channel(0.25))
    layer = nn.Conv2d(8, 8, 3)
    sparse = attach(layer, "weight", options, "pattern")
    assert [int(m.sum()) for m in sparse.masks] == [kept(o, layer.weight.shape) for o in options]
    dense = original(layer, "weight").abs()
    assert dense[sparse.masks[0] == 1].min() >= dense[sparse.masks[0] == 0].max()


def test_scores_set_the_masks_now_or_at_other_sparsities() -> None:
    sparse = attach(nn.Linear(4, 1), "weight", (Unstructured(0.75), Unstructured(0.5)), "level")
    sparse.set_scores(torch.tensor([[1.0, 4.0, 3.0, 2.0]]))
    assert sparse.masks.squeeze(1).tolist() == [[0, 1, 0, 0], [0, 1, 1, 0]]
    sparse.set_scores(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), at=(DENSE, Unstructured(0.25)))
    assert sparse.masks.squeeze(1).tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]


def test_learned_scores_start_as_hydra_says_and_get_the_straight_through_gradient() -> None:
    layer = nn.Linear(8, 4, bias=False)
    sparse = attach(layer, "weight", HALF)
    weight = original(layer, "weight")
    sparse.learn(weight)
    assert sparse.scores is not None
    torch.testing.assert_close(
        sparse.scores, (6 / 8) ** 0.5 * weight.detach() / weight.detach().abs().max()
    )
    slope = torch.rand(4, 8)
    torch.autograd.backward((layer.weight * slope).sum())
    assert sparse.scores.grad is not None and weight.grad is not None
    torch.testing.assert_close(sparse.scores.grad, slope * weight * sparse.scores.sign())
    torch.testing.assert_close(weight.grad, slope * sparse.masks[0])


def test_learned_scores_decide_the_mask_until_they_are_frozen() -> None:
    layer = nn.Linear(4, 1, bias=False)
    sparse = attach(layer, "weight", HALF)
    sparse.learn(original(layer, "weight"))
    assert sparse.scores is not None
    with torch.no_grad():
        sparse.scores.copy_(torch.tensor([[-4.0, 1.0, 3.0, 2.0]]))
    assert layer.weight.ne(0).tolist() == [[True, False, True, False]]
    sparse.freeze()
    with torch.no_grad():
        sparse.scores.copy_(torch.tensor([[0.0, 1.0, 0.0, 2.0]]))
    assert layer.weight.ne(0).tolist() == [[True, False, True, False]]


def test_frozen_scores_are_kept_and_can_learn_on() -> None:
    module = nn.Linear(4, 1)
    sparse = attach(module, "weight", HALF)
    sparse.learn(original(module, "weight"))
    sparse.freeze()
    state = training_state(module)
    assert state.keys() == {"weight", "bias", "weight#masks", "weight#scores"}
    sparse.learn(torch.ones(1, 4))
    load_training_state(module, state)
    torch.autograd.backward(module.weight.sum())
    assert sparse.scores is not None and sparse.scores.grad is not None
    assert torch.equal(sparse.masks, state["weight#masks"])
    assert bake(module).state_dict().keys() == {"weight", "bias"}


def test_scores_of_an_open_weight_learn_through_every_option() -> None:
    layer = nn.Linear(8, 4, bias=False)
    sparse = attach(layer, "weight", LEVELS, "level")
    weight = original(layer, "weight")
    sparse.learn(weight)
    torch.autograd.backward(layer.weight.sum())
    assert sparse.scores is not None and sparse.scores.grad is not None
    torch.testing.assert_close(sparse.scores.grad, weight * sparse.scores.sign())


@over_models
def test_a_training_state_restores_a_module_made_sparse_the_same_way(
    make: Callable[[], nn.Module], inputs: Tensor
) -> None:
    module, other = sparsified(make, LEVELS), sparsified(make, LEVELS)
    for sparse in sparse_weights(module).values():
        sparse.set_scores(torch.rand(sparse.masks.shape[1:]))
    load_training_state(other, training_state(module))
    for key, value in training_state(module).items():
        assert torch.equal(value, training_state(other)[key]), key
    torch.testing.assert_close(output(other.eval(), inputs), output(module.eval(), inputs))


def test_a_training_state_holds_masks_scores_and_unmasked_weights() -> None:
    module = Language()
    sparse = attach(module, "fc.weight", HALF)
    sparse.learn(original(module, "fc.weight"))
    state = training_state(module)
    ours = {"fc.weight#masks", "fc.weight#scores"}
    assert state.keys() == Language().state_dict().keys() | ours
    assert torch.equal(state["fc.weight"], original(module, "fc.weight"))
    assert state["fc.weight#masks"].shape == (1, 8, 8)
    other = Language()
    attach(other, "fc.weight", HALF).learn(torch.ones(8, 8))
    load_training_state(other, state)
    assert torch.equal(other.fc.weight, module.fc.weight)


def test_a_training_state_that_does_not_fit_is_refused_by_name_and_loads_nothing() -> None:
    module = Language()
    attach(module, "fc.weight", HALF)
    before = training_state(module)
    state = {key: torch.zeros_like(value) for key, value in before.items()}
    state["fc.weight#scores"] = torch.zeros(8, 8)
    state["fc.bias"] = torch.zeros(9)
    del state["norm.running_mean"]
    with pytest.raises(ValueError) as error:
        load_training_state(module, state)
    for part in (
        r"fc.weight#scores is unknown",
        r"fc.bias needs shape (8,), got (9,)",
        r"norm.running_mean is missing",
    ):
        assert part in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in training_state(module).items())


def test_what_cannot_be_made_sparse_is_refused_by_name() -> None:
    module = Language()
    with pytest.raises(ValueError, match=r"fc\.wait: no such parameter"):
        attach(module, "fc.wait", HALF)
    with pytest.raises(ValueError, match=r"fc.weight: NM\(2, 3\) needs in_features divisible by"):
        attach(module, "fc.weight", (NM(2, 3),))
    attach(module, "embed.weight", HALF)
    with pytest.raises(ValueError, match=r"head\.weight: needs a weight that is not yet sparse"):
        attach(module, "head.weight", HALF)
    parametrize.register_parametrization(module.fc, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"fc\.parametrizations\.weight\.original"):
        attach(module, "fc.parametrizations.weight.original", HALF)


def test_options_without_a_choice_or_of_another_count_are_refused() -> None:
    with pytest.raises(ValueError, match="3 options need a choice name"):
        SparseWeight((8, 8), LEVELS)
    with pytest.raises(ValueError, match="needs an option, got none"):
        SparseWeight((8, 8), (), "level")
    mixture = Mixture()
    SparseWeight((8, 8), LEVELS, "level", mixture)
    with pytest.raises(ValueError, match="choice 'level': has 3 options, got 2"):
        SparseWeight((8, 8), LEVELS[:2], "level", mixture)
    with pytest.raises(ValueError, match=r"needs weights of shape \(3,\), got \(2,\)"):
        mixture["level"] = torch.ones(2)
    with pytest.raises(KeyError, match="no open choice 'depth'"):
        mixture["depth"] = torch.ones(2)


def test_a_masked_module_moves_to_another_type_whole() -> None:
    module = sparsified(images, LEVELS).double()
    assert module(pictures.double()).dtype == torch.float64
