"""On a GPU of compute capability 9.0: `pytest -m gpu`."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.cuda import blob, hopper
from kernels.cuda.linear import chosen, compute
from kernels.reference import activate
from tests.kernels.cuda.test_linear import BOUND, masked

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a CUDA device of 9.0",
    ),
]
ACTIVATIONS = ["none", "relu", "relu6", "silu", "gelu"]


def check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """Against float64 on what the kernel was given, twice: bit-equal."""
    blocks = blob.read(kernels.pack_linear(weight).data)
    assert hopper.takes(blocks, x)
    compute("hopper", blocks, x, bias, activation)
    poison = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype, device="cuda")
    del poison  # the allocator gives its memory to y
    y = compute("hopper", blocks, x, bias, activation)
    wide = None if bias is None else bias.double()
    true = activate(F.linear(x.double(), weight.double(), wide), activation)
    error = (y.double() - true).norm() / true.norm().clamp(min=1e-30)
    assert not y.isnan().any() and error < BOUND[x.dtype], float(error)
    assert torch.equal(y, compute("hopper", blocks, x, bias, activation))


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 63, 256, 257, 1000])
def test_ragged_tokens(tokens: int, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(tokens)
    weight = masked(640, 896, (128, width), 0.3, dtype)
    weight[:128, :width] = 1 / 32  # some block there is
    x = torch.randn(tokens, 896, device="cuda", dtype=dtype)
    bias = torch.randn(640, device="cuda")
    check(x, weight, None, "none")
    for activation in ACTIVATIONS:
        check(3 * x, weight, bias, activation)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_more_tiles_than_run_at_once(density: float, width: int) -> None:
    """Rows of 0 to 128 blocks; the last wave is not full."""
    torch.manual_seed(0)
    weight = masked(4096, 8192, (128, width), density, torch.bfloat16)
    weight[128:512] = 0
    weight[512:640] = torch.randn(128, 8192, device="cuda") / 90
    check(torch.randn(5000, 8192, device="cuda").bfloat16(), weight, None, "none")


def test_rows_without_blocks_are_the_bias() -> None:
    weight = masked(256, 256, (128, 128), 0, torch.float16)
    weight[:128, :128] = 0.1
    x, bias = torch.randn(300, 256, device="cuda").half(), torch.randn(256, device="cuda")
    check(x, weight, bias, "silu")
    nothing = blob.read(kernels.pack_linear(torch.zeros_like(weight)).data)
    assert not hopper.takes(nothing, x)


def test_it_is_taken_and_replayed() -> None:
    weight = masked(4096, 2048, (128, 128), 0.2, torch.bfloat16)
    packed = kernels.pack_linear(weight)
    x, linear = (
        torch.randn(8192, 2048, device="cuda").bfloat16(),
        torch.ops.sparse_nas.sparse_linear,
    )
    assert chosen(blob.read(packed.data), x) == "hopper"
    assert chosen(blob.read(packed.data), x[:4096]) == "many"
    linear(x, packed.data, None, 4096)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, packed.data, None, 4096)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, linear(x, packed.data, None, 4096))
    residual = torch.randn_like(y)
    added = linear.residual(x, packed.data, None, residual, 4096, "relu")
    torch.testing.assert_close(added, torch.relu(y + residual), rtol=2e-2, atol=2e-2)
