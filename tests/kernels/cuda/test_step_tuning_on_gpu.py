"""On a GPU: `pytest -m gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernels
from kernels import measured
from kernels.block_index import is_whole
from kernels.block_layer import BlockLayer
from kernels.cuda import block_conv2d, step_tuning, ways, whole_grad
from kernels.cuda.ways import WAYS
from tests.kernels.cuda import captured

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ways, "_known", {})
    monkeypatch.setenv("SPARSE_NAS_MEASURED", "on")
    monkeypatch.setenv("SPARSE_NAS_CACHE", str(tmp_path))
    measured._times.cache_clear()
    yield
    measured._times.cache_clear()


def made(kernel: int, dtype: torch.dtype, share: float) -> tuple[BlockLayer, Tensor]:
    """A layer of 128 features or channels, kernel 0 of a linear one, and an input."""
    torch.manual_seed(0)
    shape = (4, 4, kernel, kernel) if kernel else (4, 4)
    mask = torch.rand(shape, device="cuda") < share
    if not kernel:
        linear = nn.Linear(128, 128, device="cuda", dtype=dtype)
        x = torch.randn(300, 128, device="cuda", dtype=dtype)
        return kernels.BlockLinear.of(linear, (32, 32), mask), x
    conv = nn.Conv2d(128, 128, kernel, padding=kernel // 2, device="cuda", dtype=dtype)
    x = torch.randn(3, 128, 9, 11, device="cuda", dtype=dtype)
    return kernels.BlockConv2d.of(conv, (32, 32), mask), x


def formed(layer: BlockLayer, tokens: int) -> BlockLayer:
    """The same without a bias, made by what is known of so many tokens or pixels."""
    if isinstance(layer, kernels.BlockConv2d):
        conv = nn.Conv2d(128, 128, 3, padding=1, bias=False, device="cuda", dtype=torch.bfloat16)
        conv.weight.data.copy_(layer.weight())
        return kernels.BlockConv2d.of(conv, (32, 32), pixels=tokens)
    plain = nn.Linear(128, 128, False, device="cuda", dtype=torch.bfloat16)
    plain.weight.data.copy_(layer.matrix())
    return kernels.BlockLinear.of(plain, (32, 32), tokens=tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.1, 0.7])
@pytest.mark.parametrize("kernel", [0, 1, 3])
def test_every_way_is_right_and_the_fastest_is_taken(
    kernel: int, share: float, dtype: torch.dtype
) -> None:
    layer, x = made(kernel, dtype, share)
    y, before = layer(x), layer.matrix()
    us = layer.tune(x)
    gone = {n for n, way in WAYS.items() if way.searched and (kernel < 3 or dtype is DTYPES[0])}
    if kernel == 3 or not whole_grad.takes(layer.index, dtype):
        gone |= {name for name, way in WAYS.items() if way.fused or way.joined}
    assert us.keys() == WAYS.keys() - gone
    assert min(us.values()) > 0
    fastest = WAYS[min(us, key=us.__getitem__)]
    assert is_whole(layer.values) == fastest.whole
    assert torch.equal(layer.matrix(), before)
    assert (layer(x) - y).norm() <= 1e-2 * y.norm()
    again, _ = made(kernel, dtype, share)  # another one, made by what was measured
    pixels = x[:, 0].numel() if kernel else len(x)
    case = ways.case_of(layer.index, dtype, pixels, getattr(layer, "window", None))
    assert ways.fastest(case) == fastest
    assert again.tune(x) == us and is_whole(again.values) == fastest.whole


@pytest.mark.parametrize("name", WAYS)
def test_a_captured_step_goes_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way = WAYS[name]
    layer, x = made(3 if way.searched else 0, torch.bfloat16, 0.5)
    if way.joined and not whole_grad.takes(layer.index, torch.bfloat16):
        pytest.skip("one launch gives both on 9.0")
    tokens = x[:, 0].numel() if way.searched else len(x)
    ways.put(
        ways.case_of(layer.index, x.dtype, tokens, getattr(layer, "window", None)), {name: 1.0}
    )
    held = formed(layer, tokens)
    assert is_whole(held.values) == way.whole
    searched, dense = list[bool](), block_conv2d._dense

    def noted(*given: Any, **rest: Any) -> Tensor:
        searched.append(given[4])
        return dense(*given, **rest)

    monkeypatch.setattr(block_conv2d, "_dense", noted)
    captured.steps(held, x.requires_grad_(), way.beside, monkeypatch)
    assert all(searched) and bool(searched) == way.searched


def test_it_is_tuned_under_autocast() -> None:
    layer, x = made(0, torch.float32, 0.5)
    with torch.autocast("cuda", torch.bfloat16):
        us = layer.tune(x)
    assert us and layer.values.dtype is torch.float32
    assert ways.fastest(ways.case_of(layer.index, torch.bfloat16, len(x))) is not None
    assert ways.fastest(ways.case_of(layer.index, torch.float32, len(x))) is None


def test_a_way_that_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_tuning._step

    def wrong(layer: BlockLayer, values: Tensor, x: Tensor, grad: Tensor) -> list[Tensor]:
        found = right(layer, values, x, grad)
        return [found[0] * (1.1 if is_whole(values) else 1), *found[1:]]

    monkeypatch.setattr(step_tuning, "_step", wrong)
    layer, x = made(0, torch.bfloat16, 0.5)
    assert layer.tune(x).keys() == {"blocks", "blocks, beside"}
    assert not is_whole(layer.values)
