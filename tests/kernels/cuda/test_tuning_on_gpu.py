"""On a GPU: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels import measured
from kernels.cuda import blob, clock, conv2d, linear, table
from kernels.cuda.rounding import bound
from kernels.window import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def masked(size: int, block: int, share: float, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    side = size // block
    order = torch.rand(side * side, device="cuda").argsort().argsort().view(side, side)
    mask = (order < share * side * side).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (torch.randn(size, size, device="cuda") / size**0.5 * mask).to(dtype)


def assert_right(x: Tensor, packed: kernels.Packed, weight: Tensor) -> None:
    y = torch.ops.sparse_nas.sparse_linear(x, packed.data, None, len(weight)).double()
    true = F.linear(x.double(), weight.double())
    assert (y - true).norm() <= BOUND[x.dtype] * true.norm()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("tokens", [1, 16, 50, 3000])
@pytest.mark.parametrize(("block", "share"), [(64, 0.1), (64, 0.5), (1, 0.1), (1, 1.0)])
def test_every_kernel_that_takes_a_case_is_right_and_the_fastest_is_chosen(
    block: int, share: float, tokens: int, dtype: torch.dtype
) -> None:
    weight = masked(512, block, share, dtype)
    packed, x = kernels.pack_linear(weight), torch.randn(tokens, 512, device="cuda").to(dtype)
    us, blocks = kernels.tune(packed, x), blob.read(packed.data)
    assert us.keys() == {name for name in linear.KERNELS if linear.takes(name, blocks, x)}
    assert min(us.values()) > 0
    assert linear.chosen(blocks, x) == min(us, key=us.__getitem__)
    assert_right(x, packed, weight)
    for name in us:  # whichever is chosen, it is right
        table.put(blocks, table.bucket(tokens), name)
        assert linear.chosen(blocks, x) == name
        assert_right(x, packed, weight)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("kernel", "share"), [(3, 0.1), (3, 0.6), (1, 0.1)])
def test_a_convolution_is_tuned(kernel: int, share: float, dtype: torch.dtype) -> None:
    flat = masked(256, 64, share, dtype)
    weight = flat.view(256, 256, 1, 1).repeat(1, 1, kernel, kernel) / kernel
    packed, walk = kernels.pack_conv2d(weight), ((1, 1), (kernel // 2,) * 2, (1, 1))
    x = torch.randn(5, 256, 14, 14, device="cuda").to(dtype)
    us = kernels.tune(packed, x, stride=walk[0], padding=walk[1], dilation=walk[2])
    blocks = blob.read(packed.data)
    tokens = linear.aligned(conv2d.pixels(x))
    of_pixels = {name for name in linear.KERNELS if linear.takes(name, blocks, tokens)}
    assert us.keys() == (set(conv2d.takers(blocks)) if kernel > 1 else of_pixels)
    window = Window((kernel, kernel), *walk)
    out = conv2d.shape_of(blocks, x, window)
    assert conv2d.name(blocks, x, out, window) == min(us, key=us.__getitem__)
    true = F.conv2d(x.double(), weight.double(), None, *walk)
    for name in us if kernel > 1 else ():
        table.put(blocks, conv2d.key(x, window), name)
        assert conv2d.chosen(blocks, x, out, window) == name
        y = torch.ops.sparse_nas.sparse_conv2d(
            x, packed.data, None, 256, (kernel, kernel), *walk, 1
        )
        assert (y.double() - true).norm() <= bound(dtype, True) * true.norm()


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_NAS_MEASURED", "on")
    monkeypatch.setenv("SPARSE_NAS_CACHE", str(tmp_path))
    measured._times.cache_clear()
    weight, x = masked(512, 64, 0.5, torch.bfloat16), torch.randn(8, 512, device="cuda").bfloat16()
    us = kernels.tune(kernels.pack_linear(weight), x)
    measured._times.cache_clear()  # as in another process
    late = blob.read(kernels.pack_linear(weight).data)
    case = table.linear_case(late, 7)
    assert table.fastest(late, table.bucket(7), lambda: case) == min(us, key=us.__getitem__)
    assert kernels.tune(kernels.pack_linear(weight), x) == us
    measured._times.cache_clear()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_tuned_weight_is_captured_and_replayed(share: float) -> None:
    weight = masked(512, 64, share, torch.bfloat16)
    packed, x = kernels.pack_linear(weight), torch.randn(300, 512, device="cuda").bfloat16()
    kernels.tune(packed, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.sparse_nas.sparse_linear(x, packed.data, None, 512)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, torch.ops.sparse_nas.sparse_linear(x, packed.data, None, 512))


def test_a_replayed_call_does_what_the_call_did() -> None:
    x, y = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    call = clock.replayed(lambda: y.add_(x))
    assert call.__name__ == "replay"
    before = y.clone()
    call()
    torch.cuda.synchronize()
    assert torch.equal(y, before + 1)
    assert clock.seconds(call, 3) > 0 and clock.seconds(call, 3, cold=True) > 0


def test_a_call_that_waits_for_the_device_is_called_itself() -> None:
    x = torch.ones(4, device="cuda")

    def waits() -> float:
        return float(x.sum())

    assert clock.replayed(waits) is waits
    assert waits() == 4.0
    assert clock.replayed(lambda: x.sum()) is not None  # and the next can be captured
    assert clock.in_turn_us([waits, lambda: x.add_(0)], 3)[1] > 0
