import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels.sparse_linear import reference
from tests.kernels import draws

sparse_linear = torch.ops.sparse_nas.sparse_linear
pytestmark = pytest.mark.usefixtures("isa")


def check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    data = kernels.pack_linear(weight).data
    y = sparse_linear(x, data, bias, len(weight), activation)
    wide = None if bias is None else bias.double()
    true = reference.sparse_linear(x.double(), weight.double(), wide, activation)
    size = None if bias is None else bias.double().abs()
    scale = reference.sparse_linear(x.double().abs(), weight.double().abs(), size, "none")
    draws.assert_close(y, true, scale)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.sampled_from([1, 2, 3, 5, 8, 9, 16, 17, 40, 70, 129]),
    inputs=st.sampled_from([1, 3, 16, 31, 32, 33, 100, 300]),
    outputs=st.sampled_from([1, 4, 15, 16, 17, 40, 64]),
    density=draws.densities,
    rows=draws.equal_rows,
    activation=draws.activations,
    with_bias=st.booleans(),
    dtype=draws.storage,
    seed=draws.seeds,
)
def test_linear_equals_its_reference(
    batch: int,
    inputs: int,
    outputs: int,
    density: float,
    rows: int,
    activation: str,
    with_bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    weight = draws.weight(seed, (outputs, inputs), density, rows).to(dtype)
    bias = draws.numbers(seed, outputs) if with_bias else None
    check(draws.numbers(seed, batch, inputs), weight, bias, activation)


@pytest.mark.parametrize("shape", [(33,), (2, 3, 33), (0, 33), (2, 0, 33), (1, 33)])
def test_linear_takes_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    check(draws.numbers(0, *shape), draws.weight(0, (10, 33), 0.3, 1), None, "none")


@pytest.mark.parametrize(("outputs", "inputs"), [(5, 0), (0, 5), (0, 0)])
def test_linear_of_an_empty_weight_gives_the_bias(outputs: int, inputs: int) -> None:
    for batch in (1, 20):
        bias = draws.numbers(1, outputs)
        check(draws.numbers(0, batch, inputs), torch.zeros(outputs, inputs), bias, "none")


@pytest.mark.parametrize("batch", [3, 30])
def test_linear_takes_strided_input(batch: int) -> None:
    weight = draws.weight(0, (12, 20), 0.3, 1)
    check(draws.numbers(0, 20, batch).T, weight, None, "relu")
    check(draws.numbers(0, batch, 40)[:, ::2], weight, None, "relu")


def test_a_row_without_nonzeros_gives_its_bias() -> None:
    weight = draws.weight(0, (20, 40), 0.5, 1)
    weight[[0, 7, 19]] = 0
    bias = draws.numbers(0, 20)
    for batch in (1, 20):
        data = kernels.pack_linear(weight).data
        y = sparse_linear(draws.numbers(0, batch, 40), data, bias, 20)
        assert torch.equal(y[:, [0, 7, 19]], bias[[0, 7, 19]].expand(batch, 3))


def test_activations_hold_far_from_zero() -> None:
    x = torch.tensor([-1e4, -100.0, -30.0, -9.0, -6.0, -1e-6, 0.0, 1e-6, 6.0, 30.0, 1e4])
    data = kernels.pack_linear(torch.eye(11)).data
    for name in ("relu", "relu6", "silu", "gelu"):
        y = sparse_linear(x, data, None, 11, name)
        true = reference.sparse_linear(x.double(), torch.eye(11).double(), None, name)
        torch.testing.assert_close(y.double(), true, rtol=1e-6, atol=3e-7)


def test_linear_names_both_sides_of_a_misfit() -> None:
    data = kernels.pack_linear(torch.ones(4, 6)).data
    with pytest.raises(ValueError, match=r"packed as \(4, 6\).*in=5, out_features=4"):
        sparse_linear(torch.ones(2, 5), data, None, 4)
    with pytest.raises(ValueError, match=r"packed as \(4, 6\).*in=6, out_features=3"):
        sparse_linear(torch.ones(2, 6), data, None, 3)
    conv = kernels.pack_conv2d(torch.ones(4, 6, 1, 1)).data
    with pytest.raises(ValueError, match=r"packed as \(4, 6, 1, 1\)"):
        sparse_linear(torch.ones(2, 6), conv, None, 4)


def test_samples_in_bfloat16_are_computed_in_float32_and_rounded() -> None:
    weight, bias = draws.weight(0, (24, 70), 0.3, 1).bfloat16(), draws.numbers(1, 24).bfloat16()
    data, x = kernels.pack_linear(weight).data, draws.numbers(2, 5, 70).bfloat16()
    wide = sparse_linear(x.float(), data, bias.float(), 24, "gelu")
    assert torch.equal(sparse_linear(x, data, bias, 24, "gelu"), wide.bfloat16())
    assert torch.compile(sparse_linear, fullgraph=True, backend="aot_eager")(
        x, data, bias, 24
    ).dtype is (torch.bfloat16)


def test_linear_refuses_what_it_cannot_take() -> None:
    data = kernels.pack_linear(torch.ones(4, 6)).data
    with pytest.raises(ValueError, match=r"x must be float32 or bfloat16, got torch\.float64"):
        sparse_linear(torch.ones(2, 6).double(), data, None, 4)
    with pytest.raises(ValueError, match=r"activation must be one of none, relu.*'tanh'"):
        sparse_linear(torch.ones(2, 6), data, None, 4, "tanh")
    with pytest.raises(ValueError, match=r"bias must be contiguous float32 \(4,\)"):
        sparse_linear(torch.ones(2, 6), data, torch.ones(5), 4)
    with pytest.raises(ValueError, match="uint8"):
        sparse_linear(torch.ones(2, 6), torch.ones(4, 6), None, 4)
    with pytest.raises(ValueError, match="magic"):
        sparse_linear(torch.ones(2, 6), torch.zeros(500, dtype=torch.uint8), None, 4)
