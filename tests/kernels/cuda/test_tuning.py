"""Which kernel takes a packed weight, as measured; kernels and clock are this test's own here."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels import measured
from kernels.cuda import blob, clock, conv2d, linear, pack, table, tuning
from kernels.cuda.blocks import Blocks
from kernels.window import Window

Call = Callable[[], Tensor]


def weight(share: float, block: int = 16, size: int = 128) -> Tensor:
    torch.manual_seed(0)
    side = size // block
    order = torch.rand(side * side).argsort().argsort().view(side, side)
    mask = (order < share * side * side).repeat_interleave(block, 0).repeat_interleave(block, 1)
    return torch.randn(size, size) * mask


def fastest(blocks: Blocks, tokens: int) -> str | None:
    case = lambda: table.linear_case(blocks, tokens)  # noqa: E731
    return table.fastest(blocks, table.bucket(tokens), case)


@pytest.fixture
def on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Kernels compute plainly on the CPU and take what the returned table says, microseconds."""
    taken = {"few": 3.0, "many": 2.0, "dense": 1.0, "entries": 5.0, "expand": 6.0}

    def compute(kernel: str, blocks: Blocks, x: Tensor, bias: Any, activation: str) -> Tensor:
        return F.linear(x, blob.unpack(blocks))

    def takes(kernel: str, blocks: Blocks, x: Tensor) -> bool:
        if kernel in ("few", "many"):
            return not blocks.dense and (kernel == "many" or len(x) <= 64)
        return kernel == "dense" and blocks.whole is not None

    def in_turn_us(calls: Sequence[Any], rounds: int) -> list[float]:
        return [taken[call.args[0]] for call in calls]

    monkeypatch.setattr(linear, "compute", compute)
    monkeypatch.setattr(linear, "takes", takes)
    monkeypatch.setattr(clock, "in_turn_us", in_turn_us)
    monkeypatch.setenv("SPARSE_NAS_MEASURED", "on")
    monkeypatch.setenv("SPARSE_NAS_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "_cpu", lambda: "stands for a GPU")
    measured._times.cache_clear()
    yield taken
    measured._times.cache_clear()


def test_the_fastest_kernel_is_chosen_up_to_the_next_power_of_two(
    on_cpu: dict[str, float],
) -> None:
    on_cpu["many"] = 0.5
    data = pack.pack_linear(weight(0.5)).data
    blocks = blob.read(data)
    assert fastest(blocks, 20) is None
    assert tuning.tune(data, torch.randn(2, 10, 128)) == {"few": 3.0, "many": 0.5, "dense": 1.0}
    assert [fastest(blocks, n) for n in (16, 17, 32, 33)] == [None, "many", "many", None]
    assert linear.chosen(blocks, torch.randn(30, 128)) == "many"
    assert linear.chosen(blocks, torch.randn(300, 128)) == "dense"  # by the rule of thumb


def test_weights_that_are_alike_are_measured_once(
    on_cpu: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(8, 128)
    first = tuning.tune(pack.pack_linear(weight(0.5)).data, x)
    on_cpu["few"] = 0.5
    alike = pack.pack_linear(2 * weight(0.5).roll(16, 0)).data
    assert tuning.tune(alike, x) == first
    assert fastest(blob.read(alike), 8) == "dense"
    assert tuning.tune(alike, x, anew=True)["few"] == 0.5
    assert fastest(blob.read(alike), 8) == "few"
    other = pack.pack_linear(weight(0.2)).data
    assert fastest(blob.read(other), 8) is None
    monkeypatch.setattr(tuning, "_measure", None)
    measured._times.cache_clear()  # another process, which meets a weight like it
    late = blob.read(pack.pack_linear(weight(0.5)).data)
    assert fastest(late, 7) == "few" and fastest(late, 9) is None


def test_switched_off_what_was_measured_holds_for_its_weight(
    on_cpu: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPARSE_NAS_MEASURED", "off")
    data = pack.pack_linear(weight(0.5)).data
    tuning.tune(data, torch.randn(8, 128))
    assert fastest(blob.read(data), 8) == "dense"
    assert fastest(blob.read(pack.pack_linear(weight(0.5)).data), 8) is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoiled", "reason"),
    [
        (lambda y: y + 1e-3, "lies .* from the true one"),
        (lambda y: y * float("nan"), "lies nan from"),
        (lambda y: y[:, 1:], "must match the size"),
    ],
)
def test_a_wrong_kernel_has_no_time(
    spoiled: Callable[[Tensor], Tensor],
    reason: str,
    on_cpu: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compute = linear.compute

    def wrong(kernel: str, *rest: Any) -> Tensor:
        y = compute(kernel, *rest)
        return spoiled(y) if kernel == "dense" else y

    monkeypatch.setattr(linear, "compute", wrong)
    data = pack.pack_linear(weight(0.5)).data
    with caplog.at_level(logging.WARNING, logger="kernels"):
        assert tuning.tune(data, torch.randn(5000, 128)).keys() == {"many"}
    assert caplog.text.count("tune: dense is left out") == 1
    assert re.search(reason, caplog.text)
    assert not measured.times(data.device).known  # the next process tries again


def test_what_a_bucket_lacks_is_measured(
    on_cpu: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    takes = linear.takes

    def even(kernel: str, blocks: Blocks, x: Tensor) -> bool:
        return takes(kernel, blocks, x) and (kernel != "few" or len(x) % 2 == 0)

    monkeypatch.setattr(linear, "takes", even)
    on_cpu["few"] = 0.5
    data = pack.pack_linear(weight(0.5)).data
    assert tuning.tune(data, torch.randn(31, 128)).keys() == {"many", "dense"}
    assert tuning.tune(data, torch.randn(32, 128)).keys() == {"few", "many", "dense"}
    blocks = blob.read(data)
    assert linear.chosen(blocks, torch.randn(20, 128)) == "few"
    assert linear.chosen(blocks, torch.randn(21, 128)) == "dense"  # by the rule of thumb
    assert tuning.tune(data, torch.randn(31, 128)).keys() == {"few", "many", "dense"}


def test_an_unknown_kernel_in_a_file_is_not_taken() -> None:
    blocks = blob.read(pack.pack_linear(weight(0.5)).data)
    for name in ("gone", "entries", "two_of_four"):
        table.put(blocks, 128, name)
        assert linear.chosen(blocks, torch.randn(100, 128)) == "dense"


@pytest.mark.parametrize("triton", [True, False])
def test_blocks_are_held_unpacked_too_where_dense_may_be_faster(
    triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blob, "has_triton", lambda: triton)
    for share, held in ((0.04, not triton), (0.5, True)):
        given = weight(share)
        data = pack.pack_linear(given).data
        blocks = blob.read(data)
        assert not blocks.dense and (blocks.whole is not None) == held
        x = torch.randn(3, 128)
        assert linear.takes("dense", blocks, x) == held
        if blocks.whole is not None:
            assert torch.equal(blocks.whole, given)
            y = linear.compute("dense", blocks, x, torch.ones(128), "relu")
            torch.testing.assert_close(y, F.relu(F.linear(x, given, torch.ones(128))))


def test_what_a_captured_graph_reads_is_written_over() -> None:
    first, second = (pack.pack_linear(f * weight(0.5)).data for f in (1, 2))
    whole = blob.read(first).whole
    assert whole is not None
    first.copy_(second)
    again = blob.read(first).whole
    assert again is not None and again.data_ptr() == whole.data_ptr()
    assert torch.equal(whole, 2 * weight(0.5))
    for _ in range(3):
        first.copy_(second)
        blob.read(first)
    assert blob._met[first][2] == []  # nothing was left behind


def test_a_weight_that_was_met_in_inference_mode_can_be_written_to() -> None:
    first, second = (pack.pack_linear(f * weight(0.5)).data for f in (1, 2))
    with torch.inference_mode():
        assert not blob.read(first).order.is_inference()
    first.copy_(second)
    assert torch.equal(blob.unpack(blob.read(first)), 2 * weight(0.5))


def test_a_convolution_takes_what_was_measured(on_cpu: dict[str, float]) -> None:
    data = pack.pack_conv2d(weight(0.3).view(128, 16, 2, 4)).data
    blocks, x = blob.read(data), torch.randn(3, 16, 9, 9)
    window = Window((2, 4), (1, 1), (1, 1), (1, 1))
    out = conv2d.shape_of(blocks, x, window)
    assert conv2d.chosen(blocks, x, out, window) == conv2d.takers(blocks)[-1] == "dense"
    on_cpu["dense"] = 7.0
    assert tuning.tune(data, x, pairs=window.pairs) == {"dense": 7.0}
    table.put(blocks, conv2d.key(x, window), "gone")
    assert conv2d.chosen(blocks, x, out, window) == "dense"
    with pytest.raises(ValueError, match="larger than the padded"):
        tuning.tune(data, x[:, :, :1, :1], pairs=window.pairs)


def test_buckets_are_powers_of_two() -> None:
    found = [table.bucket(n) for n in (0, 1, 2, 3, 4, 5, 64, 65, 6272)]
    assert found == [1, 1, 2, 4, 4, 8, 64, 128, 8192]


def test_what_cannot_be_tuned_is_named(on_cpu: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needs a weight on a GPU, got one on cpu"):
        kernels.tune(kernels.pack_linear(weight(0.5)), torch.randn(2, 128))
    data = pack.pack_linear(weight(0.5)).data
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 128\), not empty, got \(2, 64\)"):
        tuning.tune(data, torch.randn(2, 64))
    with pytest.raises(ValueError, match="not empty"):
        tuning.tune(data, torch.randn(0, 128))
    with pytest.raises(ValueError, match="must be finite"):
        tuning.tune(data, torch.full((2, 128), float("inf")))
    conv = pack.pack_conv2d(weight(0.5).view(128, 128, 1, 1)).data
    with pytest.raises(ValueError, match=r"must be \(N, 128, H, W\), not empty, got \(2, 128\)"):
        tuning.tune(conv, torch.randn(2, 128))
