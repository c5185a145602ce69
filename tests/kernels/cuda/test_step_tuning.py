"""By which way layers of blocks train, as measured; the clock is this test's own here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernels
from kernels import measured
from kernels.block_index import block_index, is_whole, whole_shape
from kernels.block_layer import BlockLayer
from kernels.cuda import block_conv2d, block_linear, clock, step_tuning, ways, whole_grad
from kernels.cuda.ways import WAYS, case_of
from kernels.window import Window

BF16, TOKENS = torch.bfloat16, 2048
BLOCKS = ("blocks", "blocks, beside")
PLAIN = (*BLOCKS, "whole", "whole, beside")
THREE = Window((3, 3), (1, 1), (1, 1), (1, 1))
ONE = Window((1, 1), (1, 1), (0, 0), (1, 1))


def linear(share: float = 0.5, whole: bool | None = None, bias: bool = True) -> BlockLayer:
    torch.manual_seed(0)
    mask = torch.rand(64).argsort().view(8, 8) < 64 * share
    made = nn.Linear(128, 128, bias)
    return kernels.BlockLinear.of(made, (16, 16), mask, whole=whole)


def conv(kernel: int = 3) -> BlockLayer:
    torch.manual_seed(0)
    mask = torch.rand(2, 2, kernel, kernel) < 0.5
    made = nn.Conv2d(32, 32, kernel, padding=kernel // 2)
    return kernels.BlockConv2d.of(made, (16, 16), mask)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ways, "_known", {})
    monkeypatch.setenv("SPARSE_NAS_MEASURED", "on")
    monkeypatch.setenv("SPARSE_NAS_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "_cpu", lambda: "stands for a GPU")
    measured._times.cache_clear()
    yield
    measured._times.cache_clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Microseconds of a step by each way, which a test may change."""
    us = dict(zip(WAYS, (4.0, 3.0, 2.0, 1.0, 7.0, 8.0, 9.0, 5.0, 6.0), strict=True))
    gone, step = list[str](), step_tuning._step

    def met(layer: BlockLayer, values: Tensor, x: Tensor, grad: Tensor) -> list[Tensor]:
        """Which way rules say while a step is computed."""
        window = getattr(layer, "window", None)
        case = case_of(layer.index, x.dtype, grad.numel() // layer.index.out_features, window)
        way = ways.fastest(case, is_whole(values))
        gone.extend(name for name, its in WAYS.items() if its == way)
        return step(layer, values, x, grad)

    def replays_us(replays: Sequence[Any], rounds: int, cold: bool) -> list[float]:
        found = []
        for replay in replays:
            gone.clear()
            replay()
            assert len(set(gone)) == 1
            found.append(us[gone[0]] * len(gone))
        return found

    monkeypatch.setattr(step_tuning, "_step", met)
    monkeypatch.setattr(clock, "shared", lambda: None)
    monkeypatch.setattr(clock, "replayed", lambda call, _: lambda: call())
    monkeypatch.setattr(clock, "replays_us", replays_us)
    return us


def _tuned(layer: BlockLayer, x: Tensor, anew: bool = False) -> tuple[dict[str, float], Tensor]:
    """As `BlockLayer.tune`, which asks for a GPU."""
    values, us = step_tuning.tune(layer, x, anew)
    layer.values = nn.Parameter(values)
    return us, values


@pytest.mark.parametrize("fastest", PLAIN)
@pytest.mark.parametrize("make", [linear, conv, lambda: linear(bias=False), lambda: conv(1)])
def test_a_layer_takes_the_fastest_way(
    make: Callable[[], BlockLayer], fastest: str, taken: dict[str, float]
) -> None:
    layer, taken[fastest] = make(), 0.5
    x = torch.randn(4, 32, 7, 5) if isinstance(layer, kernels.BlockConv2d) else torch.randn(9, 128)
    before, y = layer.matrix(), layer(x)
    us, _ = _tuned(layer, x)
    assert us == {name: taken[name] for name in PLAIN}
    assert is_whole(layer.values) == fastest.startswith("whole")
    assert torch.equal(layer.matrix(), before) and torch.allclose(layer(x), y, atol=1e-5)


def test_rules_ask_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_linear, "has_triton", lambda: True)
    monkeypatch.setattr(whole_grad, "takes", lambda _, dtype: dtype.itemsize == 2)
    monkeypatch.setattr(whole_grad, "_at_once", lambda _: 132)
    index = linear().index
    each = (index, BF16, TOKENS)
    for name, way in WAYS.items():
        ways.put(case_of(*each), {BLOCKS[0]: 2.0, "whole": 3.0} | {name: 1.0})
        assert block_linear.trains_dense(*each) == way.whole
        assert block_conv2d.trains_dense(*each, ONE) == way.whole
        assert block_linear.room(*each, way.whole) == way.beside
        assert block_linear.room(*each, way.whole, ONE) == way.beside
        assert not block_linear.room(*each, not way.whole)  # the other form is not beside
        if way.whole:
            assert block_linear.joins(*each) == way.joined
            assert way.joined or block_linear.fuses(*each) == way.fused


@pytest.mark.parametrize("other", ["share", "tokens", "dtype"])
def test_other_cases_are_not_measured(other: str) -> None:
    index, dtype = linear().index, BF16
    ways.put(case_of(index, dtype, TOKENS), {"whole, joined": 1.0})
    assert ways.fastest(case_of(index, dtype, TOKENS)) == WAYS["whole, joined"]
    if other == "share":
        index = linear(0.4).index
    dtype = torch.float16 if other == "dtype" else dtype
    tokens = 2 * TOKENS if other == "tokens" else TOKENS
    assert ways.fastest(case_of(index, dtype, tokens)) is None


def test_a_convolution_goes_by_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_linear, "has_triton", lambda: False)
    index, pixels = conv().index, 4 * 7 * 5
    ways.put(case_of(index, BF16, pixels, THREE), {"blocks, beside": 1.0, "whole": 2.0})
    assert not block_conv2d.trains_dense(index, BF16, pixels, THREE)
    each = (index, BF16, pixels)
    assert block_linear.room(*each, False, THREE)
    assert not block_linear.room(*each, True, THREE)
    wider = Window((3, 3), (1, 1), (2, 2), (2, 2))
    assert ways.fastest(case_of(*each, wider)) is None
    ways.put(case_of(*each), {"blocks": 1.0})  # of a linear layer
    assert block_conv2d.trains_dense(*each, wider)  # without Triton, by the rule
    assert block_linear.room(*each, False, wider)  # little


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("whole", [False, True])
def test_cudnn_searches_where_that_is_the_way(name: str, whole: bool) -> None:
    index, pixels, way = conv().index, 4 * 7 * 5, WAYS[name]
    values = torch.empty(whole_shape(index) if whole else (1, *index.block), dtype=BF16)
    assert not block_conv2d._searched(values, index, pixels, THREE)
    ways.put(case_of(index, BF16, pixels, THREE), {name: 1.0})
    assert block_conv2d._searched(values, index, pixels, THREE) == (way.searched and whole)


def _forget() -> None:
    """As in another process."""
    ways._known.clear()
    measured._times.cache_clear()


def test_about_as_many_blocks_are_one_case() -> None:
    torch.manual_seed(0)
    indexes = []
    for kept in (2048, 2040, 1800):
        mask = torch.rand(4096).argsort().view(64, 64) < kept
        indexes.append(block_index(mask, (16, 16)))
    cases = [case_of(index, BF16, TOKENS) for index in indexes]
    assert ways.fastest(cases[1]) is None  # asked before
    ways.put(cases[0], {"blocks": 1.0})
    assert ways.fastest(cases[1]) == WAYS["blocks"] and ways.fastest(cases[2]) is None


def test_names_that_are_no_ways_are_not_met() -> None:
    x, case = torch.randn(9, 128), case_of(linear().index, torch.float32, 9)
    kept = measured.times(x.device)
    kept.put(case.name(), {"by magic": 0.1, "whole": 1.0})
    kept.keep()
    _forget()
    assert ways.fastest(case) == WAYS["whole"]


def test_it_is_measured_once_where_nothing_is_kept(
    taken: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSE_NAS_MEASURED", "off")
    x = torch.randn(9, 128)
    first, _ = _tuned(linear(), x)
    taken["blocks"] = 0.5
    assert _tuned(linear(), x)[0] == first
    assert _tuned(linear(), x, anew=True)[0]["blocks"] == 0.5


def test_it_is_measured_once(taken: dict[str, float]) -> None:
    x = torch.randn(9, 128)
    first, _ = _tuned(linear(), x)
    taken["blocks"] = 0.5
    _forget()
    assert ways.fastest(case_of(linear().index, x.dtype, len(x))) == WAYS["whole, beside"]
    assert _tuned(linear(), x)[0] == first
    again, values = _tuned(linear(), x, anew=True)
    assert again["blocks"] == 0.5 and not is_whole(values)
    assert _tuned(linear(0.25), x)[0] == again | {"blocks": 0.5}  # another share is another case
    names = measured.times(x.device).known
    assert len(names) == 2 and all("128x128" in name and "tokens 9" in name for name in names)


@pytest.mark.parametrize("off", range(3))
def test_what_is_wrong_is_left_out(
    off: int,
    taken: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    right = step_tuning._step

    def wrong(layer: BlockLayer, values: Tensor, x: Tensor, grad: Tensor) -> list[Tensor]:
        found = right(layer, values, x, grad)
        if is_whole(values) and values.dtype is torch.float32:
            found[off] = found[off] * 1.001
        return found

    monkeypatch.setattr(step_tuning, "_step", wrong)
    with caplog.at_level(logging.WARNING, "kernels"):
        us, values = _tuned(linear(), torch.randn(9, 128))
    assert us.keys() == set(BLOCKS) and not is_whole(values)
    assert "whole, beside is left out: a result lies" in caplog.text
    assert not measured.times(values.device).known  # the next process tries it again
    monkeypatch.setattr(step_tuning, "_step", right)
    assert _tuned(linear(), torch.randn(9, 128))[0].keys() == set(PLAIN)  # as does this one


def test_what_cannot_be_captured_is_left_out(
    taken: dict[str, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    captured = iter([True, False, True, True])
    again: Callable[[Any, Any], Any] = clock.replayed
    monkeypatch.setattr(
        clock, "replayed", lambda call, pool: again(call, pool) if next(captured) else call
    )
    with caplog.at_level(logging.WARNING, "kernels"):
        us, _ = _tuned(linear(), torch.randn(9, 128))
    assert us.keys() == {*PLAIN} - {"blocks, beside"}
    assert "tune: blocks, beside is left out: no graph captures it" in caplog.text


def test_what_a_replay_does_not_write_is_wrong(
    taken: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def idle(call: Any, pool: Any) -> Any:
        call()
        return lambda: None

    monkeypatch.setattr(clock, "replayed", idle)
    monkeypatch.setattr(clock, "replays_us", lambda replays, *_, **__: [1.0 for _ in replays])
    assert _tuned(linear(), torch.randn(9, 128))[0] == {}


def test_where_nothing_is_right_a_layer_stays_as_it_is(
    taken: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(step_tuning, "_replay", fails)
    for whole in (False, True):
        us, values = _tuned(linear(whole=whole), torch.randn(9, 128))
        assert us == {} and is_whole(values) == whole


def test_a_step_goes_a_way_only_meanwhile() -> None:
    case = case_of(linear().index, BF16, TOKENS)
    with ways.forced(case, WAYS["whole, fused"]):
        assert ways.fastest(case, True) == WAYS["whole, fused"]
    assert ways.fastest(case, True) is None
    ways.put(case, {"blocks": 1.0})
    with ways.forced(case, WAYS["whole, fused"]):
        assert ways.fastest(case, False) is None
    assert ways.fastest(case) == WAYS["blocks"]


def test_it_says_what_it_needs() -> None:
    layer = linear()
    with pytest.raises(ValueError, match="tune: needs a layer on a GPU, got one on cpu"):
        layer.tune(torch.randn(9, 128))
    for x in (torch.randn(0, 128), torch.full((9, 128), float("nan"))):
        with pytest.raises(ValueError, match=r"tune: x must not be empty, and finite.*128"):
            step_tuning.tune(layer, x, False)
    with pytest.raises(ValueError, match="does not fit a weight"):
        step_tuning.tune(layer, torch.randn(9, 64), False)
    with pytest.raises(ValueError, match=r"must be one of .* got torch\.float64"):
        step_tuning.tune(layer.double(), torch.randn(9, 128).double(), False)


def test_a_case_has_a_name() -> None:
    name = case_of(linear(0.25).index, BF16, 7).name()
    assert name == "step of linear 128x128 taps 1 torch.bfloat16 16x16 kept 0.25 tokens 7"
    name = case_of(conv().index, BF16, 7, THREE).name()
    assert name.startswith("step of conv2d 32x288 taps 9 torch.bfloat16 16x16 kept 0.")
    assert name.endswith("tokens 7 kernel (3, 3) stride, padding, dilation (1, 1) (1, 1) (1, 1)")


@pytest.mark.parametrize("made_in", [False, True])
def test_a_layer_measured_in_inference_mode_trains(made_in: bool, taken: dict[str, float]) -> None:
    layer, x = linear(whole=False), torch.randn(9, 128)
    with torch.inference_mode():
        x = x.clone() if made_in else x
        values, us = step_tuning.tune(layer, x, False)
    assert us.keys() == set(PLAIN) and not values.is_inference()
    layer.values = nn.Parameter(values)
    layer(torch.randn(9, 128)).sum().backward()


def test_many_tokens_of_half_precision_do_not_overflow(taken: dict[str, float]) -> None:
    us, _ = _tuned(linear().half(), 200 * torch.randn(40_000, 128).half())
    assert us.keys() == set(PLAIN)


def test_random_numbers_of_the_caller_stay(taken: dict[str, float]) -> None:
    x, layer = torch.randn(9, 128), linear()
    before = torch.get_rng_state()
    _tuned(layer, x)
    assert torch.equal(torch.get_rng_state(), before)
