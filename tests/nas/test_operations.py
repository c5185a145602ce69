import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nas.choices import Choice
from nas.operations import (
    Activation,
    BatchNorm,
    Concat,
    FactorizedReduce,
    Flatten,
    GlobalAveragePool,
    Identity,
    Operation,
    Pool,
    Sequence,
    SparseConv2d,
    SparseLinear,
    Sum,
    Zero,
    widest,
)

CHANNELS = 4
strides, kernels = st.integers(1, 3), st.integers(1, 5)


def convolutions() -> st.SearchStrategy[SparseConv2d]:
    free = st.builds(
        SparseConv2d,
        st.integers(1, 6),
        kernels,
        strides,
        st.none() | st.integers(0, 2),
        st.integers(1, 2),
        bias=st.booleans(),
    )
    depth = st.builds(SparseConv2d, st.just(CHANNELS), kernels, strides, depthwise=st.just(True))
    return free | depth


def image_operations() -> st.SearchStrategy[Operation]:
    simple = st.one_of(
        convolutions(),
        st.builds(Pool, st.sampled_from(["max", "average"]), st.just(3), strides),
        st.builds(Zero, strides),
        st.builds(BatchNorm, st.booleans()),
        st.builds(Activation, st.sampled_from(["relu", "relu6", "silu", "gelu"])),
        st.builds(FactorizedReduce, st.integers(2, 7)),
        st.just(Identity()),
        st.just(Flatten()),
        st.just(GlobalAveragePool()),
    )
    named = st.builds(
        lambda *parts: Sequence(tuple(zip("abc", parts, strict=True))),
        st.builds(Activation),
        convolutions(),
        st.builds(BatchNorm),
    )
    return simple | named


def admitted(operation: Operation, *shapes: tuple[int, ...]) -> bool:
    try:
        return bool(operation.shape(*shapes))
    except ValueError:
        return False


@settings(deadline=None, max_examples=120)
@given(image_operations(), st.integers(6, 11), st.integers(6, 11))
def test_an_operation_gives_the_shape_and_has_the_weights_that_it_says(
    operation: Operation, height: int, width: int
) -> None:
    shape = (CHANNELS, height, width)
    if not admitted(operation, shape):
        return
    module = operation.module(shape).eval()
    y = module(torch.randn(2, *shape))
    assert tuple(y.shape) == (2, *operation.shape(shape))
    held = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert {layer.path: layer.shape for layer in operation.layers(shape)} == held


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_operation_is_a_linear_layer(bias: bool) -> None:
    operation = SparseLinear(3, bias)
    module = operation.module((5,))
    assert isinstance(module, nn.Linear)
    assert (module.in_features, module.out_features) == (5, 3)
    names = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert {layer.path: layer.shape for layer in operation.layers((5,))} == names


def test_a_sum_adds_and_a_concatenation_joins_channels() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(Sum().module((3, 4), (3, 4))(a, b), a + b)
    assert torch.equal(Concat().module((3, 4), (3, 4))(a, b), torch.cat([a, b], 1))
    assert Concat().shape((3, 4), (5, 4)) == (8, 4)


def test_an_average_pool_leaves_padding_out_of_its_count() -> None:
    y = Pool("average").module((1, 4, 4))(torch.ones(1, 1, 4, 4))
    assert torch.equal(y, torch.ones(1, 1, 4, 4))


def test_zero_gives_zeros_even_for_what_is_not_finite() -> None:
    x = torch.full((1, 2, 5, 5), float("inf"))
    assert torch.equal(Zero(2).module((2, 5, 5))(x), torch.zeros(1, 2, 3, 3))


def test_a_factorized_reduction_sees_the_odd_pixels_too() -> None:
    module = FactorizedReduce(4).module((1, 4, 4)).eval()
    even = torch.zeros(1, 1, 4, 4)
    odd = torch.zeros(1, 1, 4, 4)
    even[..., 0, 0], odd[..., 1, 1] = 1, 1
    nothing = module(torch.zeros(1, 1, 4, 4))
    assert not torch.equal(module(even)[:, :2], nothing[:, :2])
    assert torch.equal(module(even)[:, 2:], nothing[:, 2:])
    assert not torch.equal(module(odd)[:, 2:], nothing[:, 2:])


def test_same_padding_keeps_the_size_at_stride_1() -> None:
    for kernel, dilation in [(1, 1), (3, 1), (5, 1), (3, 2), (5, 2)]:
        operation = SparseConv2d(2, kernel, dilation=dilation)
        assert operation.shape((1, 9, 7)) == (2, 9, 7)


def test_an_open_width_is_built_at_its_widest() -> None:
    width = Choice("width", (8, 64, 16))
    assert widest(width) == 64
    assert SparseLinear(width).shape((3,)) == (64,)
    assert widest(5) == 5


def test_operations_of_one_kind_are_equal_values() -> None:
    assert SparseConv2d(4, 3) == SparseConv2d(4, 3)
    assert len({SparseConv2d(4, 3), SparseConv2d(4, 3), SparseConv2d(4, 5)}) == 2
