"""Rules of thumb, where nothing was measured: what beat dense on an H200, and what did not."""

import pytest
import torch

from kernels.cuda import (
    blob,
    entries,
    expand,
    few,
    halves,
    linear,
    pack,
)
from kernels.cuda.blocks import EIGHT, LINEAR, Blocks, Form


def packed(rows: int, columns: int, side: int, kept: float) -> Blocks:
    torch.manual_seed(0)
    grid = torch.zeros(rows // side * (columns // side))
    grid[torch.randperm(len(grid))[: round(kept * len(grid))]] = 1
    grid = grid.view(rows // side, columns // side).bfloat16()
    weight = grid.repeat_interleave(side, 0).repeat_interleave(side, 1)
    return blob.read(pack.pack_linear(weight).data)


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "side", "kept", "ahead"),
    [
        (4096, 512, 3072, 128, 0.7, False),  # 0.80 times as fast as dense: few programs
        (2048, 768, 768, 32, 0.2, False),  # 0.75
        (2048, 256, 1024, 128, 0.7, False),  # 0.67
        (4096, 768, 4096, 32, 0.2, False),  # 0.94
        (200_704, 256, 256, 64, 0.5, False),  # 0.89: bytes bind
        (200_704, 256, 64, 64, 0.2, True),  # so they do here, but an activation costs dense more
        (128, 256, 2048, 64, 0.1, True),  # 1.31
        (1024, 1024, 8192, 32, 0.05, True),  # 1.89
        (2048, 1024, 11008, 128, 0.2, True),  # 2.03
        (2048, 4096, 4096, 128, 0.5, True),  # 1.48
        (2048, 4096, 256, 32, 0.2, True),  # 1.33
        (8192, 4096, 4096, 64, 0.1, True),  # 4.57
    ],
)
def test_blocks_of_many_tokens(
    tokens: int, rows: int, columns: int, side: int, kept: float, ahead: bool
) -> None:
    assert linear.pays(packed(rows, columns, side, kept), tokens) == ahead


def test_blocks_of_few_tokens() -> None:
    tall = packed(5120, 1024, 128, 0.7)
    assert few.pays(tall, torch.empty(8, 1024)) and not few.pays(tall, torch.empty(16, 1024))
    assert few.pays(packed(5120, 1024, 128, 0.5), torch.empty(16, 1024))


@pytest.mark.parametrize(
    ("rows", "columns", "kept", "by_entries", "by_tiles"),
    [
        (8192, 2048, 0.5, True, (True, False)),  # one token; then 16, and 32
        (4096, 4096, 0.1, True, (True, True)),
        (4096, 4096, 0.5, False, (True, False)),
        (1024, 1024, 0.3, False, (True, True)),
        (512, 11008, 0.4, False, (False, False)),
    ],
)
def test_zeros_anywhere(
    rows: int, columns: int, kept: float, by_entries: bool, by_tiles: tuple[bool, bool]
) -> None:
    blocks = anywhere(rows, columns, kept)
    assert blocks.has_entries and entries.pays(blocks) == by_entries
    assert tuple(expand.pays(blocks, torch.empty(n, columns)) for n in (16, 32)) == by_tiles


def anywhere(rows: int, columns: int, kept: float, room: int = 0) -> Blocks:
    counts = torch.empty(int(kept * rows * columns) // 8 * EIGHT, device="meta")
    starts, some = torch.empty(rows + 1), torch.empty(2)
    whole = ((rows, columns), starts, counts, some, True, some, some, 16, some, None)
    return Blocks(Form(LINEAR), rows, columns, *whole, room=room)


@pytest.mark.parametrize(
    ("tokens", "rows", "room", "warps"),
    [
        (8, 2048, 2000, 24),
        (16, 2048, 2000, 16),
        (16, 4096, 2000, 24),
        (32, 4096, 2000, 16),
        (1, 4096, 6000, 16),  # shared memory has no room for more
    ],
)
def test_warps_of_tiles(
    tokens: int, rows: int, room: int, warps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expand, "most_shared", lambda _: 232_448)
    how = expand.plan(anywhere(rows, 4096, 0.2, room), torch.empty(tokens, 4096))
    assert how is not None and how.warps == warps


@pytest.mark.parametrize(
    ("tokens", "rows", "ahead"),
    [
        (2048, 4096, True),  # 1.5 times as fast as dense
        (512, 8192, True),  # 1.46
        (512, 4096, False),  # 0.92
        (256, 8192, False),  # 0.81
        (1024, 1024, False),  # 0.63
    ],
)
def test_two_of_every_four(tokens: int, rows: int, ahead: bool) -> None:
    blocks = anywhere(rows, 4096, 0.5)
    assert halves.pays(blocks, torch.empty(tokens, 4096, device="meta")) == ahead
