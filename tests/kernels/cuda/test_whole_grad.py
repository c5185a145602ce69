"""On a GPU of compute capability 9.0: `pytest -m gpu`; how large tiles are, anywhere."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given as given_drawn
from hypothesis import strategies as st
from torch import Tensor

from kernels.block_index import BlockIndex, block_index, gather, scatter, whole_shape
from kernels.cuda import block_linear, whole_grad, whole_plan
from tests.kernels.cuda.test_block_linear import BOUND
from tests.kernels.cuda.test_hopper import on_hopper

ops = torch.ops.sparse_nas
BLOCKS = [(16, 16), (32, 64), (64, 64), (128, 16), (16, 128), (128, 128)]


@pytest.fixture
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles of so many rows and columns; of both gradients, of so many columns."""
    name = "TILES" if request.param in whole_plan.TILES else "PAIRS"
    held = {request.param: whole_plan.TILES.get(request.param)}
    monkeypatch.setattr(whole_plan, name, held)
    for plan in (whole_plan.fastest, whole_plan.fastest_both):
        plan.cache_clear()
    yield
    for plan in (whole_plan.fastest, whole_plan.fastest_both):
        plan.cache_clear()


tiles = pytest.mark.parametrize("tile", whole_plan.TILES, indirect=True)
pairs = pytest.mark.parametrize("tile", whole_plan.PAIRS, indirect=True)


def drawn(rows: int, columns: int, block: tuple[int, int], density: float) -> BlockIndex:
    return block_index(
        torch.rand(rows // block[0], columns // block[1], device="cuda") < density, block
    )


def given(index: BlockIndex, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A gradient of the output, and an input."""
    sizes = (tokens, index.out_features), (tokens, index.in_features)
    grad, x = (torch.randn(size, device="cuda").to(dtype) for size in sizes)
    return grad, x


def check(index: BlockIndex, tokens: int, dtype: torch.dtype) -> None:
    """Against float64 on what the kernel was given, twice: bit-equal."""
    grad, x = given(index, tokens, dtype)
    assert whole_grad.takes(index, dtype)
    true = scatter(gather(grad.double().t() @ x.double(), index), index)
    whole_grad.weight_grad(index, grad, x)
    poison = torch.full(true.shape, float("nan"), dtype=dtype, device="cuda")
    del poison  # the allocator gives its memory to the result
    found = whole_grad.weight_grad(index, grad, x)
    assert not found.isnan().any() and not found[true == 0].any()
    error = (found.double() - true).norm() / true.norm().clamp(min=1e-30)
    assert error < BOUND[dtype], float(error)
    assert torch.equal(found, whole_grad.weight_grad(index, grad, x))


def check_both(index: BlockIndex, tokens: int, dtype: torch.dtype) -> None:
    """As `check`."""
    grad, x = given(index, tokens, dtype)
    weight = torch.randn(index.out_features, index.in_features, device="cuda").to(dtype)
    true = (
        scatter(gather(grad.double().t() @ x.double(), index), index),
        grad.double() @ weight.double(),
    )
    first = whole_grad.both_grads(index, grad, x, weight)
    poison = [torch.full_like(part, float("nan")) for part in first]
    del poison
    found = whole_grad.both_grads(index, grad, x, weight)
    assert not found[0][true[0] == 0].any()
    for mine, its, again in zip(found, true, first, strict=True):
        assert not mine.isnan().any()
        error = (mine.double() - its).norm() / its.norm().clamp(min=1e-30)
        assert error < BOUND[dtype], float(error)
        assert torch.equal(mine, again)


@pytest.mark.gpu
@on_hopper
@tiles
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 63, 64, 200, 1111])
def test_ragged_sizes(tokens: int, dtype: torch.dtype, block: tuple[int, int], tile: None) -> None:
    torch.manual_seed(tokens)
    for rows, columns in ((1, 1), (3, 5), (13, 11)):
        check(drawn(rows * block[0], columns * block[1], block, 0.6), tokens, dtype)


@pytest.mark.gpu
@on_hopper
@tiles
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("side", [16, 128])
def test_more_tiles_than_run_at_once(side: int, density: float, tile: None) -> None:
    """Rows of up to 640 blocks; the last wave is not full."""
    torch.manual_seed(0)
    index = drawn(2944, 10240, (side, side), density)
    for tokens in (64, 300):
        check(index, tokens, torch.bfloat16)


@pytest.mark.gpu
@on_hopper
@pairs
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 63, 200, 1111])
def test_both_of_ragged_sizes(
    tokens: int, dtype: torch.dtype, block: tuple[int, int], tile: None
) -> None:
    torch.manual_seed(tokens)
    for rows, columns in ((1, 1), (3, 5), (13, 11)):
        check_both(drawn(rows * block[0], columns * block[1], block, 0.6), tokens, dtype)


@pytest.mark.gpu
@on_hopper
@pairs
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    [(2944, 10240, 64), (256, 10240, 3000), (2944, 3072, 2000), (4096, 256, 2048)],
)
def test_both_of_more_tiles_than_run_at_once(
    rows: int, columns: int, tokens: int, tile: None
) -> None:
    """Where either comes first, and either has more tiles."""
    torch.manual_seed(0)
    check_both(drawn(rows, columns, (16, 16), 0.5), tokens, torch.bfloat16)


@pytest.mark.gpu
@on_hopper
def test_blocks_may_lie_anyhow() -> None:
    """Rows whose blocks lie together, first, last or in the middle."""
    mask = torch.zeros(16, 512, dtype=torch.bool, device="cuda")
    for row, (first, last) in enumerate(((0, 40), (470, 512), (100, 200), (0, 512), (511, 512))):
        mask[row, first:last] = True
    mask[8:] = mask[:8].roll(17, 1)
    check(block_index(mask, (16, 16)), 100, torch.bfloat16)


@pytest.mark.gpu
@on_hopper
def test_zeros_are_zeros_whatever_is_multiplied() -> None:
    index = drawn(512, 768, (32, 32), 0.5)
    grad, x = given(index, 100, torch.bfloat16)
    weight = torch.randn(512, 768, device="cuda").bfloat16()
    grad[3], x[5] = float("inf"), float("nan")
    alone, (beside, of_x) = (
        whole_grad.weight_grad(index, grad, x),
        whole_grad.both_grads(index, grad, x, weight),
    )
    kept = scatter(torch.ones(len(index.columns), 32, 32, device="cuda"), index) > 0
    for found in (alone, beside):
        assert found[kept].isnan().all() and (found[~kept] == 0).all()
    assert not of_x[3].isfinite().any() and of_x[4:].isfinite().all()


@pytest.mark.gpu
@on_hopper
def test_it_waits_for_what_it_reads_and_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may begin before the kernel before it has ended: here one whose result it reads."""
    monkeypatch.setattr(block_linear, "fuses", lambda *_: True)
    index = drawn(1024, 2048, (16, 16), 0.5)
    grad, x = given(index, 4096, torch.bfloat16)
    other, _ = given(index, 1024, torch.bfloat16)

    def call(grad: Tensor, x: Tensor) -> Tensor:
        lists = (index.lists, index.groups, 16, 16)
        found: Tensor = ops.block_linear_masked_grad(grad, x, *lists)
        assert found.shape == whole_shape(index)
        return found.view(1024, 2048)

    call(other, call(grad, x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            first = call(grad, x)
            second = call(other, first)
    for _ in range(3):
        grad.normal_()
        graph.replay()
        torch.cuda.synchronize()
        alone = whole_grad.weight_grad(index, grad, x)
        torch.cuda.synchronize()
        assert torch.equal(first, alone)
        assert torch.equal(second, whole_grad.weight_grad(index, other, alone))


@pytest.mark.gpu
@on_hopper
def test_both_wait_for_what_they_read_and_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_linear, "joins", lambda *_: True)
    index = drawn(1024, 1024, (16, 16), 0.5)
    grad, x = given(index, 700, torch.bfloat16)
    values = torch.randn(1024, 1024, device="cuda").bfloat16().view(whole_shape(index))

    def call(grad: Tensor, x: Tensor) -> list[Tensor]:
        found = [grad, x]
        for _ in range(3):  # each reads what the one before it wrote
            lists = index.lists, index.groups
            of_values, of_x = ops.block_linear_both_grads(*found[-2:], values, *lists)
            found += [of_x * 0.03, of_values.view(1024, 1024)[:700] * 0.03]
        return found

    call(grad, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call(grad, x)
    for _ in range(3):
        grad.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(mine, its) for mine, its in zip(held, call(grad, x), strict=True))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("rule", ["fuses", "joins"])
def test_a_graph_may_be_captured_of_sizes_that_it_has_not_met(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("fuses", "joins"):
        monkeypatch.setattr(block_linear, name, lambda *_, name=name: name == rule)
    monkeypatch.setattr(whole_grad, "_loaded", set())
    index = drawn(1024, 1024, (64, 64), 0.5)
    grad, x = given(index, 300, torch.bfloat16)
    values = torch.randn(1024, 1024, device="cuda").bfloat16().view(whole_shape(index))

    def call() -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = ops.block_linear_both_grads(
            grad, x, values, index.lists, index.groups
        )
        return found

    with monkeypatch.context() as other:  # what it falls back to is loaded
        other.setattr(block_linear, rule, lambda *_: False)
        wanted = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    graph.replay()
    assert all(torch.equal(mine, its) for mine, its in zip(found, wanted, strict=True))
    assert not whole_grad._loaded


def index_of(rows: int, columns: int) -> BlockIndex:
    return block_index(torch.ones(rows // 64, columns // 64, dtype=torch.bool), (64, 64))


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "tile"),
    [
        (64, 512, 512, (64, 64)),  # 2.5 us, of 128x64 2.6, of 128x128 3.1
        (1024, 512, 512, (64, 64)),  # 4.6, 5.3, 7.1
        (512, 1024, 1024, (128, 64)),  # 4.0, of 64x64 5.4, of 128x128 5.0
        (64, 2048, 2048, (128, 256)),  # 5.2, of 128 columns 5.6
        (256, 768, 3072, (128, 192)),  # 5.2, of 256 columns 6.0, of 64 6.5
        (256, 4096, 4096, (128, 256)),  # 15.8, of 128 columns 20.9
        (8192, 4096, 4096, (128, 256)),  # 393, 405
        (1024, 11008, 4096, (128, 256)),  # 133, 181
        (1024, 1024, 3072, (128, 192)),  # 10.7, of 256 columns 13.3, of 128 13.2
    ],
)
def test_tiles_are_as_large_as_was_fastest(
    tokens: int,
    rows: int,
    columns: int,
    tile: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(whole_grad, "_at_once", lambda _: 132)
    how = whole_grad.plan(index_of(rows, columns), tokens)
    assert (how.rows, how.weight) == tile
    assert not whole_grad.takes(index_of(rows, columns), torch.bfloat16)  # on the CPU


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "pair"),
    [
        (64, 256, 256, (64, 64)),  # 2.8 us, of 128 columns 3.5, of 256 4.9
        (2048, 2048, 512, (128, 128)),  # 13.0, of 64 18.4, of 256 21.8
        (128, 768, 3072, (128, 64)),  # 5.1, of 128 6.1, of 64 6.0
        (1024, 1024, 2048, (256, 256)),  # 13.5, of 128 14.3
    ],
)
def test_pairs_of_tiles_are_as_large_as_was_fastest(
    tokens: int,
    rows: int,
    columns: int,
    pair: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(whole_grad, "_at_once", lambda _: 132)
    how = whole_grad.plan_both(index_of(rows, columns), tokens)
    assert (how.weight, how.input) == pair


@given_drawn(
    count=st.integers(0, 50),
    others=st.integers(1, 50),
    blocks=st.integers(1, 20),
    time=st.floats(0.1, 9),
    other=st.floats(0.1, 9),
)
def test_every_tile_is_taken_once_and_ends_as_planned(
    count: int, others: int, blocks: int, time: float, other: float
) -> None:
    """By thread blocks as whole_grad.cu says which tiles one takes; no other plan ends sooner."""
    blocks = min(blocks, count + others)
    most, found = count % blocks, list[tuple[float, int]]()
    for each in range(1, others + 1):
        given, taken, last = min(others, (blocks - most) * each), list[int](), 0.0
        for block in range(blocks):
            seconds = range(block - most, given, blocks - most)
            if block < most:
                seconds = range(given + block, others, most)
            taken += seconds
            last = max(last, len(range(block, count, blocks)) * time + len(seconds) * other)
        if most or given == others:
            assert sorted(taken) == list(range(others))
            found.append((last, each))
    ends, each = whole_plan._ends(count, time, others, other, blocks)
    assert ends == pytest.approx(min(found)[0])
    assert dict((each, last) for last, each in found)[each] == pytest.approx(ends)
