from collections.abc import Callable

import pytest
import torch
from torch import nn

from nas.masks import bake, sparse_weights, weights
from nas.nn import SparseConv2d, SparseLinear
from nas.sparsity import DENSE, NM, Block, Channel, Sparsity, Unstructured, mask

HALF = Unstructured(0.5)


def test_without_sparsity_the_layers_are_the_ordinary_ones() -> None:
    torch.manual_seed(0)
    sparse = [SparseConv2d(4, 8, 3, 2, 1, groups=2, bias=False), SparseLinear(4, 8, bias=False)]
    torch.manual_seed(0)
    plain = [nn.Conv2d(4, 8, 3, 2, 1, groups=2, bias=False), nn.Linear(4, 8, bias=False)]
    for one, other, inputs in zip(
        sparse, plain, (torch.rand(2, 4, 5, 5), torch.rand(2, 4)), strict=True
    ):
        assert one.state_dict().keys() == other.state_dict().keys()
        assert torch.equal(one(inputs), other(inputs))


@pytest.mark.parametrize(
    "sparsity",
    [Unstructured(0.9), NM(2, 4), Block(4, 1, 0.5), Channel(0.5)],
    ids=lambda s: s.label,
)
def test_the_weight_is_masked_by_the_magnitudes_it_is_born_with(sparsity: Sparsity) -> None:
    torch.manual_seed(0)
    conv, linear = (
        SparseConv2d(8, 8, 3, sparsity=sparsity),
        SparseLinear(8, 8, sparsity=sparsity),
    )
    torch.manual_seed(0)
    for sparse, plain in ((conv, nn.Conv2d(8, 8, 3)), (linear, nn.Linear(8, 8))):
        expected = plain.weight * mask(plain.weight.detach().abs(), sparsity)
        assert torch.equal(sparse.weight, expected)


def test_layers_compute_with_the_masked_weight_only() -> None:
    layer = SparseConv2d(8, 8, 3, bias=False, sparsity=Unstructured(0.5))
    inputs = torch.rand(2, 8, 5, 5)
    assert torch.equal(layer(inputs), nn.functional.conv2d(inputs, layer.weight))
    sparse_weights(layer)["weight"].masks.zero_()
    assert not layer(inputs).any()


def test_weights_of_the_layer_have_plain_keys_and_state_dict_has_both_parts() -> None:
    layer = SparseLinear(8, 8, sparsity=NM(2, 4))
    assert layer.state_dict().keys() == {
        "bias",
        "parametrizations.weight.original",
        "parametrizations.weight.0.masks",
    }
    nn.Linear(8, 8).load_state_dict(weights(layer))
    twin = SparseLinear(8, 8, sparsity=NM(2, 4))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight)


@pytest.mark.parametrize(
    "make",
    [lambda: SparseConv2d(8, 8, 1, sparsity=HALF), lambda: SparseLinear(8, 8, sparsity=HALF)],
)
def test_resetting_draws_a_new_masked_weight(make: Callable[[], SparseConv2d]) -> None:
    layer = make()
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert int(layer.weight.count_nonzero()) == 32
    assert not torch.equal(layer.weight, before)


def test_a_baked_layer_is_an_ordinary_one() -> None:
    layer = SparseLinear(8, 8, sparsity=Unstructured(0.5))
    before = layer.weight.detach().clone()
    bake(layer)
    assert torch.equal(layer.weight, before) and isinstance(layer.weight, nn.Parameter)
    assert type(layer) is SparseLinear


def test_a_shape_that_does_not_admit_the_sparsity_is_refused_with_the_rule() -> None:
    with pytest.raises(ValueError) as error:
        SparseLinear(30, 8, sparsity=NM(2, 4))
    assert str(error.value) == "SparseLinear: NM(2, 4) needs in_features divisible by 4, got 30"
    with pytest.raises(ValueError) as error:
        SparseConv2d(8, 6, 3, sparsity=Block(4, 1, 0.5))
    assert str(error.value) == (
        "SparseConv2d: Block(4, 1, 0.5) needs out_channels divisible by 4, got 6"
    )


def test_dense_layers_hold_no_sparse_weight() -> None:
    assert sparse_weights(SparseLinear(8, 8, sparsity=DENSE)) == {}
