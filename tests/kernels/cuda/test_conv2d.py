"""Convolutions on a GPU: `pytest -m gpu`."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.cuda import blob
from kernels.cuda.conv2d import chosen
from kernels.reference import activate
from kernels.window import Window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

conv2d = torch.ops.sparse_nas.sparse_conv2d


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where dense is taken, PyTorch may round float32 to TF32, by its own switch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


BOUND = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
WALKS = [  # stride, padding, dilation, kernel
    ((1, 1), (1, 1), (1, 1), (3, 3)),
    ((2, 2), (1, 1), (1, 1), (3, 3)),
    ((1, 1), (0, 0), (1, 1), (1, 1)),
    ((2, 2), (0, 0), (1, 1), (1, 1)),
    ((1, 2), (0, 3), (2, 1), (3, 2)),
    ((3, 3), (2, 2), (2, 2), (5, 5)),
]


def masked(shape: tuple[int, ...], block: tuple[int, int], density: float, dtype: Any) -> Tensor:
    rows, channels, *kernel = shape
    grid = torch.rand(rows // block[0], channels // block[1], *kernel, device="cuda") < density
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (torch.randn(shape, device="cuda") / channels**0.5 * mask).to(dtype)


def check(x: Tensor, weight: Tensor, bias: Any, walk: Any, activation: str = "none") -> Tensor:
    """Against float64 on what the kernel was given, twice: bit-equal."""
    stride, padding, dilation, groups = (*walk, 1)[:4]
    packed = kernels.pack_conv2d(weight, groups)
    size = list(weight.shape[2:])
    rest = (packed.data, bias, len(weight), size, stride, padding, dilation, groups, activation)
    y = conv2d(x, *rest)
    poison = torch.full_like(y, float("nan"))
    del y, poison  # the allocator gives its memory to y
    y, again = conv2d(x, *rest), conv2d(x, *rest)
    wide = None if bias is None else bias.double()
    true = F.conv2d(x.double(), weight.double(), wide, stride, padding, dilation, groups)
    true = activate(true, activation)
    assert y.dtype == x.dtype and y.shape == true.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, again)
    error = (y.double() - true).norm() / true.norm().clamp(min=1e-30)
    assert not y.isnan().any() and error < BOUND[x.dtype], float(error)
    return y


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("size", [(1, 7, 9), (5, 12, 18), (40, 28, 28)])
def test_any_walk(size: Any, walk: Any) -> None:
    *walks, kernel = walk
    weight = masked((128, 192, *kernel), (64, 32), 0.3, torch.bfloat16)
    x = torch.randn(size[0], 192, *size[1:], device="cuda").bfloat16()
    check(x.contiguous(memory_format=torch.channels_last), weight, None, walks)


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 64), (128, 64), (64, 16)])
@pytest.mark.parametrize("dtype", BOUND)
def test_any_block(dtype: Any, block: Any) -> None:
    weight = masked((128, 192, 3, 3), block, 0.3, dtype)
    x = torch.randn(9, 192, 14, 16, device="cuda", dtype=dtype)
    check(x, weight, torch.randn(128, device="cuda"), WALKS[0][:3], "silu")


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_empty_rows_and_whole_weights(density: float) -> None:
    weight = masked((256, 128, 3, 3), (64, 64), density, torch.bfloat16)
    x = torch.randn(9, 128, 10, 10, device="cuda").bfloat16()
    check(x, weight, torch.randn(256, device="cuda"), WALKS[0][:3], "relu6")


@pytest.mark.parametrize("groups", [2, 64])
def test_groups_and_zeros_anywhere_are_dense(groups: int) -> None:
    x = torch.randn(4, 64, 9, 9, device="cuda").half()
    weight = masked((64, 64 // groups, 3, 3), (1, 1), 0.2, torch.half)
    check(x, weight, None, (*WALKS[0][:3], groups), "gelu")
    packed = kernels.pack_conv2d(weight, groups)
    assert packed.meta["block"] == "dense"
    assert (
        chosen(blob.read(packed.data), x, (4, 64, 9, 9), Window((3, 3), *WALKS[0][:3])) == "dense"
    )
    assert torch.equal(kernels.dense(packed), weight)


@pytest.mark.parametrize("kernel", [1, 3])
def test_whole_channels(kernel: int) -> None:
    weight = torch.randn(96, 32, kernel, kernel, device="cuda").half() / kernel
    weight[torch.rand(96) < 0.6] = 0
    walk = ((2, 2), (kernel // 2,) * 2, (1, 1))
    x = torch.randn(3, 32, 9, 9, device="cuda").half()
    check(x, weight, torch.randn(96, device="cuda"), walk, "silu")
    assert kernels.pack_conv2d(weight).meta["block"] == "channel"


def test_a_1x1_of_few_pixels_and_zeros_anywhere() -> None:
    weight = masked((512, 256, 1, 1), (1, 1), 0.1, torch.half)
    check(torch.randn(1, 256, 1, 1, device="cuda").half(), weight, None, WALKS[2][:3])
    check(torch.randn(1, 256, 4, 5, device="cuda").half(), weight, None, WALKS[2][:3], "relu")


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own
def test_odd_inputs_graphs_and_compile() -> None:
    weight = masked((64, 64, 3, 3), (16, 32), 0.4, torch.float16)
    walk = WALKS[0][:3]
    x = torch.randn(5, 70, 9, 30, device="cuda").half()
    check(x[:, 3:67, :, ::2], weight, None, walk)
    check(x.new_empty(0, 64, 8, 8), weight, None, walk)
    rest = (kernels.pack_conv2d(weight).data, None, 64, (3, 3), *walk, 1, "relu")
    x = torch.randn(5, 64, 8, 8, device="cuda").half()
    true = conv2d(x, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = conv2d(x, *rest)
    graph.replay()
    assert torch.equal(y, true)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, conv2d(x, *rest))
    compiled = torch.compile(lambda t: conv2d(t, *rest) + 1, fullgraph=True)
    assert torch.equal(compiled(x), y + 1)


def test_what_does_not_fit_is_named() -> None:
    weight = masked((64, 96, 3, 3), (16, 32), 0.4, torch.bfloat16)
    data, x = kernels.pack_conv2d(weight).data, torch.randn(2, 96, 5, 5, device="cuda").bfloat16()
    walk = ((1, 1), (1, 1), (1, 1), 1)
    with pytest.raises(ValueError, match=r"packed as \(64, 96, 3, 3\) with groups=1"):
        conv2d(x[:, :64], data, None, 64, (3, 3), *walk)
    with pytest.raises(ValueError, match=r"x must be torch\.bfloat16"):
        conv2d(x.half(), data, None, 64, (3, 3), *walk)
    with pytest.raises(ValueError, match="for sparse_conv2d"):
        torch.ops.sparse_nas.sparse_linear(x, data, None, 64)


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("block", [(1, 1), (64, 64)])
def test_a_residual_is_added_before_the_activation(block: tuple[int, int], walk: Any) -> None:
    *walks, kernel = walk
    weight, bias = masked((128, 64, *kernel), block, 0.2, torch.half), torch.randn(128).cuda()
    x = torch.randn(5, 64, 12, 12, device="cuda").half()
    true = F.conv2d(x.double(), weight.double(), bias.double(), *walks)
    residual = torch.randn(true.shape, device="cuda").half()
    rest = (kernels.pack_conv2d(weight).data, bias, residual, 128, kernel, *walks, 1, "relu")
    y, true = torch.ops.sparse_nas.sparse_conv2d.residual(x, *rest), true + residual.double()
    assert (y.double() - true.relu()).norm() <= BOUND[torch.half] * true.norm()


def test_a_residual_of_one_pixel() -> None:
    weight = masked((64, 64, 3, 3), (64, 64), 0.15, torch.half)
    x, residual = (torch.randn(5, 64, 1, 1, device="cuda").half() for _ in range(2))
    rest = (kernels.pack_conv2d(weight).data, None, residual, 64, (3, 3), *WALKS[0][:3], 1)
    y = torch.ops.sparse_nas.sparse_conv2d.residual(x, *rest)
    true = F.conv2d(x.double(), weight.double(), None, 1, 1) + residual.double()
    assert (y.double() - true).norm() <= BOUND[torch.half] * true.norm()
