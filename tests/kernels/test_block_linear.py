"""A layer of blocks against the same layer, dense and masked, in float64 on the CPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels.block_index import BlockIndex, block_index, block_mask, gather, scatter, whole_of
from tests.kernels import draws

ops = torch.ops.sparse_nas
sizes = st.integers(1, 5)
blocks = st.tuples(st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3, 4]))


def drawn(
    seed: int, grid: tuple[int, int], block: tuple[int, int], density: float
) -> tuple[Tensor, BlockIndex]:
    """A weight of which blocks are kept, float64, and its index."""
    mask = draws.weight(seed, grid, density, 1).ne(0)
    full = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight = draws.numbers(seed, *full.shape).double() * full
    return weight, block_index(mask, block)


def layer(held: bool = False) -> kernels.BlockLinear:
    """Of 10 inputs and 24 outputs in blocks of 4 x 2; held: whole."""
    weight, _ = drawn(1, (6, 5), (4, 2), 0.4)
    linear = nn.Linear(10, 24)
    linear.weight.data = weight.float()
    return kernels.BlockLinear.of(linear, (4, 2), whole=held)


@settings(max_examples=60, deadline=None)
@given(
    rows=sizes,
    columns=sizes,
    block=blocks,
    density=draws.densities,
    shape=st.sampled_from([(), (1,), (7,), (2, 3), (0,), (2, 0)]),
    with_bias=st.booleans(),
    held=st.booleans(),
    seed=draws.seeds,
)
def test_it_is_the_masked_layer_and_so_are_its_gradients(
    rows: int,
    columns: int,
    block: tuple[int, int],
    density: float,
    shape: tuple[int, ...],
    with_bias: bool,
    held: bool,
    seed: int,
) -> None:
    weight, index = drawn(seed, (rows, columns), block, density)
    blocks = gather(weight, index).requires_grad_()
    values = whole_of(blocks, index).detach().requires_grad_() if held else blocks
    x = draws.numbers(seed, *shape, weight.shape[1]).double().requires_grad_()
    bias = draws.numbers(seed, len(weight)).double().requires_grad_() if with_bias else None
    y = ops.block_linear(x, values, bias, index.lists, index.groups, len(weight))
    true = F.linear(x, scatter(blocks, index), bias)
    assert y.shape == true.shape
    torch.testing.assert_close(y, true)
    given_by = [x, *([] if bias is None else [bias])]
    grad = draws.numbers(seed + 1, *y.shape).double()
    *found, of_values = torch.autograd.grad(y, [*given_by, values], grad)
    *wanted, of_blocks = torch.autograd.grad(true, [*given_by, blocks], grad)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(of_values, whole_of(of_blocks, index) if held else of_blocks)


@settings(max_examples=20, deadline=None)
@given(
    rows=sizes,
    columns=sizes,
    block=blocks,
    density=draws.densities,
    held=st.booleans(),
    seed=draws.seeds,
)
def test_gradients_are_those_of_differences_twice(
    rows: int, columns: int, block: tuple[int, int], density: float, held: bool, seed: int
) -> None:
    weight, index = drawn(seed, (rows, columns), block, density)
    values = draws.numbers(seed, len(index.columns), *block).double().requires_grad_()
    x = draws.numbers(seed, 3, weight.shape[1]).double().requires_grad_()
    bias = draws.numbers(seed, len(weight)).double().requires_grad_()

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        values = whole_of(values, index) if held else values
        return ops.block_linear(x, values, bias, index.lists, index.groups, len(weight))

    assert torch.autograd.gradcheck(call, (x, values, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(call, (x, values, bias), fast_mode=True)
    grad = draws.numbers(seed, 3, len(weight)).double().requires_grad_()

    def gradient(grad: Tensor, x: Tensor) -> Tensor:
        kind = ops.block_linear_masked_grad if held else ops.block_linear_weight_grad
        return kind(grad, x, index.lists, index.groups, *block)

    assert torch.autograd.gradcheck(gradient, (grad, x), fast_mode=True)
    assert torch.autograd.gradgradcheck(gradient, (grad, x), fast_mode=True)


@settings(max_examples=40, deadline=None)
@given(
    rows=sizes,
    columns=st.integers(1, 12),
    density=draws.densities,
    group=st.integers(1, 5),
    seed=draws.seeds,
)
def test_the_index_walks_every_block_once_each_way(
    rows: int, columns: int, density: float, group: int, seed: int
) -> None:
    mask = draws.weight(seed, (rows, columns), density, 1).ne(0)
    index = block_index(mask, (1, 1), group=group)
    assert index.lists.dtype is index.groups.dtype is torch.int32
    place = {tuple(at): i for i, at in enumerate(mask.nonzero().tolist())}
    by_column = []
    for column, (begin, end) in enumerate(zip(index.column_starts, index.column_starts[1:])):  # noqa: B905
        for row, at in zip(index.rows[begin:end], index.places[begin:end], strict=True):
            assert place[int(row), column] == int(at)
            by_column.append(int(at))
    assert sorted(by_column) == list(range(len(place)))
    grouped = []
    for row, first, *kept in index.groups.tolist():
        found = [column for column in kept if column >= 0]
        assert found and kept == found + [-1] * (group - len(found))
        assert [place[row, column] for column in found] == list(range(first, first + len(found)))
        grouped += [place[row, column] for column in found]
    assert sorted(grouped) == list(range(len(place)))
    assert len(index.groups) == sum(-(-int(n) // group) for n in mask.sum(1))
    counts = index.starts.diff()[index.order.long()]
    assert (counts.diff() <= 0).all() and len(index.order) == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_numbers_round_once(dtype: torch.dtype) -> None:
    weight, index = drawn(3, (6, 8), (16, 16), 0.4)
    values, x = gather(weight, index).to(dtype), draws.numbers(0, 50, 128).to(dtype)
    values.requires_grad_()
    y = ops.block_linear(x, values, None, index.lists, index.groups, len(weight))
    true = F.linear(x.double(), scatter(values.double(), index))
    bound = 2 * torch.finfo(dtype).eps
    assert y.dtype is dtype
    assert (y.double() - true).norm() <= bound * true.norm()


@pytest.mark.parametrize("held", [False, True])
def test_gradients_keep_their_dtype_under_autocast(held: bool) -> None:
    net, x, grad = layer(held), draws.numbers(0, 7, 10), draws.numbers(1, 7, 24)
    index = net.lists, net.groups
    kind = ops.block_linear_masked_grad if held else ops.block_linear_weight_grad
    with torch.autocast("cpu", torch.bfloat16):
        of_x = ops.block_linear_input_grad(grad, net.values, *index, 10)
        of_values = kind(grad, x, *index, 4, 2)
    assert of_x.dtype is of_values.dtype is torch.float32
    assert torch.equal(of_x, ops.block_linear_input_grad(grad, net.values, *index, 10))
    assert torch.equal(of_values, kind(grad, x, *index, 4, 2))


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_is_that_of_a_linear_layer(dtype: torch.dtype, held: bool) -> None:
    net, x = layer(held).to(dtype), draws.numbers(0, 7, 10).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, like = net(x), F.linear(x, net.weight(), net.bias)
    assert y.dtype is like.dtype
    y.sum().backward()
    assert net.values.grad is not None and net.values.grad.dtype is dtype


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_it_compiles_as_one_graph_forwards_and_backwards(
    held: bool, narrow: bool, dynamic: bool
) -> None:
    net, x = layer(held), draws.numbers(0, 7, 10).requires_grad_()
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


def test_torch_s_own_checks_pass() -> None:
    net = layer().double()
    x, grad = draws.numbers(0, 2, 3, 10).double(), draws.numbers(1, 2, 3, 24).double()
    x.requires_grad_()
    grad.requires_grad_()
    index = net.lists, net.groups
    torch.library.opcheck(ops.block_linear.default, (x, net.values, net.bias, *index, 24))
    torch.library.opcheck(ops.block_linear.default, (x, net.values, None, *index, 24))
    torch.library.opcheck(ops.block_linear_input_grad.default, (grad, net.values, *index, 10))
    torch.library.opcheck(ops.block_linear_weight_grad.default, (grad, x, *index, 4, 2))
    values = whole_of(net.values.detach(), net.index).requires_grad_()
    torch.library.opcheck(ops.block_linear.default, (x, values, net.bias, *index, 24))
    torch.library.opcheck(ops.block_linear_input_grad.default, (grad, values, *index, 10))
    torch.library.opcheck(ops.block_linear_masked_grad.default, (grad, x, *index, 4, 2))


def test_inputs_may_lie_anyhow() -> None:
    net = layer()
    x = draws.numbers(0, 10, 7).t()
    torch.testing.assert_close(net(x), F.linear(x, net.weight(), net.bias))
    net(x).sum().backward()  # its gradient is one number, expanded
    assert net.values.grad is not None
    again = torch.autograd.grad(F.linear(x, net.weight(), net.bias).sum(), net.values)[0]
    torch.testing.assert_close(net.values.grad, again)


@pytest.mark.parametrize("held", [False, True])
def test_a_layer_trains_its_blocks_alone(held: bool) -> None:
    net = layer(held)
    kept, before = block_mask(net.weight(), (4, 2)), net.weight().detach().clone()
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        net(draws.numbers(0, 7, 10)).square().sum().backward()
        optimiser.step()
    raw = scatter(net.values.detach(), net.index)  # weight() is masked anyhow
    assert torch.equal(block_mask(raw, (4, 2)), kept)
    assert (gather(net.weight(), net.index) != gather(before, net.index)).any()


def test_a_saved_layer_loads_into_one_of_other_blocks() -> None:
    net = layer()
    mask = block_mask(net.weight(), (4, 2)).flip(0)
    other = kernels.BlockLinear.of(nn.Linear(10, 24), (4, 2), mask)
    assert set(net.state_dict()) == {"values", "bias", "lists"}
    places = (other.lists.data_ptr(), other.groups.data_ptr())
    other.load_state_dict(net.state_dict())
    assert (other.lists.data_ptr(), other.groups.data_ptr()) == places  # as a graph reads them
    assert torch.equal(other.weight(), net.weight())
    assert torch.equal(other.lists, net.lists) and torch.equal(other.groups, net.groups)


def test_a_loss_on_the_weight_trains_its_blocks_alone() -> None:
    net, other = layer(), layer(True)
    for of in (net, other):
        loss: Tensor = (of.weight() - 1).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
    assert net.values.grad is not None and other.values.grad is not None
    assert torch.equal(whole_of(net.values.grad, net.index), other.values.grad)
    other.weight().detach().add_(1)
    assert torch.equal(net.weight(), other.weight())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("to", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_a_layer_held_whole_loads_blocks_and_they_load_it(
    held: bool, to: bool, assign: bool
) -> None:
    net = layer(held)
    assert ("held whole" in repr(net)) == held
    mask = block_mask(net.weight(), (4, 2)).flip(0)
    other = kernels.BlockLinear.of(nn.Linear(10, 24), (4, 2), mask, whole=to)
    other.load_state_dict(net.state_dict(), assign=assign)
    assert other.values.dim() == (4 if to else 3)
    assert net.weight().shape == (24, 10) and torch.equal(net.weight(), other.weight())
    twice = 2 * net.weight().detach()
    other.load_state_dict({"values": 2 * net.values.detach()}, strict=False)
    assert torch.equal(other.weight(), twice)


@pytest.mark.parametrize("to", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_a_state_that_does_not_fit_is_refused_as_a_whole(held: bool, to: bool) -> None:
    net, full = layer(held), torch.ones(6, 5, dtype=torch.bool)
    other = kernels.BlockLinear.of(nn.Linear(10, 24), (4, 2), full, whole=to)
    before = other.weight().detach().clone()
    state = {name: part for name, part in net.state_dict().items() if name != "bias"}
    with pytest.raises(RuntimeError, match="size mismatch for lists"):
        other.load_state_dict(state, strict=False)
    assert torch.equal(before, other.weight())
    like = layer(to)  # as many blocks, others
    like.load_state_dict(layer(held).state_dict() | _others(like))
    before = like.weight().detach().clone()
    for values in (net.values[:1], net.values.transpose(-1, -2), net.values[..., :1]):
        with pytest.raises(RuntimeError, match="size mismatch for values"):
            like.load_state_dict(net.state_dict() | {"values": values})
        assert torch.equal(like.weight(), before)


def _others(net: kernels.BlockLinear) -> dict[str, Tensor]:
    """The lists of as many other blocks."""
    mask = block_mask(net.weight(), (4, 2)).flip(0)
    return {"lists": block_index(mask, (4, 2)).lists}


@pytest.mark.parametrize("held", [False, True])
def test_lists_alone_change_which_blocks_are_kept(held: bool) -> None:
    net, x = layer(held), draws.numbers(0, 7, 10)
    net.load_state_dict(_others(net), strict=False)
    torch.testing.assert_close(net(x), F.linear(x, net.weight(), net.bias))


def test_values_given_whole_are_masked() -> None:
    net = layer(True)
    values = torch.ones_like(net.values)
    made = kernels.BlockLinear(net.index, values)
    assert torch.equal(made.values, whole_of(gather(torch.ones(24, 10), net.index), net.index))


def test_what_a_state_holds_beside_its_blocks_is_not_loaded() -> None:
    net = layer(True)
    state = net.state_dict() | {"values": net.values.detach() + 1}
    other = layer(True)
    other.load_state_dict(state)
    kept = block_mask(net.weight(), (4, 2))
    assert torch.equal(block_mask(other.values.detach().view(24, 10), (4, 2)), kept)
    assert torch.equal(gather(other.weight(), other.index), gather(net.weight(), net.index) + 1)


def test_values_lie_in_order_in_a_model_of_channels_last() -> None:
    net, x = layer(True), draws.numbers(0, 7, 10)
    y = net(x)
    y.sum().backward()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert net.values.is_contiguous()
    assert net.values.grad is not None and net.values.grad.is_contiguous()
    assert torch.equal(net(x), y)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    ("name", "at", "value"),
    [("columns", 0, 5), ("columns", 0, -1), ("starts", 0, 1), ("starts", 2, 99)],
)
def test_a_forged_index_is_not_loaded(name: str, at: int, value: int, held: bool) -> None:
    net = layer()
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    part: Tensor = getattr(replace(net.index, lists=state["lists"]), name)
    part[at] = value
    with pytest.raises(ValueError, match=f"block index: {name} must be"):
        layer(held).load_state_dict(state)


def test_what_does_not_fit_is_named() -> None:
    net, x = layer(), draws.numbers(0, 7, 10)
    lists, groups = net.lists, net.groups
    with pytest.raises(ValueError, match="does not fit a weight of out=23, in=10 in blocks"):
        ops.block_linear(x, net.values, None, lists, groups, 23)
    with pytest.raises(ValueError, match=f"index, of {len(lists) - 1} numbers, does not fit"):
        ops.block_linear(x, net.values, None, lists[1:], groups, 24)
    with pytest.raises(ValueError, match=r"values must be torch\.float32"):
        ops.block_linear(x, net.values.double(), None, lists, groups, 24)
    with pytest.raises(ValueError, match=r"values must be torch\.float32 \(6, 4, 5, 2\)"):
        ops.block_linear(x, torch.ones(5, 4, 6, 2), None, lists, groups, 24)
    with pytest.raises(ValueError, match=r"bias must be torch\.float32 \(24,\)"):
        ops.block_linear(x, net.values, torch.ones(23), lists, groups, 24)
    with pytest.raises(ValueError, match="lists and groups must be contiguous int32 on cpu"):
        ops.block_linear(x, net.values, None, lists.long(), groups, 24)
    with pytest.raises(ValueError, match=r"must divide into 5x2, got \(24, 10\)"):
        kernels.BlockLinear.of(nn.Linear(10, 24), (5, 2))
    with pytest.raises(ValueError, match=r"BlockLinear: values must be \(9, 4, 2\), or whole"):
        kernels.BlockLinear(net.index, torch.ones(1, 2, 3, 4))
    with pytest.raises(ValueError, match="needs a bool mask"):
        block_index(torch.ones(2, 2), (4, 4))
