"""Both gradients of a layer whose weight is held whole, by one operator, in float64 on the CPU."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels.block_index import gather, masked, scatter, whole_of
from tests.kernels import draws
from tests.kernels.test_block_linear import blocks, drawn, layer, sizes

ops = torch.ops.sparse_nas


@settings(max_examples=40, deadline=None)
@given(
    rows=sizes,
    columns=sizes,
    block=blocks,
    density=draws.densities,
    shape=st.sampled_from([(1,), (3,), (2, 3), (0,)]),
    seed=draws.seeds,
)
def test_they_are_those_of_two_operators_and_of_differences_twice(
    rows: int,
    columns: int,
    block: tuple[int, int],
    density: float,
    shape: tuple[int, ...],
    seed: int,
) -> None:
    weight, index = drawn(seed, (rows, columns), block, density)
    lists, values = (index.lists, index.groups), whole_of(gather(weight, index), index)
    grad = draws.numbers(seed, *shape, len(weight)).double()
    x = draws.numbers(seed + 1, *shape, weight.shape[1]).double()
    of_values, of_x = ops.block_linear_both_grads(grad, x, values, *lists)
    assert torch.equal(of_values, ops.block_linear_masked_grad(grad, x, *lists, *block))
    assert torch.equal(of_x, ops.block_linear_input_grad(grad, values, *lists, x.shape[-1]))

    def both(grad: Tensor, x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = ops.block_linear_both_grads(
            grad, x, masked(values, index), *lists
        )
        return found

    given = [part.requires_grad_() for part in (grad, x, values)]
    assert torch.autograd.gradcheck(both, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(both, given, fast_mode=True)


def test_torch_s_own_checks_pass() -> None:
    net = layer(True).double()
    x, grad = draws.numbers(0, 2, 3, 10).double(), draws.numbers(1, 2, 3, 24).double()
    given = (grad.requires_grad_(), x.requires_grad_(), net.values)
    torch.library.opcheck(ops.block_linear_both_grads.default, (*given, net.lists, net.groups))


def test_what_does_not_fit_is_named() -> None:
    net, x, grad = layer(True), draws.numbers(0, 7, 10), draws.numbers(1, 7, 24)
    name, index = "block_linear_both_grads", (net.lists, net.groups)
    whole = rf"{name}: values must be torch\.float32 \(6, 4, 5, 2\)"
    for values in (layer().values, net.values.double(), torch.ones(6, 4, 5, 2, 1)):
        with pytest.raises(ValueError, match=f"{whole}|{name}: the index.* does not fit"):
            ops.block_linear_both_grads(grad, x, values, *index)
    for values in (torch.ones(()), torch.ones(3), torch.ones(24, 10)):
        with pytest.raises(ValueError, match=f"{name}: the index"):
            ops.block_linear_both_grads(grad, x, values, *index)
    with pytest.raises(ValueError, match=rf"{name}: grad must be torch\.float32 \(7, 24\)"):
        ops.block_linear_both_grads(grad[:6], x, net.values, *index)


@pytest.mark.parametrize("last", [False, True])
def test_a_convolution_of_pixels_takes_them(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(6, 8, 1).double()
    mask = draws.weight(1, (2, 3, 1, 1), 0.5, 1).ne(0)
    net = kernels.BlockConv2d.of(conv, (4, 2), mask, whole=True)
    x, grad = draws.numbers(0, 3, 6, 5, 7).double(), draws.numbers(1, 3, 8, 5, 7).double()
    if last:
        x, grad = (part.to(memory_format=torch.channels_last) for part in (x, grad))
    given: list[Any] = [x.requires_grad_(), net.values, net.bias]
    true: list[Any] = [x, net.weight().detach().requires_grad_(), conv.bias]
    met = list[int]()
    whole = ops.block_linear_both_grads

    def noted(*given: Tensor) -> tuple[Tensor, Tensor]:
        met.append(1)
        found: tuple[Tensor, Tensor] = whole(*given)
        return found

    monkeypatch.setattr(ops, "block_linear_both_grads", noted)
    found = torch.autograd.grad(net(x), given, grad)
    assert met
    wanted = torch.autograd.grad(F.conv2d(*true), true, grad)
    torch.testing.assert_close(found[0], wanted[0])
    kept = gather(wanted[1].view(8, 6), net.index)
    torch.testing.assert_close(found[1].view(8, 6), scatter(kept, net.index))
    torch.testing.assert_close(found[2], wanted[2])
