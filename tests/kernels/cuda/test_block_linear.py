"""On a GPU: `pytest -m gpu`."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels.block_index import BlockIndex, block_index, gather, is_whole, scatter, whole_of
from kernels.cuda import block_linear, whole_grad
from kernels.cuda.blocks import SIZES
from kernels.cuda.rounding import precision
from tests.kernels.cuda import captured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),  # torch's own
]

ops = torch.ops.sparse_nas
BOUND = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float64: 1e-12}
NARROW = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [(16, 16), (16, 64), (32, 32), (64, 64), (128, 32), (64, 128), (128, 128)]


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels are taken, also where a dense product was faster."""
    monkeypatch.setattr(block_linear, "pays", lambda *_, **__: True)


def take_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_linear, "pays", lambda *_, **__: False)


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated is NaN until it is written to."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def drawn(
    grid: tuple[int, int], block: tuple[int, int], density: float, dtype: torch.dtype
) -> tuple[Tensor, BlockIndex]:
    """Values of which a row of blocks is full, one is empty, and their index."""
    mask = torch.rand(grid, device="cuda") < density
    mask[0], mask[1] = True, False
    index = block_index(mask, block)
    values = torch.randn(len(index.columns), *block, device="cuda") / index.in_features**0.5
    return values.to(dtype), index


def near(y: Tensor, true: Tensor, bound: float) -> bool:
    return bool((y.double() - true).norm() <= bound * true.norm())


def gradients(
    x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex, grad: Tensor
) -> list[Tensor]:
    """The output, and the gradients of x, values and bias."""
    given = [part.detach().requires_grad_() for part in (x, values, bias) if part is not None]
    own = x.dtype in NARROW and set(index.block) <= set(SIZES)  # cuBLAS refuses to be asked so
    own = own and block_linear.pays(index, x.dtype, 1) and not is_whole(values)
    with poisoned() if own else nullcontext():
        to = given[2] if bias is not None else None
        y = ops.block_linear(given[0], given[1], to, index.lists, index.groups, grad.shape[-1])
        return [y.detach(), *torch.autograd.grad(y, given, grad)]


def check(
    x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex, bound: float | None = None
) -> None:
    """Against float64 on what the kernels are given, twice: bit-equal; values may be whole."""
    grad = torch.randn(*x.shape[:-1], index.out_features, device="cuda").to(x.dtype)
    found = gradients(x, values, bias, index, grad)
    again = gradients(x, values, bias, index, grad)
    blocks = gather(scatter(values, index), index)
    wide = [part.double().requires_grad_() for part in (x, blocks, bias) if part is not None]
    true = F.linear(wide[0], scatter(wide[1], index), *wide[2:])
    wanted = [true.detach(), *torch.autograd.grad(true, wide, grad.double())]
    if is_whole(values):
        wanted[2] = whole_of(wanted[2], index)
        assert not found[2][wanted[2] == 0].any()
    for mine, same, its in zip(found, again, wanted, strict=True):
        assert mine.dtype is x.dtype and mine.shape == its.shape
        assert not mine.isnan().any() and torch.equal(mine, same)
        error = (mine.double() - its).norm() / its.norm().clamp(min=1e-30)
        assert error <= (bound or BOUND[x.dtype]), float(error)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("tokens", [1, 33, 200, 1500])
def test_it_is_right(tokens: int, dtype: torch.dtype, block: tuple[int, int]) -> None:
    torch.manual_seed(tokens)
    values, index = drawn((6, 9), block, 0.4, dtype)
    x = torch.randn(tokens, index.in_features, device="cuda").to(dtype)
    check(x, values, None, index)
    check(x, values, torch.randn(index.out_features, device="cuda").to(dtype), index)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", NARROW)
def test_where_dense_is_faster(
    dtype: torch.dtype, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    take_dense(monkeypatch)
    values, index = drawn((6, 9), block, 0.8, dtype)
    x = torch.randn(200, index.in_features, device="cuda").to(dtype)
    check(x, values, None, index)
    check(x, values, torch.randn(index.out_features, device="cuda").to(dtype), index)


@pytest.mark.parametrize("block", [*BLOCKS, (24, 10)])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("way", ["dense", "blocks", "fused", "joined"])
def test_values_held_whole(
    way: str, dtype: torch.dtype, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rule, its in (("fuses", "fused"), ("joins", "joined")):

        def forced(index: BlockIndex, kind: torch.dtype, _: int, its: str = its) -> bool:
            return way == its and whole_grad.takes(index, kind)

        monkeypatch.setattr(block_linear, rule, forced)
    monkeypatch.setattr(block_linear, "samples", lambda *_: way == "blocks")
    values, index = drawn((6, 9), block, 0.8, dtype)
    values = whole_of(values, index)
    for shape in ((200,), (2, 3), (0,)):
        x = torch.randn(*shape, index.in_features, device="cuda").to(dtype)
        check(x, values, None, index)
        check(x, values, torch.randn(index.out_features, device="cuda").to(dtype), index)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
def test_blocks_as_a_matrix_and_back(
    density: float, dtype: torch.dtype, block: tuple[int, int]
) -> None:
    whole = pytest.importorskip("kernels.cuda.whole")  # where there is Triton
    index = block_index(torch.rand(6, 150, device="cuda") < density, block)
    values = torch.randn(len(index.columns), *block, device="cuda").to(dtype)
    with poisoned():
        matrix = whole.matrix_of(values, index)
        assert torch.equal(whole.blocks_of(matrix, index), values)
    assert torch.equal(matrix, scatter(values, index))
    matrix.add_(1)
    wanted = scatter(gather(matrix, index), index)
    whole.mask_(matrix, index)
    assert torch.equal(matrix, wanted)


@pytest.mark.parametrize(("size", "block"), [(4096, 64), (4096, 128), (4096, 32), (8192, 64)])
@pytest.mark.parametrize("tokens", [2048, 8192, 8191])
def test_large_weights(size: int, block: int, tokens: int) -> None:
    values, index = drawn((size // block, size // block), (block, block), 0.1, torch.bfloat16)
    x = torch.randn(tokens, size, device="cuda").bfloat16()
    check(x, values, None, index)


@pytest.mark.parametrize(("side", "tokens"), [(64, 64), (64, 500), (128, 300)])
def test_large_weights_held_whole_of_few_tokens(
    side: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, index = drawn((4096 // side, 2048 // side), (side, side), 0.5, torch.bfloat16)
    assert block_linear.samples(index, torch.bfloat16, tokens)
    monkeypatch.setattr(block_linear, "fuses", lambda *_: False)
    monkeypatch.setattr(block_linear, "joins", lambda *_: False)
    x = torch.randn(tokens, 2048, device="cuda").bfloat16()
    check(x, whole_of(values, index), None, index)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
def test_no_block_every_block_no_tokens(dtype: torch.dtype, density: float) -> None:
    index = block_index(torch.full((3, 4), density > 0, device="cuda"), (64, 32))
    values = torch.randn(len(index.columns), 64, 32, device="cuda").to(dtype)
    for shape in ((100,), (2, 3), (0,)):
        check(torch.randn(*shape, 128, device="cuda").to(dtype), values, None, index)


def test_blocks_that_no_kernel_takes() -> None:
    values, index = drawn((6, 5), (24, 10), 0.4, torch.float32)
    check(torch.randn(70, 50, device="cuda"), values, None, index)


def test_inputs_may_lie_anyhow() -> None:
    values, index = drawn((4, 6), (32, 16), 0.4, torch.float16)
    x = torch.randn(5, 98, device="cuda").half()
    check(x[:, 1:97], values, None, index)
    check(torch.randn(96 * 9 + 1, device="cuda").half()[1:].view(9, 96), values, None, index)
    check(torch.randn(7, 3, 96, device="cuda").half().transpose(0, 1), values, None, index)
    true = x[:, :96].double().sum(0).expand(128, -1)
    for held in (values, whole_of(values, index)):
        net, given = kernels.BlockLinear(index, held), x.clone().requires_grad_()
        net(given[:, :96]).sum().backward()  # its gradient is one number, expanded
        assert net.values.grad is not None and given.grad is not None
        found = gather(scatter(net.values.grad, index), index)
        assert near(found, gather(true, index), 1e-3)
        wanted = scatter(values.double(), index).sum(0).expand(5, -1)
        assert near(given.grad[:, :96], wanted, 1e-3) and not given.grad[:, 96:].any()


def test_tf32_where_pytorch_takes_it() -> None:
    values, index = drawn((8, 8), (64, 64), 0.3, torch.float32)
    x = torch.randn(500, 512, device="cuda")
    check(x, values, None, index)
    exact = ops.block_linear(x, values, None, index.lists, index.groups, 512)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert precision() == "tf32"
        check(x, values, None, index, 1e-3)
        assert not torch.equal(
            exact, ops.block_linear(x, values, None, index.lists, index.groups, 512)
        )
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("way", ["blocks", "dense", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "dense":
        take_dense(monkeypatch)
    values, index = drawn((8, 8), (64, 64), 0.3, torch.float32)
    values = whole_of(values, index) if way == "whole" else values
    net = kernels.BlockLinear(index, values, torch.randn(512, device="cuda"))
    x = torch.randn(500, 512, device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        y, true = net(x), F.linear(x, net.weight(), net.bias)
    assert y.dtype is dtype
    grad = torch.randn_like(y)
    given = [x, *net.parameters()]
    found, wanted = (torch.autograd.grad(out, given, grad, True) for out in (y, true))
    with torch.autocast("cuda", dtype):  # a backward pass within it
        within = torch.autograd.grad(y, given, grad)
    assert all(torch.equal(mine, its) for mine, its in zip(found, within, strict=True))
    for mine, its in zip((y, *found), (true, *wanted), strict=True):
        assert mine.dtype is its.dtype
        assert near(mine, its.double(), 2 * BOUND[dtype])


@pytest.mark.parametrize(
    ("way", "room"),
    [*itertools.product(("blocks", "dense", "whole"), (False, True)), ("joined", False)],
)
def test_a_captured_step_is_the_step(
    room: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "dense":
        take_dense(monkeypatch)
    values, index = drawn((8, 8), (64, 64), 0.3, torch.bfloat16)
    values = whole_of(values, index) if way in ("whole", "joined") else values
    net = kernels.BlockLinear(index, values, torch.randn(512, device="cuda").bfloat16())
    x = torch.randn(500, 512, device="cuda").bfloat16().requires_grad_()
    captured.check(net, x, room, way == "joined", monkeypatch)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch's own, too
def test_it_compiles_as_one_graph(held: bool, mode: str) -> None:
    values, index = drawn((8, 8), (64, 64), 0.3, torch.bfloat16)
    values = whole_of(values, index) if held else values
    net = kernels.BlockLinear(index, values, torch.randn(512, device="cuda").bfloat16())
    x = torch.randn(500, 512, device="cuda").bfloat16()
    compiled = torch.compile(net, fullgraph=True, mode=mode)
    for _ in range(3):
        grads = []
        for call in (net, compiled):
            net.zero_grad()
            call(x).float().square().sum().backward()
            assert net.values.grad is not None
            grads.append(net.values.grad.clone())
        assert near(grads[1], grads[0].double(), 4e-3)
        x = torch.randn_like(x)


@pytest.mark.parametrize(("kept", "tokens", "held"), [(0.85, 8192, True), (0.1, 8192, False)])
def test_a_layer_where_dense_trains_faster_is_held_whole(
    kept: float, tokens: int, held: bool
) -> None:
    linear = nn.Linear(1024, 1024, device="cuda", dtype=torch.bfloat16)
    mask = torch.rand(16, 16) < kept
    net = kernels.BlockLinear.of(linear, (64, 64), mask, tokens)
    assert is_whole(net.values) == held
    x = torch.randn(300, 1024, device="cuda").bfloat16()
    for place in ("cpu", "cuda"):
        found = net.to(place)(x.to(place))
        true = F.linear(x.double(), net.weight().double().cuda(), linear.bias.double())
        assert near(found.cuda(), true, 4e-3)
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(x).float().square().mean().backward()
    optimiser.step()
    zeros = ~mask.repeat_interleave(64, 0).repeat_interleave(64, 1).cuda()
    assert not scatter(net.values.detach(), net.index)[zeros].any()  # weight() is masked anyhow


def test_a_layer_moves() -> None:
    linear = nn.Linear(256, 256)
    mask = torch.rand(4, 4) < 0.5
    net = kernels.BlockLinear.of(linear, (64, 64), mask)
    x = torch.randn(70, 256)
    y = net(x)
    for place in (f"cuda:{torch.cuda.device_count() - 1}", "cuda:0", "cpu"):
        net = net.to(place)
        assert net.index.groups.device == torch.device(place)
        found = net(x.to(place))
        assert near(found.cpu(), y.double(), 1e-5)
        found.sum().backward()
    moved = net.index.to("cuda")
    assert moved.places.is_cuda and moved.groups.is_cuda


def test_devices_may_not_be_mixed() -> None:
    values, index = drawn((4, 4), (16, 16), 0.5, torch.float32)
    x = torch.randn(3, 64, device="cuda")
    cpu = index.to("cpu")
    with pytest.raises(ValueError, match="lists and groups must be contiguous int32 on cuda"):
        ops.block_linear(x, values, None, cpu.lists, cpu.groups, 64)
    with pytest.raises(ValueError, match="values must be"):
        ops.block_linear(x, values.cpu(), None, index.lists, index.groups, 64)


def test_gradients_are_those_of_differences_twice() -> None:
    values, index = drawn((3, 4), (16, 32), 0.4, torch.float64)
    given = (torch.randn(5, 128, device="cuda").double().requires_grad_(), values.requires_grad_())

    def call(x: Tensor, values: Tensor) -> Tensor:
        return ops.block_linear(x, values, None, index.lists, index.groups, 48)

    assert torch.autograd.gradcheck(call, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)


@pytest.mark.parametrize("step", [0, 2])
def test_a_bias_may_have_any_stride(step: int) -> None:
    index = block_index(torch.ones(2, 2, dtype=torch.bool, device="cuda"), (64, 64))
    values = torch.randn(4, 64, 64, device="cuda")
    x, held = torch.randn(9, 128, device="cuda"), torch.randn(128, 2, device="cuda")
    bias = held[:, 0] if step else held[0, 0].expand(128)
    y = ops.block_linear(x, values, bias, index.lists, index.groups, 128)
    true = F.linear(x.double(), scatter(values, index).double(), bias.double())
    assert (y - true).norm() <= 1e-5 * true.norm()
