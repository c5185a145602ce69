"""On a GPU: `pytest -m gpu`."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.cuda import blob
from kernels.cuda.linear import chosen

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

linear = torch.ops.sparse_nas.sparse_linear
BOUND = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
BLOCKS = [(16, 16), (16, 64), (32, 32), (64, 64), (64, 32), (128, 128), (128, 16)]


def masked(
    rows: int, channels: int, block: tuple[int, int], density: float, dtype: torch.dtype
) -> Tensor:
    grid = torch.rand(rows // block[0], channels // block[1], device="cuda") < density
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (torch.randn(rows, channels, device="cuda") / channels**0.5 * mask).to(dtype)


def check(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> None:
    """Against float64 on what the kernel was given, twice: bit-equal."""
    packed = kernels.pack_linear(weight)
    linear(x, packed.data, bias, len(weight), activation)
    poison = torch.full((*x.shape[:-1], len(weight)), float("nan"), dtype=x.dtype, device="cuda")
    del poison  # the allocator gives its memory to y
    y = linear(x, packed.data, bias, len(weight), activation)
    again = linear(x, packed.data, bias, len(weight), activation)
    wide = None if bias is None else bias.double()
    from kernels.reference import activate

    true = activate(F.linear(x.double(), weight.double(), wide), activation)
    assert y.dtype == x.dtype and y.shape == true.shape
    assert torch.equal(y, again)
    error = (y.double() - true).norm() / true.norm().clamp(min=1e-30)
    assert not y.isnan().any() and error < BOUND[x.dtype], float(error)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("tokens", [1, 5, 16, 33, 100, 700])
def test_linear_is_right(tokens: int, dtype: torch.dtype, block: tuple[int, int]) -> None:
    torch.manual_seed(tokens)
    weight = masked(256, 384, block, 0.3, dtype)
    x, bias = torch.randn(tokens, 384, device="cuda", dtype=dtype), torch.randn(256, device="cuda")
    check(x, weight)
    check(x, weight, bias, "gelu")


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
@pytest.mark.parametrize("tokens", [3, 200])
def test_activations_and_narrow_biases(tokens: int, activation: str) -> None:
    weight = masked(128, 128, (32, 32), 0.4, torch.bfloat16)
    x = torch.randn(2, tokens, 128, device="cuda", dtype=torch.bfloat16) * 3
    check(x, weight, torch.randn(128, device="cuda").bfloat16(), activation)


@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 5000])
@pytest.mark.parametrize(("size", "block"), [(4096, 64), (8192, 64), (4096, 128), (8192, 1)])
def test_large_weights(size: int, block: int, tokens: int) -> None:
    weight = masked(size, size, (block, block), 0.2, torch.bfloat16)
    check(torch.randn(tokens, size, device="cuda").bfloat16(), weight)


def test_a_weight_that_is_written_to_is_read_again() -> None:
    """Its blocks move to other columns; the bytes stay as many."""
    weight = masked(64, 64, (16, 32), 0.5, torch.half)
    first, second = kernels.pack_linear(weight), kernels.pack_linear(2 * weight.roll(32, 1))
    x = torch.randn(100, 64, device="cuda").half()
    before = linear(x, first.data, None, 64)
    first.data.copy_(second.data)
    after = linear(x, first.data, None, 64)
    assert not torch.equal(after, before)
    assert torch.equal(after, linear(x, second.data, None, 64))


@pytest.mark.parametrize("tokens", [4, 300])
def test_empty_rows_one_row_and_skewed_rows(tokens: int) -> None:
    weight = masked(512, 2048, (64, 64), 0.1, torch.bfloat16)
    weight[64:128] = 0
    weight[:64] = torch.randn(64, 2048, device="cuda")
    check(torch.randn(tokens, 2048, device="cuda").bfloat16(), weight)
    weight[64:] = 0
    check(torch.randn(tokens, 2048, device="cuda").bfloat16(), weight)
    weight[:] = 0
    check(torch.randn(tokens, 2048, device="cuda").bfloat16(), weight)


def test_odd_inputs() -> None:
    weight = masked(64, 64, (16, 32), 0.4, torch.float16)
    x = torch.randn(5, 130, device="cuda").half()
    check(x[:, 1:65], weight)
    check(x.new_empty(0, 64), weight)
    check(torch.randn(64 * 9 + 1, device="cuda").half()[1:].view(9, 64), weight)
    check(torch.randn(7, 3, 64, device="cuda").half().transpose(0, 1), weight)
    narrow = masked(64, 64, (16, 16), 0.03, torch.float16)  # of few columns: many.py
    check(torch.randn(64, 1, device="cuda").half().t(), narrow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(300, 1000), (4097, 260), (64, 9000), (96, 1056), (2048, 4096)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 32, 40])
def test_zeros_anywhere(tokens: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = masked(*shape, (1, 1), 0.15, dtype)
    weight[5:9] = 0
    weight[10] = torch.randn(shape[1], device="cuda")
    packed = kernels.pack_linear(weight)
    assert packed.meta["block"] == "1x1"
    assert torch.equal(kernels.dense(packed), weight)
    kernels.validate(packed.data, packed.meta)
    x, bias = (
        torch.randn(tokens, shape[1], device="cuda", dtype=dtype),
        torch.randn(shape[0], device="cuda"),
    )
    check(x, weight)
    check(x, weight, bias, "silu")


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("tokens", [1, 300])
def test_whole_rows(tokens: int, dtype: torch.dtype) -> None:
    weight = torch.randn(100, 48, device="cuda", dtype=dtype)
    weight[torch.rand(100) < 0.6] = 0
    x = torch.randn(tokens, 48, device="cuda", dtype=dtype)
    assert chosen(blob.read(kernels.pack_linear(weight).data), x) == "channel"
    check(x, weight)
    check(x, weight, torch.randn(100, device="cuda"), "gelu")


@pytest.mark.parametrize("rows", [4096, 4160])
def test_two_of_four(rows: int) -> None:
    weight = torch.randn(rows, 4096, device="cuda")
    order = torch.rand(rows, 1024, 4, device="cuda").argsort(2)
    weight = (weight * (order < 2).view(rows, 4096)).bfloat16()
    packed, x = kernels.pack_linear(weight), torch.randn(2048, 4096, device="cuda").bfloat16()
    assert packed.meta["pattern"] == "2:4"
    by_wgmma = torch.cuda.get_device_capability() == (9, 0) and rows == 4096  # in 128s
    assert chosen(blob.read(packed.data), x) == ("halves" if by_wgmma else "two_of_four")
    check(x, weight, torch.randn(rows, device="cuda"), "relu")
    check(x[:100], weight)


@pytest.mark.parametrize("shape", [(30, 50), (64, 48), (0, 16), (16, 0)])
def test_what_has_no_blocks_stays_dense(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, device="cuda")
    assert kernels.pack_linear(weight).meta["block"] == "dense"
    y = linear(
        torch.ones(3, shape[1], device="cuda"), kernels.pack_linear(weight).data, None, shape[0]
    )
    torch.testing.assert_close(y, weight.sum(1).expand(3, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_weight_comes_back_and_moves(block: tuple[int, int]) -> None:
    weight = masked(512, 512, block, 0.3, torch.bfloat16)
    packed = kernels.pack_linear(weight)
    assert packed.meta["block"] == f"{block[0]}x{block[1]}"
    assert torch.equal(kernels.dense(packed), weight)
    moved = packed.data.cpu().to("cuda")
    kernels.validate(moved, packed.meta)
    x = torch.randn(3, 512, device="cuda").bfloat16()
    assert torch.equal(linear(x, moved, None, 512), linear(x, packed.data, None, 512))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own
def test_graphs_and_compile() -> None:
    weight, x = (
        masked(256, 256, (32, 32), 0.3, torch.bfloat16),
        torch.randn(8, 256, device="cuda").bfloat16(),
    )
    data = kernels.pack_linear(weight).data
    y = linear(x, data, None, 256)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = x
        for _ in range(4):
            held = linear(held, data, None, 256)
    chain = x
    for _ in range(4):
        chain = linear(chain, data, None, 256)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        graph.replay()
        chain = x
        for _ in range(4):
            chain = linear(chain, data, None, 256)
        assert torch.equal(held, chain)
    y = linear(x, data, None, 256)
    compiled = torch.compile(lambda t: linear(t, data, None, 256).relu(), fullgraph=True)
    assert torch.equal(compiled(x), y.relu())


def test_what_does_not_fit_is_named() -> None:
    weight = masked(64, 96, (16, 32), 0.4, torch.bfloat16)
    data, x = kernels.pack_linear(weight).data, torch.randn(2, 96, device="cuda").bfloat16()
    with pytest.raises(ValueError, match=r"packed as \(64, 96\)"):
        linear(x[:, :64], data, None, 64)
    with pytest.raises(ValueError, match=r"x must be torch\.bfloat16"):
        linear(x.half(), data, None, 64)
    with pytest.raises(ValueError, match="bias must be contiguous float32"):
        linear(x, data, torch.ones(3, device="cuda"), 64)
    cpu = kernels.pack_linear(weight.cpu()).data.cuda()
    with pytest.raises(ValueError, match="magic must be b'SNBLOCKS'"):
        linear(x, cpu, None, 64)


@pytest.mark.parametrize("tokens", [4, 300])
@pytest.mark.parametrize("block", [(1, 1), (64, 64)])
def test_a_residual_is_added_before_the_activation(block: tuple[int, int], tokens: int) -> None:
    weight = masked(256, 128, block, 0.2, torch.float16)
    x, bias = torch.randn(2, tokens, 128, device="cuda").half(), torch.randn(256, device="cuda")
    residual = torch.randn(256, tokens, 2, device="cuda").half().permute(2, 1, 0)
    rest = (kernels.pack_linear(weight).data, bias, residual, 256, "relu")
    y = torch.ops.sparse_nas.sparse_linear.residual(x, *rest)
    true = F.linear(x.double(), weight.double(), bias.double()) + residual.double()
    assert (y.double() - true.relu()).norm() <= BOUND[torch.float16] * true.norm()
    with pytest.raises(ValueError, match=r"residual must be torch\.float16"):
        torch.ops.sparse_nas.sparse_linear.residual(x, rest[0], bias, residual[:1], 256)


def test_autocast_gives_x_the_dtype_of_the_weight() -> None:
    weight, x = masked(64, 64, (16, 32), 0.4, torch.float16), torch.randn(9, 64, device="cuda")
    data = kernels.pack_linear(weight).data
    with pytest.raises(ValueError, match=r"x must be torch\.float16"):
        linear(x, data, None, 64)
    with torch.autocast("cuda", torch.bfloat16):
        y = linear(x, data, torch.ones(64, device="cuda"), 64, activation="relu")
        again = torch.ops.sparse_nas.sparse_linear.residual(x, data, None, y, 64)
    assert y.dtype is again.dtype is torch.float16
    assert torch.equal(y, linear(x.half(), data, torch.ones(64, device="cuda").half(), 64, "relu"))
