"""On a GPU: `pytest -m gpu`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels.block_index import (
    BlockIndex,
    block_index,
    flat,
    gather,
    is_whole,
    scatter,
    unflat,
    whole_of,
)
from kernels.cuda import block_conv2d, block_linear
from kernels.cuda.blocks import SIZES
from kernels.cuda.rounding import precision
from kernels.window import Window
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
WINDOWS = [  # kernel, stride, padding, dilation
    Window((3, 3), (1, 1), (1, 1), (1, 1)),
    Window((3, 3), (2, 2), (1, 1), (1, 1)),
    Window((1, 1), (1, 1), (0, 0), (1, 1)),
    Window((1, 1), (2, 2), (0, 0), (1, 1)),
    Window((1, 1), (1, 1), (1, 2), (1, 1)),
    Window((3, 2), (1, 2), (4, 3), (2, 1)),  # padding may be more than the kernel reaches
    Window((5, 5), (3, 3), (2, 2), (2, 2)),
]
PLAIN = WINDOWS[0]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PyTorch is taken, it rounds float32 to TF32 and adds in any order, by its switches."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our kernels are taken, also where a dense product was faster."""
    for module in (block_linear, block_conv2d):
        monkeypatch.setattr(module, "pays", lambda *_, **__: True)


def take_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of itself it adds in one order."""
    for module in (block_linear, block_conv2d):
        monkeypatch.setattr(module, "pays", lambda *_, **__: False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated is NaN until it is written to."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def drawn(
    grid: tuple[int, int],
    block: tuple[int, int],
    window: Window,
    density: float,
    dtype: torch.dtype,
) -> tuple[Tensor, BlockIndex]:
    """Values of which a row of blocks is full, one is empty, and their index."""
    mask = torch.rand(*grid, *window.kernel, device="cuda") < density
    mask[0], mask[1] = True, False
    index = block_index(flat(mask), block, window.taps)
    values = torch.randn(len(index.columns), *block, device="cuda") / index.in_features**0.5
    return values.to(dtype), index


def images(dtype: torch.dtype, *shape: int) -> Tensor:
    x = torch.randn(shape, device="cuda").to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def layer(dtype: torch.dtype = torch.bfloat16, held: bool = False) -> kernels.BlockConv2d:
    values, index = drawn((4, 4), (64, 64), PLAIN, 0.3, dtype)
    values = whole_of(values, index) if held else values
    return kernels.BlockConv2d(PLAIN, index, values, torch.randn(256, device="cuda").to(dtype))


def near(y: Tensor, true: Tensor, bound: float) -> bool:
    return bool((y.double() - true).norm() <= bound * true.norm())


def of_layer(index: BlockIndex, window: Window) -> tuple[Any, ...]:
    walk = (window.kernel, *window.pairs)
    return (index.lists, index.groups, index.out_features, *walk)


def gradients(
    x: Tensor, values: Tensor, bias: Tensor | None, index: BlockIndex, window: Window, grad: Tensor
) -> list[Tensor]:
    """The output, and the gradients of x, values and bias."""
    given = [part.detach().requires_grad_() for part in (x, values, bias) if part is not None]
    own = x.dtype in NARROW and set(index.block) <= set(SIZES)  # PyTorch refuses to be asked so
    own = own and block_linear.pays(index, x.dtype, 1) and not is_whole(values)
    with poisoned() if own else nullcontext():
        to = given[2] if bias is not None else None
        y = ops.block_conv2d(given[0], given[1], to, *of_layer(index, window))
        return [y.detach(), *torch.autograd.grad(y, given, grad)]


def check(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: BlockIndex,
    window: Window,
    bound: float | None = None,
) -> None:
    """Against float64 on what the kernels are given, twice: bit-equal; values may be whole."""
    blocks = gather(scatter(values, index), index)
    wide = [part.double().requires_grad_() for part in (x, blocks, bias) if part is not None]
    weight = unflat(scatter(wide[1], index), window.kernel)
    true = F.conv2d(wide[0], weight, wide[2] if bias is not None else None, *window.pairs)
    grad = torch.randn(true.shape, device="cuda").to(x.dtype)
    found = gradients(x, values, bias, index, window, grad)
    again = gradients(x, values, bias, index, window, grad)
    wanted = [true.detach(), *torch.autograd.grad(true, wide, grad.double())]
    if is_whole(values):
        wanted[2] = whole_of(wanted[2], index)
        assert not found[2][wanted[2] == 0].any()
    for i, (mine, same, its) in enumerate(zip(found, again, wanted, strict=True)):
        assert mine.dtype is x.dtype and mine.shape == its.shape
        assert i > 1 or mine.is_contiguous(memory_format=torch.channels_last)
        assert not mine.isnan().any() and torch.equal(mine, same)
        error = (mine.double() - its).norm() / its.norm().clamp(min=1e-30)
        assert error <= (bound or BOUND[x.dtype]), (i, float(error))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [(1, 7, 9), (5, 12, 18), (63, 8, 6), (40, 28, 28)])
def test_any_window(size: tuple[int, int, int], dtype: torch.dtype, window: Window) -> None:
    torch.manual_seed(size[0])
    values, index = drawn((3, 5), (64, 32), window, 0.4, dtype)
    x = images(dtype, size[0], index.channels, *size[1:])
    check(x, values, None, index, window)
    check(x, values, torch.randn(index.out_features, device="cuda").to(dtype), index, window)


@pytest.mark.parametrize("window", [w for w in WINDOWS if w.dilation == (1, 1)])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [(1, 7, 9), (40, 28, 28)])
def test_where_dense_is_faster(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    window: Window,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_dense(monkeypatch)
    values, index = drawn((3, 5), (64, 32), window, 0.8, dtype)
    x = images(dtype, size[0], index.channels, *size[1:])
    check(x, values, None, index, window)
    check(x, values, torch.randn(index.out_features, device="cuda").to(dtype), index, window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [(1, 7, 9), (40, 28, 28)])
def test_values_held_whole(
    size: tuple[int, int, int],
    dtype: torch.dtype,
    window: Window,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take_dense(monkeypatch)
    values, index = drawn((3, 5), (64, 32), window, 0.8, dtype)
    values, x = whole_of(values, index), images(dtype, size[0], index.channels, *size[1:])
    check(x, values, None, index, window)
    check(x, values, torch.randn(index.out_features, device="cuda").to(dtype), index, window)


@pytest.mark.parametrize(
    ("block", "dtype"), [((24, 10), torch.float32), ((64, 32), torch.float64)]
)
@pytest.mark.parametrize("count", [0, 7])
def test_values_held_whole_that_no_kernel_takes(
    count: int, block: tuple[int, int], dtype: torch.dtype
) -> None:
    values, index = drawn((6, 5), block, PLAIN, 0.4, dtype)
    x = images(dtype, count, index.channels, 9, 9)
    check(x, whole_of(values, index), None, index, PLAIN)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("images_of", [9, 64])
def test_any_block(images_of: int, dtype: torch.dtype, block: tuple[int, int]) -> None:
    for window in (PLAIN, WINDOWS[1]):
        values, index = drawn((3, 4), block, window, 0.4, dtype)
        check(images(dtype, images_of, index.channels, 14, 16), values, None, index, window)


@pytest.mark.parametrize("window", WINDOWS[:4])
@pytest.mark.parametrize("block", [64, 128])
def test_large_weights(block: int, window: Window) -> None:
    values, index = drawn(
        (512 // block, 512 // block), (block, block), window, 0.1, torch.bfloat16
    )
    check(images(torch.bfloat16, 64, 512, 14, 14), values, None, index, window)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64])
@pytest.mark.parametrize("window", WINDOWS[:4])
def test_no_block_every_block_no_images(
    window: Window, dtype: torch.dtype, density: float
) -> None:
    mask = torch.full((3, 4 * window.taps), density > 0, device="cuda")
    index = block_index(mask, (64, 32), window.taps)
    values = torch.randn(len(index.columns), 64, 32, device="cuda").to(dtype)
    for count in (3, 64, 0):
        check(images(dtype, count, 128, 6, 8), values, None, index, window)


def test_blocks_that_no_kernel_takes() -> None:
    values, index = drawn((6, 5), (24, 10), PLAIN, 0.4, torch.float32)
    check(images(torch.float32, 7, 50, 9, 9), values, None, index, PLAIN)


@pytest.mark.parametrize("window", WINDOWS[:4])
def test_inputs_may_lie_anyhow(window: Window) -> None:
    values, index = drawn((4, 6), (32, 16), window, 0.4, torch.float16)
    x = torch.randn(5, 98, 9, 14, device="cuda").half()
    check(x[:, 1:97, :, ::2], values, None, index, window)
    check(x[:, :96, :1, :1], values, None, index, window)
    odd = torch.randn(96 * 5 * 9 * 9 + 1, device="cuda").half()[1:]  # from an odd place on
    check(odd.view(5, 9, 9, 96).permute(0, 3, 1, 2), values, None, index, window)
    net = kernels.BlockConv2d(window, index, values)
    y = net(x[:, :96])
    y.sum().backward()  # its gradient is one number, expanded
    assert net.values.grad is not None
    ones = torch.ones_like(y)
    walk = (window.kernel, *window.pairs)
    lists = (index.lists, index.groups, index.block)
    true = ops.block_conv2d_weight_grad(ones, x[:, :96].contiguous(), *lists, *walk)
    assert torch.equal(net.values.grad, true)


@pytest.mark.parametrize("window", WINDOWS[:4])
def test_tf32_where_pytorch_takes_it(window: Window) -> None:
    values, index = drawn((4, 4), (64, 64), window, 0.3, torch.float32)
    x = images(torch.float32, 33, 256, 8, 8)
    check(x, values, None, index, window)
    exact = ops.block_conv2d(x, values, None, *of_layer(index, window))
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert precision() == "tf32"
        check(x, values, None, index, window, 1e-3)
        assert not torch.equal(exact, ops.block_conv2d(x, values, None, *of_layer(index, window)))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("way", ["blocks", "dense", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "dense":
        take_dense(monkeypatch)
    net, x = (
        layer(torch.float32, way == "whole"),
        images(torch.float32, 9, 256, 8, 8).requires_grad_(),
    )
    with torch.autocast("cuda", dtype):
        y, true = net(x), F.conv2d(x, net.weight(), net.bias, *PLAIN.pairs)
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


@pytest.mark.parametrize("way", ["blocks", "dense", "whole"])
@pytest.mark.parametrize("room", [False, True])
def test_a_captured_step_is_the_step(
    room: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "dense":
        take_dense(monkeypatch)
    net, x = layer(held=way == "whole"), images(torch.bfloat16, 64, 256, 8, 8).requires_grad_()
    captured.check(net, x, room, False, monkeypatch)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # torch's own, too
def test_it_compiles_as_one_graph(held: bool, mode: str) -> None:
    net, x = layer(held=held), images(torch.bfloat16, 64, 256, 8, 8)
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


@pytest.mark.parametrize(("kept", "held"), [(0.85, True), (0.1, False)])
def test_a_layer_where_dense_trains_faster_is_held_whole(kept: float, held: bool) -> None:
    conv = nn.Conv2d(256, 256, 3, padding=1, device="cuda", dtype=torch.bfloat16)
    mask = torch.rand(4, 4, 3, 3) < kept
    net = kernels.BlockConv2d.of(conv, (64, 64), mask, 64 * 28 * 28)
    assert is_whole(net.values) == held
    x = images(torch.bfloat16, 5, 256, 9, 9)
    y = net(x)
    assert near(y, F.conv2d(x, net.weight(), net.bias, padding=1).double(), 4e-3)
    y.float().square().mean().backward()
    torch.optim.AdamW(net.parameters(), lr=0.1).step()
    zeros = ~mask.repeat_interleave(64, 0).repeat_interleave(64, 1).cuda()
    raw = unflat(scatter(net.values.detach(), net.index), (3, 3))  # weight() is masked anyhow
    assert not raw[zeros].any()


def test_a_layer_moves() -> None:
    conv = nn.Conv2d(128, 128, 3, padding=1)
    net = kernels.BlockConv2d.of(conv, (64, 64), torch.rand(2, 2, 3, 3) < 0.5)
    x = torch.randn(7, 128, 6, 6)
    y = net(x)
    for place in (f"cuda:{torch.cuda.device_count() - 1}", "cuda:0", "cpu"):
        net = net.to(place)
        assert net.index.groups.device == torch.device(place)
        found = net(x.to(place))
        assert near(found.cpu(), y.double(), 1e-5)
        found.sum().backward()


def test_devices_may_not_be_mixed() -> None:
    values, index = drawn((4, 4), (16, 16), PLAIN, 0.5, torch.float32)
    x = images(torch.float32, 2, 64, 5, 5)
    with pytest.raises(ValueError, match="lists and groups must be contiguous int32 on cuda"):
        ops.block_conv2d(x, values, None, *of_layer(index.to("cpu"), PLAIN))
    with pytest.raises(ValueError, match="values must be"):
        ops.block_conv2d(x, values.cpu(), None, *of_layer(index, PLAIN))


@pytest.mark.parametrize("window", WINDOWS[:2])
def test_gradients_are_those_of_differences_twice(window: Window) -> None:
    values, index = drawn((2, 2), (16, 32), window, 0.4, torch.float64)
    x = torch.randn(2, 64, 4, 5, device="cuda").double().requires_grad_()

    def call(x: Tensor, values: Tensor) -> Tensor:
        return ops.block_conv2d(x, values, None, *of_layer(index, window))

    given = (x, values.requires_grad_())
    assert torch.autograd.gradcheck(call, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, given, fast_mode=True)
