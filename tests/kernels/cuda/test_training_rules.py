"""Rules of thumb of layers of blocks that train: what took least on an H200, and what did not."""

from dataclasses import replace

import pytest
import torch

from kernels.block_conv2d import op
from kernels.block_index import BlockIndex, block_index, whole_shape
from kernels.cuda import (
    block_conv2d,
    block_linear,
    step_time,
    whole_grad,
)
from kernels.window import Window


def index_of(size: int, side: int, kept: float, taps: int = 1) -> BlockIndex:
    """Of a square weight, or a convolution of as many channels out as in."""
    return sized(size, size * taps, side, kept, taps)


def sized(rows: int, columns: int, side: int, kept: float, taps: int = 1) -> BlockIndex:
    """Of a weight (rows, columns)."""
    count = rows // side * (columns // side)
    mask = torch.arange(count).view(rows // side, -1) * 7919 % count < kept * count
    return block_index(mask, (side, side), taps)


@pytest.mark.parametrize(
    ("tokens", "side", "kept", "product", "gradient"),
    [
        (8192, 16, 0.2, False, False),  # 0.40 and 0.30 times as fast as dense; 0.95 by it
        (8192, 16, 0.05, True, True),
        (8192, 32, 0.5, False, False),  # 0.63, 0.33
        (8192, 32, 0.2, True, False),  # 1.48, 0.77
        (8192, 32, 0.1, True, True),  # 2.7, 1.29
        (8192, 64, 1.0, False, False),  # 0.95, 0.64
        (8192, 64, 0.5, True, True),  # 1.37, 1.12
        (8192, 128, 0.7, True, True),  # 1.24, 1.31
        (512, 32, 0.2, True, True),  # 0.9, 1.06: moving blocks costs 0.66, 0.84
        (512, 16, 0.5, False, False),  # 0.16, 0.19
    ],
)
def test_blocks_that_train(
    tokens: int, side: int, kept: float, product: bool, gradient: bool
) -> None:
    index = index_of(4096, side, kept)
    assert block_linear.pays(index, torch.bfloat16, tokens) == product
    assert block_linear.pays(index, torch.bfloat16, tokens, step_time.WEIGHT) == gradient


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an H200."""
    monkeypatch.setattr(block_linear, "has_triton", lambda: True)
    monkeypatch.setattr(whole_grad, "takes", lambda _, dtype: dtype.itemsize == 2)
    monkeypatch.setattr(whole_grad, "_at_once", lambda _: 132)


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("tokens", "size", "side", "kept", "dense"),
    [
        (8192, 4096, 64, 0.7, True),  # blocks 0.96 times as fast as dense
        (8192, 4096, 64, 0.6, False),  # 1.17
        (1024, 4096, 64, 0.7, True),  # 0.85
        (1024, 4096, 64, 0.5, False),  # 1.08
        (512, 4096, 64, 0.5, True),  # 0.88
        (512, 4096, 64, 0.3, False),  # 1.31
        (64, 4096, 64, 0.5, True),  # 0.75
        (64, 4096, 64, 0.3, False),  # 1.11
        (8192, 4096, 128, 0.7, False),  # 1.26
        (128, 4096, 128, 0.7, True),  # 0.72
        (4096, 4096, 32, 0.3, True),  # 0.97
        (512, 4096, 32, 0.1, False),  # 1.66
        (4096, 4096, 16, 0.1, True),  # 0.95
        (512, 4096, 16, 0.1, True),  # 0.72
        (64, 4096, 16, 0.1, True),  # 0.93
        (1024, 1024, 64, 0.3, True),  # 0.80
        (4096, 1024, 64, 0.3, False),  # 1.17
        (2048, 1024, 64, 0.1, False),  # 1.29
        (512, 1024, 32, 0.1, True),  # 0.78
        (2048, 1024, 128, 0.7, True),  # 0.75
    ],
)
def test_weights_that_are_held_whole_to_train(
    tokens: int, size: int, side: int, kept: float, dense: bool
) -> None:
    index = index_of(size, side, kept)
    assert block_linear.trains_dense(index, torch.bfloat16, tokens) == dense
    assert block_linear.trains_dense(index, torch.float64, tokens)  # no kernel of ours takes it


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "side", "kept", "whole", "fused"),
    [
        (2048, 2048, 256, 64, 0.2, True, False),  # 18.7 us a step, by one kernel 20.4
        (1024, 256, 5120, 16, 0.05, True, True),  # 23.5; 25.5 with zeros by a pass of their own
        (256, 768, 3072, 32, 0.7, True, True),  # 15.9; 16.9
        (4096, 5120, 512, 16, 0.7, True, False),  # 109 for 112
        (1024, 3072, 768, 16, 0.05, True, True),  # the rule errs: 26.8, blocks 23.9, dense 29.1
        (4096, 512, 512, 128, 0.6, False, False),  # 19.0 for 20.8
        (4096, 5120, 256, 128, 0.7, True, False),  # 69.7, of dense 69.3
    ],
)
def test_steps_of_tall_and_wide_weights(
    tokens: int, rows: int, columns: int, side: int, kept: float, whole: bool, fused: bool
) -> None:
    index = sized(rows, columns, side, kept)
    assert block_linear.trains_dense(index, torch.bfloat16, tokens) == whole
    assert block_linear.fuses(index, torch.bfloat16, tokens) == fused


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("tokens", "size", "side", "dtype", "whole", "room"),
    [
        (4096, 512, 32, torch.bfloat16, True, True),  # both 14.7 us, 16.5 in turn
        (128, 512, 32, torch.bfloat16, True, False),  # one launch gives both
        (1024, 3072, 32, torch.bfloat16, True, False),  # of one kernel
        (1024, 3072, 32, torch.bfloat16, False, True),
        (256, 3072, 32, torch.float32, True, True),  # of no such kernel
        (1024, 3072, 32, torch.float32, True, False),  # of 390 us, by the rule
        (8192, 4096, 64, torch.bfloat16, False, False),  # one product fills a GPU
        (64, 512, 8, torch.bfloat16, True, True),  # no kernel of ours takes blocks of 8
        (0, 512, 64, torch.bfloat16, True, True),
    ],
)
def test_gradients_beside_each_other(
    tokens: int, size: int, side: int, dtype: torch.dtype, whole: bool, room: bool
) -> None:
    index = index_of(size, side, 0.5)
    assert block_linear.room(index, dtype, tokens, whole) == room


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "room"),
    [
        (512, 4096, 512, False),  # of 128 thread blocks: a step 20.9 us, in turn 20.3
        (256, 4096, 512, True),  # they end soon
        (2048, 256, 768, True),  # of 48: both 7.8 us, in turn 11.7
        (2048, 8192, 256, True),  # of 128, each with a tile for long: a step 58.6 us, in turn 60.0
        (512, 8192, 768, False),  # of 132, tile after tile: 42.3, 41.0
    ],
)
def test_a_gradient_of_one_kernel_beside_another(
    tokens: int, rows: int, columns: int, room: bool
) -> None:
    index = sized(rows, columns, 16, 0.05)
    assert block_linear.fuses(index, torch.bfloat16, tokens)
    assert block_linear.room(index, torch.bfloat16, tokens, True) == room


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "joined"),
    [
        (2048, 2048, 512, True),  # 13.0 us, in turn 17.4, beside each other 17.9
        (512, 3072, 1024, True),  # 12.7, 16.7, 17.0
        (128, 768, 3072, True),  # 5.1, 8.9, 8.1
        (1024, 3072, 8192, True),  # 135.8, 141.5, 140.6
        (64, 1024, 2048, True),  # 5.6, 7.7, 6.9
        (64, 2048, 4096, False),  # 13.9, 13.5, 12.7
        (4096, 512, 512, False),  # 17.1, 16.5, 14.7
        (256, 8192, 512, False),  # 28.4, 14.4, 15.4
        (2048, 3072, 256, True),  # 14.2, 16.2, 16.5
        (2048, 256, 768, False),  # 9.6, 11.7, 7.8: so little a weight leaves room
        (8192, 3072, 2048, False),  # the clock falls: a step 436 us, in turn 426
        (2048, 5120, 512, False),  # 37.9, 36.3, 38.0
        (0, 512, 512, False),
    ],
)
def test_both_gradients_by_one_launch(tokens: int, rows: int, columns: int, joined: bool) -> None:
    index = sized(rows, columns, 32, 0.7)
    assert block_linear.joins(index, torch.bfloat16, tokens) == joined
    assert not block_linear.joins(index, torch.float32, tokens)  # no kernel of ours takes it


def test_the_gradient_of_the_input_walks_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_linear, "has_triton", lambda: True)
    mask = torch.arange(256 * 16).view(256, 16) % 2 == 0
    tall, wide = block_index(mask, (64, 64)), block_index(mask.t(), (64, 64))
    for part, other in ((step_time.OUTPUT, wide), (step_time.INPUT, tall)):
        assert not block_linear.pays(other, torch.bfloat16, 64, part)  # 256 blocks in a row
    assert block_linear.pays(tall, torch.bfloat16, 64)
    assert block_linear.pays(wide, torch.bfloat16, 64, step_time.INPUT)
    assert block_linear.trains_dense(tall, torch.bfloat16, 64)


@pytest.mark.parametrize(
    ("tokens", "side", "kept", "own"),
    [
        (8192, 64, 0.7, False),
        (512, 64, 0.7, False),  # 32.8 us for 31.9 of dense
        (512, 64, 0.6, True),  # 28.6
        (64, 64, 0.7, True),  # 12.6 for 14.9
        (512, 32, 0.3, False),  # 41.4 for 32.2
        (512, 128, 0.7, True),  # 25.9
    ],
)
def test_gradients_of_whole_weights(tokens: int, side: int, kept: float, own: bool) -> None:
    index = index_of(4096, side, kept)
    assert block_linear.samples(index, torch.bfloat16, tokens) == own


@pytest.mark.parametrize(
    ("size", "kept", "dense"),
    [
        (28, 0.7, True),  # blocks 0.96 times as fast as cuDNN
        (28, 0.6, True),  # 0.96
        (28, 0.5, False),  # 1.17
        (14, 0.7, False),  # 1.09
    ],
)
def test_convolutions_that_are_held_whole_to_train(
    size: int, kept: float, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_linear, "has_triton", lambda: True)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    index, pixels = index_of(256, 64, kept, window.taps), 64 * size**2
    assert block_conv2d.trains_dense(index, torch.bfloat16, pixels, window) == dense
    apart = replace(window, dilation=(2, 2))  # not measured
    assert not block_conv2d.trains_dense(index, torch.bfloat16, pixels, apart)
    assert block_conv2d.trains_dense(index, torch.float64, pixels, apart)
    # PyTorch's gradient of the weight is rounded to TF32, as products are not
    assert not block_conv2d.trains_dense(index, torch.float32, pixels, window)


@pytest.mark.parametrize(
    ("channels", "size", "images", "side", "kept", "dense"),
    [
        (128, 28, 4, 16, 0.3, True),  # 19 us for 28 to 38 of blocks
        (128, 56, 64, 16, 0.2, True),  # blocks 278 us, dense 265
        (64, 28, 64, 32, 0.5, False),  # 44 for 51
        (256, 14, 64, 64, 0.7, False),  # 82 for 91 of dense
    ],
)
def test_convolutions_of_any_size_that_are_held_whole_to_train(
    channels: int,
    size: int,
    images: int,
    side: int,
    kept: float,
    dense: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_linear, "has_triton", lambda: True)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    index, pixels = index_of(channels, side, kept, window.taps), images * size**2
    assert block_conv2d.trains_dense(index, torch.bfloat16, pixels, window) == dense


@pytest.mark.parametrize(
    ("size", "kept", "product", "gradient"),
    [
        (28, 0.7, False, False),
        (28, 0.6, False, False),  # 85 us, as cuDNN's 77 to 86 and the weight's 2.6; 100 for 97
        (28, 0.5, True, True),  # 1.21, 1.17 times as fast as cuDNN
        (14, 0.7, True, True),  # 1.15, 0.99
        (14, 1.0, False, False),
    ],
)
def test_convolutions_that_train(size: int, kept: float, product: bool, gradient: bool) -> None:
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    index, out = index_of(256, 64, kept, window.taps), (64, 256, size, size)
    assert block_conv2d.pays(index, torch.bfloat16, out, window) == product
    assert block_conv2d.pays(index, torch.bfloat16, out, window, step_time.WEIGHT) == gradient
    assert block_conv2d.pays(index, torch.bfloat16, out, replace(window, dilation=(2, 2)))
    assert block_conv2d.pays(index, torch.bfloat16, out, window, step_time.INPUT) == product
    strided = replace(window, stride=(2, 2))  # our gradient of the input costs that of stride 1
    assert not block_conv2d.pays(index, torch.bfloat16, out, strided, step_time.INPUT)


@pytest.mark.parametrize(
    ("tokens", "split"),
    [
        (512, 1),  # 5.4 us for 8.7 in two parts
        (1024, 1),  # 7.8 for 10.9
        (8192, 2),  # 62.8 for 47.9
    ],
)
def test_parts_of_the_tokens(tokens: int, split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = pytest.importorskip("kernels.cuda.sampled")  # where there is Triton
    monkeypatch.setattr(sampled, "_PROGRAMS", 1.75 * 132)  # of the CPU's one processor
    index = index_of(4096, 64, 0.05)
    x = torch.empty(tokens, 0, dtype=torch.bfloat16)
    assert sampled.plan(index, x, tokens).split == split


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(("padding", "room"), [(0, False), (1, True)])
def test_a_convolution_of_pixels_takes_the_launch_of_a_linear_layer(
    padding: int, room: bool
) -> None:
    index = index_of(256, 16, 0.5)
    assert block_linear.joins(index, torch.bfloat16, 4 * 14**2)
    sides = (1, 1), (1, 1), (padding, padding), (1, 1)
    x = torch.empty(4, 256, 14, 14, dtype=torch.bfloat16)
    grad = torch.empty(4, 256, *Window(*sides).out((14, 14)), dtype=torch.bfloat16)
    values = torch.empty(whole_shape(index))
    assert op._room(grad, x, values, index.lists, index.groups, walk=sides) == room


@pytest.mark.parametrize(
    ("pixels", "dtype", "benchmark", "searched"),
    [
        (64 * 56**2, torch.bfloat16, True, True),  # a step 275 us, by heuristics 287, dense 269
        (64 * 56**2, torch.bfloat16, False, False),  # as dense
        (64 * 56**2, torch.float32, True, False),
        (64 * 28**2, torch.bfloat16, True, False),  # 99.7, by heuristics 94.1
        (4 * 14**2, torch.bfloat16, True, False),  # little
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_cudnn_searches_for_large_products(
    pixels: int,
    dtype: torch.dtype,
    benchmark: bool,
    searched: bool,
    whole: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    index, window = index_of(128, 16, 0.2, 9), Window((3, 3), (1, 1), (1, 1), (1, 1))
    values = torch.empty(whole_shape(index) if whole else (1, *index.block), dtype=dtype)
    assert block_conv2d._searched(values, index, pixels, window) == searched


@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.parametrize(("images", "asked"), [(1, False), (256, True)])
def test_little_gradients_ask_no_benchmark(
    images: int, asked: bool, benchmark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    size, window = (images, 128, 4, 4), Window((3, 3), (1, 1), (1, 1), (1, 1))
    index = block_index(torch.ones(8, 72, dtype=torch.bool), (16, 16), 9)
    met = list[bool]()
    monkeypatch.setattr(torch._C, "_set_cudnn_benchmark", met.append)
    block_conv2d._dense_weight_grad(torch.ones(size), torch.ones(size), index, window)
    assert met == [benchmark and asked, benchmark]  # for the gradient, and behind it
    assert not torch.backends.cudnn.deterministic
