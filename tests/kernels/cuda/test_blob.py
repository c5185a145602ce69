"""What a GPU's kernels are given; bytes are the same on the CPU."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.cuda import blob, pack
from kernels.cuda.blocks import TILE, Blocks
from kernels.cuda.checks import columns_of
from tests.kernels import draws

BLOCKS = [(1, 1), (16, 16), (16, 64), (32, 32), (64, 32), (128, 16)]


def masked(rows: int, channels: int, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    grid = torch.rand(rows // block[0], channels // block[1], generator=generator) < 0.25
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return (torch.randn(rows, channels, generator=generator) * mask).to(dtype)


def decoded(words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Columns and values of entries, (eights, 8), by the words of entries.cu one by one."""
    count = len(words) // 6
    values = words[: 4 * count].view(dtype).view(count, 8)
    columns = []
    for low, high in words[4 * count :].view(count, 2).tolist():
        eight = [low & 0xFFFF]
        for step in (low >> 16, low >> 22, high, high >> 6, high >> 12, high >> 18, high >> 24):
            eight.append(eight[-1] + (step & 63))
        columns.append(eight)
    return torch.tensor(columns), values


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_comes_back(dtype: torch.dtype, block: tuple[int, int]) -> None:
    weight = masked(128, 256, block, dtype)
    packed = pack.pack_linear(weight)
    blob.validate(packed.data, packed.meta)
    found = blob.read(packed.data)
    assert torch.equal(blob.unpack(found), weight)
    if block != (1, 1):
        assert packed.meta["block"] == f"{block[0]}x{block[1]}"
        assert found.values.numel() < 0.6 * weight.numel()
        kept = weight.view(128 // block[0], block[0], 256 // block[1], block[1]).any(3).any(1)
        assert found.longest == int(kept.sum(1).max())


@pytest.mark.parametrize("block", [(16, 16), (64, 32)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5)])
def test_a_convolution_comes_back(kernel: tuple[int, int], block: tuple[int, int]) -> None:
    """Blocks lie within one kernel position: 48 channels are no multiple of 32, 48 * 9 are."""
    weight = torch.stack(
        [masked(128, 96, block, torch.float16) for _ in range(kernel[0] * kernel[1])], 2
    ).view(128, 96, *kernel)
    packed = pack.pack_conv2d(weight)
    blob.validate(packed.data, packed.meta)
    found = blob.read(packed.data)
    assert torch.equal(found.form.weight(blob.unpack(found)), weight)
    assert packed.meta["block"] == f"{block[0]}x{block[1]}"
    assert packed.meta["shape"] == [128, 96, *kernel]
    odd = pack.pack_conv2d(weight[:, :48])
    assert odd.meta["block"] == f"{block[0]}x16"
    whole = pack.pack_conv2d(weight, groups=2)
    assert whole.meta["block"] == "dense" and whole.meta["groups"] == 2
    assert torch.equal(blob.read(whole.data).form.weight(blob.read(whole.data).values), weight)


@pytest.mark.parametrize("shape", [(30, 20), (64, 32, 3, 3)])
def test_a_channel_pattern_keeps_whole_rows(shape: tuple[int, ...]) -> None:
    weight = torch.ones(shape).double().half()
    weight[torch.arange(shape[0]) % 3 > 0] = 0
    packed = pack.pack_linear(weight) if len(shape) == 2 else pack.pack_conv2d(weight)
    blob.validate(packed.data, packed.meta)
    found = blob.read(packed.data)
    assert packed.meta["pattern"] == packed.meta["block"] == "channel"
    assert found.is_channel and found.order.tolist() == [*range(0, shape[0], 3)]
    assert torch.equal(found.form.weight(blob.unpack(found)), weight)
    found.columns[0] = 5
    with pytest.raises(ValueError, match="rows must be ascending"):
        blob.read(packed.data)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 80),
    columns=st.integers(0, 200),
    block=draws.equal_rows,
    density=draws.densities,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=draws.seeds,
)
def test_any_weight_comes_back(
    rows: int, columns: int, block: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    weight = draws.weight(seed, (rows, columns), density, block).to(dtype)
    packed = pack.pack_linear(weight)
    blob.validate(packed.data, packed.meta)
    assert torch.equal(blob.unpack(blob.read(packed.data)), weight)


def tiled(found: Blocks) -> Tensor:
    """What the tiles of a weight say, as one lane after another reads them."""
    high, wide = found.tile_rows, TILE // found.tile_rows
    down, across = -(-found.rows // high), -(-found.channels // wide)
    weight = torch.zeros(down * high, across * wide, dtype=found.values.dtype)
    for tile in range(down * across):
        top, left = tile // across * high, tile % across * wide
        begin, end = (4 * int(found.tiles[tile + i]) for i in (0, 1))
        words = found.pairs[begin:end]
        begins = words[32:48].view(torch.int16).tolist()
        for lane in range(32):
            at = 48 + begins[lane]
            for bit in range(32):
                if int(words[lane]) >> bit & 1:
                    step, half, pair = bit // 8, bit // 4 % 2, bit % 4
                    row = top + step // (wide // 32) * 16 + half * 8 + lane // 4
                    column = left + step % (wide // 32) * 32 + lane % 4 * 8 + 2 * pair
                    weight[row, column : column + 2] = words[at : at + 1].view(weight.dtype)
                    at += 1
    return weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "high"), [((32, 96), 16), ((33, 40), 16), ((48, 128), 32), ((72, 72), 64)]
)
def test_entries_and_tiles_are_the_weight(
    shape: tuple[int, int], high: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack, "_BLOCKS", shape[0] // high)
    monkeypatch.setattr(pack, "_AT_ONCE", 3000)  # in more than one go
    weight = masked(*shape, (1, 1), dtype)
    found, rows = blob.read(pack.pack_linear(weight).data), torch.zeros_like(weight)
    assert found.has_entries and found.tile_rows == high
    columns, values = decoded(found.columns, dtype)
    assert torch.equal(columns, columns_of(found.columns))
    for row in range(shape[0]):
        mine = slice(found.starts[row], found.starts[row + 1])
        rows[row].index_add_(0, columns[mine].flatten(), values[mine].flatten())
    assert torch.equal(rows, weight)  # what fills up is zero
    assert found.entries == values.numel()
    whole = tiled(found)
    assert torch.equal(whole[: shape[0], : shape[1]], weight)
    assert whole.count_nonzero() == weight.count_nonzero()
    assert found.room == 16 * int(found.tiles.diff().max())
    assert len(found.pairs) < 48 * (len(found.tiles) - 1) + weight.count_nonzero() + 4 * len(
        found.tiles
    )


@pytest.mark.parametrize("density", [0.002, 0.01, 0.1])
def test_entries_far_from_each_other(density: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 5000).half() * (torch.rand(40, 5000) < density)
    weight[3], weight[4] = 0, 0
    weight[4, 4999], weight[5, :300] = 2, 1
    for at in (62, 63, 64, 126, 127):  # each from the one before: steps of 63 at most
        weight[6] = 0
        weight[6, 70], weight[6, 70 + at] = 1, -1
        found = blob.read(pack.pack_linear(weight).data)
        columns, values = decoded(found.columns, torch.half)
        rows = torch.zeros_like(weight)
        for row in range(40):
            mine = slice(found.starts[row], found.starts[row + 1])
            rows[row].index_add_(0, columns[mine].flatten(), values[mine].flatten())
        assert torch.equal(rows, weight)
        eights = int(found.starts[7] - found.starts[6])
        assert eights == 1 and int(values[found.starts[6]].ne(0).sum()) == 2


def test_there_are_no_tiles_where_tokens_are_not_aligned() -> None:
    found = blob.read(pack.pack_linear(masked(32, 36, (1, 1), torch.float16)).data)
    assert found.has_entries and len(found.tiles) == len(found.pairs) == found.room == 0


@pytest.mark.parametrize("block", [(1, 1), (16, 32)])
@pytest.mark.parametrize("place", [*range(0, 96, 3), 97, 128, 132, 140, 300, 400])
@pytest.mark.parametrize("value", [0, 1, 7, 255])
def test_spoiled_bytes_are_refused(place: int, value: int, block: tuple[int, int]) -> None:
    packed = pack.pack_linear(masked(64, 96, block, torch.bfloat16))
    data = packed.data.clone()
    data[place] = value
    if torch.equal(data, packed.data):
        return
    with pytest.raises(ValueError, match="packed weight: "):
        blob.validate(data, packed.meta)


def test_a_header_of_another_size_is_refused_before_it_is_unpacked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = pack.pack_linear(masked(64, 96, (16, 32), torch.bfloat16))
    packed.data[30] = 255  # millions of columns
    monkeypatch.setattr(blob, "read", pytest.fail)
    with pytest.raises(ValueError, match=r"meta shape must be \[64, 16711776\], got \[64, 96\]"):
        blob.validate(packed.data, packed.meta)


@pytest.mark.parametrize(
    ("block", "part", "at", "value", "rule"),
    [
        ((16, 32), "starts", 0, 1, "starts must be ascending from 0"),
        ((16, 32), "columns", 0, 3, r"columns must be in \[0, 3\)"),
        ((16, 32), "columns", 0, -1, r"columns must be in \[0, 3\)"),
        ((1, 1), "starts", 0, 4, "starts must be ascending from 0"),
        ((1, 1), "columns", -2, 96, r"columns must be in \[0, 96\)"),
        ((1, 1), "columns", -1, -1, r"columns must be in \[0, 96\)"),
        ((1, 1), "tiles", 0, 1, "tiles must be ascending from 0"),
        ((1, 1), "pairs", 0, -1, "tiles must be lists of pairs, lane by lane"),
        ((1, 1), "pairs", 0, 0, "tiles must be lists of pairs, lane by lane"),
    ],
)
def test_a_kernel_never_sees_a_forged_index(
    block: tuple[int, int], part: str, at: int, value: int, rule: str
) -> None:
    data = pack.pack_linear(masked(64, 96, block, torch.bfloat16)).data
    view: Any = getattr(blob.read(data), part)
    view[at] = value  # as the version of a tensor shows that it was written to, it is read again
    with pytest.raises(ValueError, match=rule):
        blob.read(data)


@pytest.mark.parametrize("size", [0, 64, 127, 128, 500])
def test_a_cut_weight_is_refused(size: int) -> None:
    data = pack.pack_linear(masked(64, 96, (16, 32), torch.bfloat16)).data
    with pytest.raises(ValueError, match="packed weight: "):
        blob.read(data[:size].clone())
