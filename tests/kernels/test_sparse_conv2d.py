import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels.sparse_conv2d import reference
from tests.kernels import draws

sparse_conv2d = torch.ops.sparse_nas.sparse_conv2d
pytestmark = pytest.mark.usefixtures("isa")


def run(case: draws.Conv, x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    data = kernels.pack_conv2d(weight, case.groups).data
    where = (case.kernel, case.stride, case.padding, case.dilation, case.groups)
    return sparse_conv2d(x, data, bias, len(weight), *where, act)


def truth(case: draws.Conv, x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    where = (case.stride, case.padding, case.dilation)
    return reference.sparse_conv2d(x, weight, bias, *where, case.groups, act)


def check(case: draws.Conv, x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> None:
    y = run(case, x, weight, bias, act)
    wide = None if bias is None else bias.double()
    true = truth(case, x.double(), weight.double(), wide, act)
    size = None if bias is None else bias.double().abs()
    scale = truth(case, x.double().abs(), weight.double().abs(), size, "none")
    draws.assert_close(y, true, scale)
    assert y.is_contiguous()


@settings(max_examples=120, deadline=None)
@given(
    case=st.one_of(draws.general, draws.pointwise, draws.depthwise),
    density=draws.densities,
    rows=draws.equal_rows,
    activation=draws.activations,
    with_bias=st.booleans(),
    dtype=draws.storage,
    seed=draws.seeds,
)
def test_convolution_equals_its_reference(
    case: draws.Conv,
    density: float,
    rows: int,
    activation: str,
    with_bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    weight = draws.weight(seed, case.weight_shape, density, rows).to(dtype)
    bias = draws.numbers(seed, len(weight)) if with_bias else None
    check(case, draws.numbers(seed, *case.x_shape), weight, bias, activation)


LARGE = [
    draws.Conv(1, 1, 64, 64, (56, 56), (3, 3), (1, 1), (1, 1), (1, 1)),
    draws.Conv(1, 1, 16, 8, (112, 112), (3, 3), (2, 2), (1, 1), (1, 1)),
    draws.Conv(1, 1, 3, 8, (224, 224), (7, 7), (2, 2), (3, 3), (1, 1)),
    draws.Conv(8, 1, 16, 16, (32, 32), (3, 3), (1, 1), (1, 1), (1, 1)),
    draws.Conv(2, 36, 1, 1, (32, 32), (5, 5), (1, 1), (4, 4), (2, 2)),
    draws.Conv(2, 39, 1, 1, (29, 30), (5, 5), (1, 1), (2, 2), (1, 1)),
    draws.Conv(3, 48, 1, 1, (15, 23), (3, 3), (1, 1), (1, 1), (1, 1)),
    draws.Conv(40, 1, 64, 8, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("rows", [1, 4])
def test_images_larger_than_a_band_equal_the_reference(case: draws.Conv, rows: int) -> None:
    weight = draws.weight(0, case.weight_shape, 0.1, rows)
    check(case, draws.numbers(0, *case.x_shape), weight, None, "relu")


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_takes_strided_and_channels_last_input(kernel: int) -> None:
    case = draws.Conv(2, 1, 6, 5, (9, 8), (kernel,) * 2, (1, 1), (0, 0), (1, 1))
    weight = draws.weight(0, case.weight_shape, 0.4, 1)
    x = draws.numbers(0, *case.x_shape)
    check(case, x.to(memory_format=torch.channels_last), weight, None, "none")
    check(case, draws.numbers(0, 2, 6, 9, 16)[..., ::2], weight, None, "none")


def test_one_number_stands_for_both_axes() -> None:
    x, weight = draws.numbers(0, 2, 3, 9, 9), draws.weight(0, (4, 3, 3, 3), 0.5, 1)
    data = kernels.pack_conv2d(weight).data
    y = sparse_conv2d(x, data, None, 4, 3, 2, 1, 1, 1)
    assert torch.equal(y, sparse_conv2d(x, data, None, 4, (3, 3), (2, 2), (1, 1), (1, 1), 1))


def test_convolution_names_both_sides_of_a_misfit() -> None:
    x, data = torch.ones(1, 4, 5, 5), kernels.pack_conv2d(torch.ones(6, 4, 3, 3)).data
    where = ((1, 1), (1, 1), (1, 1))
    with pytest.raises(ValueError, match=r"packed as \(6, 4, 3, 3\).*in=4, out_channels=5"):
        sparse_conv2d(x, data, None, 5, (3, 3), *where, 1)
    with pytest.raises(ValueError, match=r"packed as \(6, 4, 3, 3\).*kernel_size=\(1, 1\)"):
        sparse_conv2d(x, data, None, 6, (1, 1), *where, 1)
    with pytest.raises(ValueError, match=r"groups=1; it does not fit.*groups=2"):
        sparse_conv2d(x, data, None, 6, (3, 3), *where, 2)
    with pytest.raises(ValueError, match=r"in=3"):
        sparse_conv2d(x[:, :3], data, None, 6, (3, 3), *where, 1)


def test_convolution_refuses_arguments_out_of_range() -> None:
    x, data = torch.ones(1, 4, 5, 5), kernels.pack_conv2d(torch.ones(6, 4, 3, 3)).data
    with pytest.raises(ValueError, match="larger than the padded input, 5x5 with padding"):
        sparse_conv2d(x, data, None, 6, (3, 3), (1, 1), (0, 0), (3, 1), 1)
    with pytest.raises(ValueError, match="must be positive"):
        sparse_conv2d(x, data, None, 6, (3, 3), (0, 1), (0, 0), (1, 1), 1)
    with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\), got \(4, 5, 5\)"):
        sparse_conv2d(x[0], data, None, 6, (3, 3), (1, 1), (0, 0), (1, 1), 1)
