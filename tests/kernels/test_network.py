from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels.network import Layer, chain, reference, validate
from kernels.network.program import layers_of
from tests.kernels import draws

sparse_chain = torch.ops.sparse_nas.sparse_chain
on_every_isa = pytest.mark.usefixtures("isa")


def linears(seed: int, widths: list[int], activation: str) -> list[Layer]:
    layers = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        weight = draws.weight(seed + i, (outputs, inputs), 0.3, 4 if i % 2 else 1)
        bias = draws.numbers(seed + i, outputs) if i % 2 == 0 else None
        layers.append(Layer(kernels.pack_linear(weight), bias, activation))
    return layers


def convolutions() -> list[Layer]:
    first = kernels.pack_conv2d(draws.weight(1, (8, 3, 3, 3), 0.3, 1))
    second = kernels.pack_conv2d(draws.weight(2, (6, 4, 1, 1), 0.5, 1), 2)
    third = kernels.pack_conv2d(draws.weight(3, (6, 1, 3, 3), 1.0, 1), 6)
    return [
        Layer(first, draws.numbers(1, 8), "relu", stride=(2, 2), padding=(1, 1)),
        Layer(second, None, "silu"),
        Layer(third, draws.numbers(3, 6), "relu6", padding=(2, 2), dilation=(2, 2)),
    ]


def assert_equals_reference(y: Tensor, x: Tensor, layers: list[Layer]) -> None:
    true = reference.sparse_chain(x.double(), layers)
    largest = float(true.abs().max()) if true.numel() else 0.0
    torch.testing.assert_close(y.double(), true, rtol=0, atol=1e-5 * (1 + largest))


@on_every_isa
@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.sampled_from([1, 8, 33, 64, 100]), min_size=2, max_size=5),
    batch=st.sampled_from([0, 1, 3, 8, 9, 40, 100]),
    activation=draws.activations,
    seed=draws.seeds,
)
def test_a_run_of_linears_equals_its_layers(
    widths: list[int], batch: int, activation: str, seed: int
) -> None:
    layers = linears(seed, widths, activation)
    x = draws.numbers(seed, batch, widths[0])
    y = sparse_chain(x, chain(layers), [widths[-1]])
    assert y.shape == (batch, widths[-1])
    assert_equals_reference(y, x, layers)


@on_every_isa
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_a_run_of_convolutions_equals_its_layers(count: int, batch: int) -> None:
    layers = convolutions()[:count]
    x = draws.numbers(0, batch, 3, 17, 20)
    true = reference.sparse_chain(x, layers)
    y = sparse_chain(x, chain(layers), list(true.shape[1:]))
    assert y.shape == true.shape
    assert_equals_reference(y, x, layers)


@on_every_isa
def test_a_run_keeps_leading_dimensions() -> None:
    layers = linears(0, [12, 30, 7], "gelu")
    x = draws.numbers(0, 2, 5, 24)[..., ::2]
    y = sparse_chain(x, chain(layers), [7])
    assert y.shape == (2, 5, 7)
    assert_equals_reference(y, x, layers)


@on_every_isa
def test_a_run_names_both_sides_of_a_misfit() -> None:
    program = chain(linears(0, [12, 30, 7], "none"))
    for x, tail in ((torch.ones(2, 11), [7]), (torch.ones(2, 12), [8])):
        with pytest.raises(ValueError, match=r"\[\(30, 12\), \(7, 30\)\]; they do not fit x"):
            sparse_chain(x, program, tail)
    images, pictures = chain(convolutions()), torch.ones(2, 3, 17, 20)
    with pytest.raises(ValueError, match=r"out_tail \[6, 9, 11\]"):
        sparse_chain(pictures, images, [6, 9, 11])
    with pytest.raises(ValueError, match=r"with out_tail \[7\]"):
        sparse_chain(pictures, images, [7])
    with pytest.raises(ValueError, match=r"they do not fit"):
        sparse_chain(torch.ones(1, 12, 1, 1), program, [7, 1, 1])
    with pytest.raises(ValueError, match=r"they do not fit"):
        sparse_chain(torch.ones(1, 3, 1, 1), chain(convolutions()[:2]), [6, 9, 9])
    with pytest.raises(ValueError, match=r"x must be"):
        sparse_chain(torch.ones(3, 4), program, [1, 2])


def test_layers_that_do_not_follow_each_other_are_refused() -> None:
    one, other = linears(0, [12, 30], "none"), linears(0, [29, 7], "none")
    with pytest.raises(ValueError, match="outputs must be the next one's 29, got 30"):
        chain(one + other)
    with pytest.raises(ValueError, match="all linear or all convolutions"):
        chain([one[0], convolutions()[0]])
    with pytest.raises(ValueError, match="layers must be 1 to"):
        chain([])


def test_arguments_out_of_range_are_refused() -> None:
    packed = convolutions()[0].packed
    with pytest.raises(ValueError, match=r"stride must be at least 1, got \[0, 1\]"):
        chain([Layer(packed, stride=(0, 1))])
    with pytest.raises(ValueError, match=r"activation must be one of none.*'tanh'"):
        chain([Layer(packed, activation="tanh")])
    with pytest.raises(ValueError, match=r"bias must be float32 \(8,\)"):
        chain([Layer(packed, torch.ones(7))])


def test_the_layers_of_a_program_come_back() -> None:
    layers = convolutions()
    for before, after in zip(layers, layers_of(chain(layers)), strict=True):
        assert torch.equal(before.packed.data, after.packed.data)
        for name in ("stride", "padding", "dilation", "activation"):
            assert getattr(before, name) == getattr(after, name)
        assert (before.bias is None) == (after.bias is None)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 2**31), flip=st.integers(1, 255), front=st.booleans())
def test_any_flipped_byte_of_a_program_is_refused(place: int, flip: int, front: bool) -> None:
    program = chain(convolutions())
    program[place % (256 if front else len(program))] ^= flip
    with pytest.raises(ValueError, match=r"program: |packed weight: "):
        validate(program)
    with pytest.raises(ValueError, match=r"program: |packed weight: "):
        sparse_chain(torch.ones(1, 3, 17, 20), program, [6, 9, 10])
