"""A convolution of blocks against the same one, dense and masked, in float64 on the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels.block_index import (
    BlockIndex,
    block_index,
    block_mask,
    flat,
    gather,
    scatter,
    unflat,
    whole_of,
)
from kernels.window import Window
from tests.kernels import draws

ops = torch.ops.sparse_nas
blocks = st.tuples(st.integers(1, 4), st.integers(1, 4))
convs = st.builds(
    draws.Conv,
    images=st.sampled_from([0, 1, 2, 3]),
    groups=st.just(1),
    inputs=st.integers(1, 4),  # blocks, as outputs
    outputs=st.integers(1, 4),
    size=st.tuples(st.integers(1, 9), st.integers(1, 11)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
).filter(draws.Conv.fits)


def drawn(
    seed: int, grid: tuple[int, ...], block: tuple[int, int], density: float
) -> tuple[Tensor, BlockIndex]:
    """Values, and the index of a mask (rows of blocks, columns of blocks, *kernel)."""
    mask = flat(draws.weight(seed, grid, density, 1).ne(0))
    index = block_index(mask, block, grid[2] * grid[3])
    return draws.numbers(seed, len(index.columns), *block).double(), index


def layer(
    stride: int = 1, kernel: tuple[int, int] = (3, 2), held: bool = False
) -> kernels.BlockConv2d:
    """Of 6 to 8 channels in blocks of 4 x 2; held: whole."""
    conv = nn.Conv2d(6, 8, kernel, stride, padding=1)
    mask = draws.weight(1, (2, 3, *kernel), 0.4, 1).ne(0)
    return kernels.BlockConv2d.of(conv, (4, 2), mask, whole=held)


def dense(net: kernels.BlockConv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, net.weight(), net.bias, *net.window.pairs)


@settings(max_examples=100, deadline=None)
@given(
    conv=convs,
    block=blocks,
    density=draws.densities,
    with_bias=st.booleans(),
    last=st.booleans(),
    held=st.booleans(),
    seed=draws.seeds,
)
def test_it_is_the_masked_convolution_and_so_are_its_gradients(
    conv: draws.Conv,
    block: tuple[int, int],
    density: float,
    with_bias: bool,
    last: bool,
    held: bool,
    seed: int,
) -> None:
    blocks, index = drawn(seed, conv.weight_shape, block, density)
    blocks.requires_grad_()
    values = whole_of(blocks, index).detach().requires_grad_() if held else blocks
    x = draws.numbers(seed, conv.images, index.channels, *conv.size).double()
    layout = torch.channels_last if last else torch.contiguous_format
    x = x.contiguous(memory_format=layout).requires_grad_()
    bias = draws.numbers(seed, index.out_features).double().requires_grad_() if with_bias else None
    walk = (conv.stride, conv.padding, conv.dilation)
    layer = (index.lists, index.groups, index.out_features, conv.kernel)
    y = ops.block_conv2d(x, values, bias, *layer, *walk)
    true = F.conv2d(x, unflat(scatter(blocks, index), conv.kernel), bias, *walk)
    assert y.shape == true.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, true)
    given_by = [x, *([] if bias is None else [bias])]
    grad = draws.numbers(seed + 1, *y.shape).double()
    *found, of_values = torch.autograd.grad(y, [*given_by, values], grad)
    *wanted, of_blocks = torch.autograd.grad(true, [*given_by, blocks], grad)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(of_values, whole_of(of_blocks, index) if held else of_blocks)


@settings(max_examples=10, deadline=None)
@given(conv=convs, block=blocks, density=draws.densities, held=st.booleans(), seed=draws.seeds)
def test_gradients_are_those_of_differences_twice(
    conv: draws.Conv, block: tuple[int, int], density: float, held: bool, seed: int
) -> None:
    values, index = drawn(seed, conv.weight_shape, block, density)
    values.requires_grad_()
    x = draws.numbers(seed, 2, index.channels, *conv.size).double().requires_grad_()
    bias = draws.numbers(seed, index.out_features).double().requires_grad_()
    layer = (index.lists, index.groups, index.out_features, conv.kernel)

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        walk = (conv.stride, conv.padding, conv.dilation)
        values = whole_of(values, index) if held else values
        return ops.block_conv2d(x, values, bias, *layer, *walk)

    assert torch.autograd.gradcheck(call, (x, values, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, values, bias), fast_mode=True)
    size = call(x, values, bias).shape
    grad = draws.numbers(seed, *size).double().requires_grad_()

    def gradient(grad: Tensor, x: Tensor) -> Tensor:
        kind = ops.block_conv2d_masked_grad if held else ops.block_conv2d_weight_grad
        walk = (conv.kernel, conv.stride, conv.padding, conv.dilation)
        return kind(grad, x, index.lists, index.groups, block, *walk)

    assert torch.autograd.gradcheck(gradient, (grad, x), fast_mode=True)
    assert torch.autograd.gradgradcheck(gradient, (grad, x), fast_mode=True)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(*(st.integers(1, 4) for _ in range(4))),
    density=draws.densities,
    seed=draws.seeds,
)
def test_the_transposed_lists_are_the_index_of_the_flipped_kernel(
    grid: tuple[int, int, int, int], density: float, seed: int
) -> None:
    mask = draws.weight(seed, grid, density, 1).ne(0)
    taps = grid[2] * grid[3]
    index = block_index(flat(mask), (1, 1), taps)
    place = mask.permute(0, 2, 3, 1).flatten().cumsum(0).view(-1, *grid[2:], grid[1]) - 1
    other = block_index(flat(mask.transpose(0, 1).flip(2, 3)), (1, 1), taps)
    for mine, its in (("column_starts", "starts"), ("rows", "columns"), ("column_order", "order")):
        assert torch.equal(getattr(index, mine), getattr(other, its)), mine
    flipped = mask.transpose(0, 1).flip(2, 3).permute(0, 2, 3, 1)
    places = place.permute(3, 1, 2, 0).flip(1, 2)[flipped]
    assert torch.equal(index.places, places.int())
    values = draws.numbers(seed, len(index.columns), 1, 1)
    assert torch.equal(gather(scatter(values, index), index), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_round_once(dtype: torch.dtype) -> None:
    values, index = drawn(3, (4, 3, 3, 3), (16, 16), 0.4)
    values, x = (values / 16).to(dtype), draws.numbers(0, 2, 48, 9, 8).to(dtype)
    walk = ((2, 1), (1, 1), (1, 1))
    layer = (index.lists, index.groups, 64, (3, 3))
    y = ops.block_conv2d(x, values, None, *layer, *walk)
    true = F.conv2d(x.double(), unflat(scatter(values.double(), index), (3, 3)), None, *walk)
    assert y.dtype is dtype
    assert (y.double() - true).norm() <= torch.finfo(dtype).eps * true.norm()


@pytest.mark.parametrize("held", [False, True])
def test_gradients_keep_their_dtype_under_autocast(held: bool) -> None:
    net, x = layer(held=held), draws.numbers(0, 2, 6, 7, 5).requires_grad_()
    y, given = net(x), [x, net.values]
    true = torch.autograd.grad(y.square().sum(), given, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y.square().sum(), given)
    assert all(torch.equal(mine, its) for mine, its in zip(found, true, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_is_that_of_a_convolution(dtype: torch.dtype) -> None:
    net, x = layer().to(dtype), draws.numbers(0, 2, 6, 7, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, like = net(x), dense(net, x)
    assert y.dtype is like.dtype
    y.sum().backward()
    assert net.values.grad is not None and net.values.grad.dtype is dtype


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("stride", "held"), [(1, False), (2, False), (2, True)])
def test_it_compiles_as_one_graph_forwards_and_backwards(
    stride: int, held: bool, narrow: bool, dynamic: bool
) -> None:
    net, x = layer(stride, held=held), draws.numbers(0, 2, 6, 7, 5).requires_grad_()
    torch._dynamo.reset()  # it counts what the tests before compiled
    compiled: Any = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    grads: list[tuple[Tensor, Tensor]] = []
    for call in (net, compiled):
        net.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            call(x).square().sum().backward()
        assert net.values.grad is not None and x.grad is not None
        grads.append((x.grad, net.values.grad))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", [(3, 2), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_torch_s_own_checks_pass(stride: int, kernel: tuple[int, int]) -> None:
    net = layer(stride, kernel).double()
    x = draws.numbers(0, 2, 6, 7, 5).double().requires_grad_()
    grad = draws.numbers(1, *net(x).shape).double().requires_grad_()
    index, walk = (net.lists, net.groups), (net.window.kernel, *net.window.pairs)
    forward = ops.block_conv2d.default
    torch.library.opcheck(forward, (x, net.values, net.bias, *index, 8, *walk))
    torch.library.opcheck(forward, (x, net.values, None, *index, 8, *walk))
    given = (grad, net.values, *index, 6, (7, 5), *walk)
    torch.library.opcheck(ops.block_conv2d_input_grad.default, given)
    sampled = (grad, x, *index, (4, 2), *walk)
    torch.library.opcheck(ops.block_conv2d_weight_grad.default, sampled)
    values = whole_of(net.values.detach(), net.index).requires_grad_()
    torch.library.opcheck(forward, (x, values, net.bias, *index, 8, *walk))
    torch.library.opcheck(
        ops.block_conv2d_input_grad.default, (grad, values, *index, 6, (7, 5), *walk)
    )
    torch.library.opcheck(ops.block_conv2d_masked_grad.default, sampled)


def test_inputs_may_lie_anyhow() -> None:
    net = layer()
    x = draws.numbers(0, 5, 7, 2, 12)[..., ::2].permute(2, 3, 1, 0)
    torch.testing.assert_close(net(x), dense(net, x))
    net(x).sum().backward()  # its gradient is one number, expanded
    assert net.values.grad is not None
    again = torch.autograd.grad(dense(net, x).sum(), net.values)[0]
    torch.testing.assert_close(net.values.grad, again)


def test_a_layer_is_made_of_a_convolution() -> None:
    conv = nn.Conv2d(6, 8, (3, 5), padding="same", dilation=2, bias=False)
    with torch.no_grad():
        conv.weight[:4, :2, 1, 2] = 0
        conv.weight[4:, 2:4] = 0
    net, x = kernels.BlockConv2d.of(conv, (4, 2)), draws.numbers(0, 2, 6, 9, 9)
    assert len(net.values) == 6 * 15 - 1 - 15
    assert net.window == Window((3, 5), (1, 1), (2, 4), (2, 2))
    assert torch.equal(net.weight(), conv.weight)
    torch.testing.assert_close(net(x), conv(x))
    assert repr(net) == (
        "BlockConv2d(6, 8, kernel_size=(3, 5), stride=(1, 1), padding=(2, 4), dilation=(2, 2), "
        "bias=False, blocks=74 of 4x2)"
    )


@pytest.mark.parametrize("held", [False, True])
def test_a_layer_trains_its_blocks_alone(held: bool) -> None:
    net = layer(held=held)
    before = flat(net.weight()).detach().clone()
    kept = block_mask(before, (4, 2))
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    net(draws.numbers(0, 2, 6, 7, 5)).square().sum().backward()
    optimiser.step()
    after = flat(net.weight())
    raw = scatter(net.values.detach(), net.index)  # weight() is masked anyhow
    assert torch.equal(block_mask(raw, (4, 2)), kept)
    assert (gather(after, net.index) != gather(before, net.index)).any()


@pytest.mark.parametrize("held", [False, True])
def test_a_saved_layer_loads_into_one_of_other_blocks(held: bool) -> None:
    net = layer(held=held)
    mask = draws.weight(1, (2, 3, 3, 2), 0.4, 1).ne(0).flip(0, 3)
    other = kernels.BlockConv2d.of(nn.Conv2d(6, 8, (3, 2), padding=1), (4, 2), mask)
    assert set(net.state_dict()) == {"values", "bias", "lists"}
    assert not torch.equal(other.lists, net.lists)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.weight(), net.weight())
    assert torch.equal(other.lists, net.lists) and torch.equal(other.groups, net.groups)


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [("columns", -1, 18), ("columns", 0, -1), ("starts", 0, 1), ("starts", 1, 99)],
)
def test_a_forged_index_is_not_loaded(name: str, at: int, value: int) -> None:
    net = layer()
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    part: Tensor = getattr(replace(net.index, lists=state["lists"]), name)
    part[at] = value
    with pytest.raises(ValueError, match=f"block index: {name} must be"):
        net.load_state_dict(state)


def test_what_does_not_fit_is_named() -> None:
    net, x = layer(), draws.numbers(0, 2, 6, 7, 5)
    lists, groups, walk = net.lists, net.groups, (net.window.kernel, *net.window.pairs)
    ones, pads = (1, 1), (0, 0)
    with pytest.raises(ValueError, match="does not fit a weight of out=7, in=6 in blocks"):
        ops.block_conv2d(x, net.values, None, lists, groups, 7, *walk)
    with pytest.raises(ValueError, match=f"index, of {len(lists) - 1} numbers, does not fit"):
        ops.block_conv2d(x, net.values, None, lists[1:], groups, 8, *walk)
    with pytest.raises(ValueError, match=r"block_conv2d: values must be torch\.float32"):
        ops.block_conv2d(x, net.values.double(), None, lists, groups, 8, *walk)
    with pytest.raises(ValueError, match=r"block_conv2d: bias must be torch\.float32 \(8,\)"):
        ops.block_conv2d(x, net.values, torch.ones(7), lists, groups, 8, *walk)
    with pytest.raises(ValueError, match=r"block_conv2d: x must be \(N, C, H, W\), got \(6, 7"):
        ops.block_conv2d(x[0], net.values, None, lists, groups, 8, *walk)
    with pytest.raises(ValueError, match=r"block_conv2d: kernel \(3, 2\) with dilation \(9, 1\)"):
        ops.block_conv2d(x, net.values, None, lists, groups, 8, (3, 2), ones, pads, (9, 1))
    with pytest.raises(ValueError, match="block_conv2d: kernel_size, stride, dilation and groups"):
        ops.block_conv2d(x, net.values, None, lists, groups, 8, (3, 2), (0, 1), pads, ones)
    grad = net(x).detach()
    with pytest.raises(ValueError, match=r"input_grad: grad must be torch\.float32 \(2, 8, 8, 6"):
        ops.block_conv2d_input_grad(grad, net.values, lists, groups, 6, (8, 5), *walk)
    with pytest.raises(ValueError, match=r"weight_grad: grad must be torch\.float32 \(2, 8, 7, 6"):
        ops.block_conv2d_weight_grad(grad[:, :, 1:], x, lists, groups, (4, 2), *walk)
    with pytest.raises(ValueError, match=r"does not fit a weight of out=0, in=6"):
        ops.block_conv2d_weight_grad(grad[0], x, lists, groups, (4, 2), *walk)


def test_what_no_layer_can_be_made_of_is_named() -> None:
    with pytest.raises(ValueError, match="needs a convolution with groups=1"):
        kernels.BlockConv2d.of(nn.Conv2d(8, 8, 3, groups=2), (4, 2))
    with pytest.raises(ValueError, match="padding_mode='circular'"):
        kernels.BlockConv2d.of(nn.Conv2d(8, 8, 3, padding_mode="circular"), (4, 2))
    with pytest.raises(ValueError, match=r"padding='same' must be even.*kernel_size=\(3, 2\)"):
        kernels.BlockConv2d.of(nn.Conv2d(8, 8, (3, 2), padding="same"), (4, 2))
    with pytest.raises(ValueError, match=r"must divide into 5x2, got \(8, 72\)"):
        kernels.BlockConv2d.of(nn.Conv2d(8, 8, 3), (5, 2))
    with pytest.raises(ValueError, match=r"mask must be \(2, 4, 3, 3\), got \(2, 4\)"):
        kernels.BlockConv2d.of(nn.Conv2d(8, 8, 3), (4, 2), torch.ones(2, 4).bool())
    with pytest.raises(ValueError, match="tokens, or pixels, must be at least 1, got 0"):
        kernels.BlockConv2d.of(nn.Conv2d(8, 8, 3), (4, 2), pixels=0)
    with pytest.raises(ValueError, match=r"needs a bool mask.*\(2, 10\), \(4, 4\), 9"):
        block_index(torch.ones(2, 10).bool(), (4, 4), 9)
