"""Two of every four by halves.cu: how they are stored, anywhere; on a GPU of 9.0 what it gives."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.cuda import blob, halves, pack, table
from kernels.cuda.linear import aligned, chosen, compute
from kernels.reference import activate
from tests.kernels.cuda.test_linear import BOUND

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a CUDA device of 9.0",
)


def two_of_four(rows: int, channels: int, device: str = "cuda") -> Tensor:
    torch.manual_seed(rows + channels)
    weight = torch.randn(rows, channels, device=device)
    order = torch.rand(rows, channels // 4, 4, device=device).argsort(2)
    return weight * (order < 2).view(rows, channels)


def whole(found: Tensor, rows: int, channels: int, dtype: torch.dtype) -> Tensor:
    """The weight, by what halves.cu says of each word and lane, one by one."""
    count = rows * channels // 4
    kept = found[:count].view(dtype).view(rows, channels // 2)
    words = found[count:].view(rows // 128, channels // 64, 8, 32)
    weight = torch.zeros(rows, channels, dtype=dtype)
    for line, step, warp, lane in torch.cartesian_prod(*map(torch.arange, words.shape)).tolist():
        word = int(words[line, step, warp, lane]) & 0xFFFFFFFF
        for eighth in range(8):
            row = line * 128 + warp * 16 + lane // 4 + 8 * (eighth // 4)
            column = step * 64 + lane % 4 * 16 + eighth % 4 * 4
            for turn in range(2):
                place = word >> (4 * eighth + 2 * turn) & 3
                weight[row, column + place] += kept[row, column // 2 + turn]
    return weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_they_are_stored_as_described(dtype: torch.dtype) -> None:
    weight = two_of_four(256, 128, "cpu").to(dtype)
    weight[3, 4:8], weight[4, 4:8], weight[5, 4:8] = 0, torch.tensor([0, 0, 7, 0]), 0
    found = halves.halved(weight)
    assert found is not None and torch.equal(whole(found, 256, 128, dtype), weight)


def test_more_than_two_of_four_are_refused() -> None:
    weight = two_of_four(128, 256, "cpu").half()
    weight[77, 100:104] = torch.tensor([1, 0, 2, 3])
    assert halves.halved(weight) is None


def test_what_a_graph_may_read_is_written_over_or_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(halves, "compressed", halves.halved)
    weight = two_of_four(256, 256, "cpu").half()
    weight[0, :8] = torch.tensor([1, 2, 0, 0, 3, 0, 4, 0])
    data = pack.pack_linear(weight).data
    first = blob.read(data).halves
    assert first is not None and torch.equal(whole(first, 256, 256, weight.dtype), weight)
    assert "2:4" in table.linear_case(blob.read(data), 2048)  # no other weight shares its times
    other = weight.roll(128, 0)
    data.copy_(pack.pack_linear(other).data)
    assert blob.read(data).halves is first
    assert torch.equal(whole(first, 256, 256, weight.dtype), other)
    weight[0, :8] = torch.tensor([1, 0, 0, 0, 3, 2, 4, 0])  # as many bytes
    data.copy_(pack.pack_linear(weight).data)
    assert blob.read(data).halves is None
    assert bool(first[: 256 * 64].view(weight.dtype).isnan().all())
    data.copy_(pack.pack_linear(other).data)  # two of every four again: a graph is right again
    assert blob.read(data).halves is first
    assert torch.equal(whole(first, 256, 256, weight.dtype), other)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> None:
    """Against float64 on what the kernel was given, twice: bit-equal."""
    blocks, x = blob.read(kernels.pack_linear(weight).data), aligned(x)
    assert halves.takes(blocks, x)
    code = ["none", "relu", "relu6", "silu", "gelu"].index(activation)
    wide = None if bias is None else bias.double()
    true = activate(F.linear(x.double(), weight.double(), wide), activation)
    halves.linear(blocks, x, bias, code)
    poison = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype, device="cuda")
    del poison  # the allocator gives its memory to y
    y = halves.linear(blocks, x, bias, code)
    error = (y.double() - true).norm() / true.norm().clamp(min=1e-30)
    assert not y.isnan().any() and error < BOUND[x.dtype], float(error)
    assert torch.equal(y, halves.linear(blocks, x, bias, code))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 63, 256, 257, 1000])
@pytest.mark.parametrize("shape", [(128, 256), (256, 320), (768, 1088)])
def test_ragged_tokens(tokens: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = two_of_four(*shape).to(dtype)
    x = torch.randn(tokens, shape[1], device="cuda", dtype=dtype)
    check(x, weight, None, "none")
    for activation in ("none", "relu", "relu6", "silu", "gelu"):
        check(x, weight, torch.randn(shape[0], device="cuda"), activation)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("channels", [256, 512])  # as few as can be
def test_more_tiles_than_run_at_once(channels: int) -> None:
    weight, bias = two_of_four(2176, channels).bfloat16(), torch.randn(2176, device="cuda")
    x = torch.randn(9000, channels, device="cuda").bfloat16()
    check(x, weight, bias, "gelu")
    check(x, weight, None, "none")


@pytest.mark.gpu
@on_hopper
def test_it_is_taken_and_replayed() -> None:
    weight = two_of_four(2048, 1024).half()
    packed, linear = kernels.pack_linear(weight), torch.ops.sparse_nas.sparse_linear
    x, bias = torch.randn(2000, 1024, device="cuda").half(), torch.randn(2048, device="cuda")
    assert chosen(blob.read(packed.data), x) == "halves"
    linear(x, packed.data, bias, 2048, "relu")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = linear(x, packed.data, bias, 2048, "relu")
    other = weight.roll(16, 0)  # as many bytes: tiles keep what they have
    packed.data.copy_(kernels.pack_linear(other).data)
    again = compute("halves", blob.read(packed.data), x, bias, "relu")
    graph.replay()
    assert torch.equal(y, again)
    true = F.linear(x.double(), other.double(), bias.double()).relu()
    assert (y.double() - true).norm() < BOUND[x.dtype] * true.norm()
