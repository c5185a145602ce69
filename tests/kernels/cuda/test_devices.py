"""On a machine with two GPUs: `pytest -m gpu`; the one that is current is another one."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels.cuda import blob, linear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
OTHER = "cuda:1"
NOT_9 = torch.cuda.device_count() < 2 or torch.cuda.get_device_capability(OTHER) != (9, 0)


def masked(rows: int, channels: int, block: int, share: float) -> Tensor:
    torch.manual_seed(0)
    mask = torch.rand(rows // block, channels // block, device=OTHER) < share
    mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (torch.randn(rows, channels, device=OTHER) / channels**0.5 * mask).bfloat16()


def assert_near(y: Tensor, true: Tensor) -> None:
    assert y.device == torch.device(OTHER) and torch.cuda.current_device() == 0
    assert (y.double() - true).norm() <= 6e-3 * true.norm()


@pytest.mark.parametrize(
    ("tokens", "size", "block", "kernel"),
    [
        (16, 512, 64, "few"),
        (2048, 2048, 64, "many"),
        (8192, 4096, 128, "hopper"),
        (1, 4096, 1, "entries"),
        (16, 512, 1, "expand"),
        (300, 512, 1, "dense"),
        (2048, 4096, 2, "two_of_four" if NOT_9 else "halves"),
    ],
)
def test_kernels_of_another_device(tokens: int, size: int, block: int, kernel: str) -> None:
    if kernel == "hopper" and NOT_9:
        pytest.skip("needs a CUDA device of 9.0")
    weight = masked(size, size, max(1, block), 0.2)
    if block == 2:
        weight = torch.randn_like(weight).view(size, -1, 2, 2) * torch.tensor([1, 0]).to(weight)
        weight = weight.reshape(size, size) / size**0.5
    x = torch.randn(tokens, size, device=OTHER).bfloat16()
    packed = kernels.pack_linear(weight)
    assert linear.chosen(blob.read(packed.data), x) == kernel
    true = F.linear(x.double(), weight.double())
    for _ in range(2):
        assert_near(torch.ops.sparse_nas.sparse_linear(x, packed.data, None, size), true)
    assert kernel in kernels.tune(packed, x, anew=True)


def test_a_convolution_on_another_device() -> None:
    weight = masked(256, 256, 64, 0.3).view(256, 256, 1, 1).repeat(1, 1, 3, 3)
    x = torch.randn(4, 256, 14, 14, device=OTHER).bfloat16()
    packed = kernels.pack_conv2d(weight)
    walk = ((1, 1), (1, 1), (1, 1))
    true = F.conv2d(x.double(), weight.double(), None, *walk)
    y = torch.ops.sparse_nas.sparse_conv2d(x, packed.data, None, 256, (3, 3), *walk, 1)
    assert_near(y, true)
    assert "implicit" in kernels.tune(packed, x, padding=(1, 1))


def test_training_on_another_device() -> None:
    dense = nn.Linear(256, 256).to(OTHER, torch.bfloat16)
    dense.weight.data.copy_(masked(256, 256, 64, 0.3))
    net = kernels.BlockLinear.of(dense)
    x = torch.randn(64, 256, device=OTHER).bfloat16().requires_grad_()
    y = net(x)
    y.sum().backward()
    assert x.grad is not None and net.values.grad is not None
    assert_near(y, F.linear(x.double(), dense.weight.double(), dense.bias.double()))
    assert_near(x.grad, torch.ones_like(y).double() @ dense.weight.double())


@pytest.mark.parametrize("block", [64, 1])
def test_a_weight_that_moves_in_place(block: int) -> None:
    """As `module.to` moves a parameter: the same tensor, elsewhere."""
    weight = masked(512, 512, block, 0.3)
    held = nn.Parameter(kernels.pack_linear(weight).data, requires_grad=False)
    for place in (OTHER, "cuda:0", OTHER):
        held.data = held.data.to(place)
        x = torch.randn(100, 512, device=place).bfloat16()
        y = torch.ops.sparse_nas.sparse_linear(x, held, None, 512)
        true = F.linear(x.double(), weight.to(place).double())
        assert (y.double() - true).norm() <= 6e-3 * true.norm()
        blocks = blob.read(held)
        assert {t.device for t in (blocks.order, blocks.values)} == {torch.device(place)}
