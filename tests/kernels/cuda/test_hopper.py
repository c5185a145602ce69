"""On a GPU of compute capability 9.0: `pytest -m gpu`; how tiles are shared out, anywhere."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.cuda import blob, hopper, pack
from kernels.cuda.linear import chosen, compute
from kernels.reference import activate
from tests.kernels.cuda.test_linear import BOUND, masked

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a CUDA device of 9.0",
)
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


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 63, 256, 257, 600, 1000])
def test_ragged_tokens(tokens: int, dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(tokens)
    weight = masked(640, 896, (128, width), 0.3, dtype)
    weight[:128, :width] = 1 / 32  # some block there is
    x = torch.randn(tokens, 896, device="cuda", dtype=dtype)
    bias = torch.randn(640, device="cuda")
    check(x, weight, None, "none")
    for activation in ACTIVATIONS:
        check(3 * x, weight, bias, activation)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_more_tiles_than_run_at_once(density: float, width: int) -> None:
    """Rows of 0 to 128 blocks; the last wave is not full."""
    torch.manual_seed(0)
    weight = masked(4096, 8192, (128, width), density, torch.bfloat16)
    weight[128:512] = 0
    weight[512:640] = torch.randn(128, 8192, device="cuda") / 90
    x, bias = torch.randn(5000, 8192, device="cuda").bfloat16(), torch.randn(4096, device="cuda")
    check(x, weight, None, "none")
    check(x, weight, bias, "gelu")


@pytest.mark.gpu
@on_hopper
def test_rows_without_blocks_are_the_bias() -> None:
    weight = masked(256, 256, (128, 128), 0, torch.float16)
    weight[:128, :128] = 0.1
    x, bias = torch.randn(300, 256, device="cuda").half(), torch.randn(256, device="cuda")
    check(x, weight, bias, "silu")
    nothing = blob.read(kernels.pack_linear(torch.zeros_like(weight)).data)
    assert not hopper.takes(nothing, x)


@pytest.mark.gpu
@on_hopper
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
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # of other tokens than any before
        assert chosen(blob.read(packed.data), torch.cat([x, x])) == "many"
    residual = torch.randn_like(y)
    added = linear.residual(x, packed.data, None, residual, 4096, "relu")
    torch.testing.assert_close(added, torch.relu(y + residual), rtol=2e-2, atol=2e-2)


@on_hopper
@pytest.mark.gpu
def test_a_graph_outlives_a_weight_that_is_written_to() -> None:
    weight = masked(4096, 2048, (128, 128), 0.2, torch.bfloat16)
    packed = kernels.pack_linear(weight)
    other = kernels.pack_linear(weight.roll((128, 128), (0, 1)))
    x, linear = (
        torch.randn(8192, 2048, device="cuda").bfloat16(),
        torch.ops.sparse_nas.sparse_linear,
    )
    linear(x, packed.data, None, 4096)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, packed.data, None, 4096)
    plan = blob.read(packed.data).plans[32][-1]
    packed.data.copy_(other.data)
    blob.read(packed.data)
    filled = [torch.full_like(plan, -1) for _ in range(64)]  # where it would lie, were it freed
    graph.replay()
    assert torch.equal(y, linear(x, packed.data, None, 4096)) and len(filled) == 64
    assert blob.read(packed.data).plans[32][-1].data_ptr() == plan.data_ptr()


@pytest.mark.parametrize(
    ("lines", "tiles", "among", "near"), [(64, 32, 132, 4), (7, 3, 132, 1), (33, 40, 10, 4)]
)
def test_tiles_are_shared_out(lines: int, tiles: int, among: int, near: int) -> None:
    """All of them once, in an order that brings neighbours, and none has much more than others."""
    torch.manual_seed(0)
    steps = torch.randint(0, 12, (lines,)).tolist()
    shares = hopper.share_out(steps, tiles, among, near)
    assert len(shares) == min(among, lines * tiles)
    assert sorted(tile for share in shares for tile in share) == list(range(lines * tiles))
    for share in shares:
        groups = [tile // lines // near for tile in share]
        assert groups == sorted(groups)
    times = [sum(steps[tile % lines] + 2 for tile in share) for share in shares]
    assert max(times) - min(times) <= max(steps) + 2


def test_plans_are_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    card = SimpleNamespace(multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    weight = torch.zeros(1024, 512).half()
    weight[:256, :256] = 1
    data, x = pack.pack_linear(weight).data, torch.empty(1000, 512)
    first = hopper._plan(blob.read(data), x)
    assert first.shape == (7, 8) and sorted(first[first >= 0].tolist()) == list(range(32))
    before = first.clone()
    data.copy_(pack.pack_linear(weight.roll(256, 0)).data)
    again = hopper._plan(blob.read(data), x)
    assert again is first and not torch.equal(again, before)
    assert len(blob.read(data).plans[4]) == 1 and blob._met[data][2] == []
