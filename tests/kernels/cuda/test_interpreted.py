"""The Triton kernels without a GPU: `TRITON_INTERPRET=1 pytest`, with triton installed.

The interpreter computes float32 and float16 right, bfloat16 not.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kernels.block_conv2d import reference as of_images
from kernels.block_index import BlockIndex, block_index, flat, scatter, whole_of
from kernels.block_linear import reference
from kernels.calls import ACTIVATIONS
from kernels.cuda import blob, pack
from kernels.reference import activate
from kernels.window import Window

pytest.importorskip("triton")
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3}
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def loop_bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With NumPy 2, Triton 3.6's interpreter does not take a bound that was loaded from memory."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    yield


def test_stages_are_as_many_as_shared_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.cuda import many

    device, size = torch.device("cuda:0"), (512 + 64) * 128
    monkeypatch.setattr(many, "most_shared", {0: 101376}.__getitem__)  # of 8.6, 8.9 and 12.0
    assert [many.fitting(3, size, bulk, device) for bulk in (False, True)] == [2, 1]
    assert many.fitting(2, size // 8, True, device) == 2
    assert many.fitting(3, 10 * size, False, device) == 1
    assert many.fitting(3, 10 * size, False, torch.device("cpu")) == 3


@pytest.mark.parametrize("tokens", [1, 70, 130])
@pytest.mark.parametrize("block", [(16, 16), (32, 64), (128, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_tokens(dtype: torch.dtype, block: tuple[int, int], tokens: int) -> None:
    from kernels.cuda import many

    torch.manual_seed(tokens)
    grid = torch.rand(256 // block[0], 128 // block[1]) < 0.4
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight = (torch.randn(256, 128) * mask).to(dtype)
    blocks = blob.read(pack.pack_linear(weight).data)
    x, bias = torch.randn(tokens, 128).to(dtype), torch.randn(256)
    every = 1 if (block, tokens) == ((32, 64), 70) else 4  # else the first and the last
    for name, code in list(ACTIVATIONS.items())[::every]:
        sums = F.linear(x.double(), weight.double(), bias.double())
        true, added = activate(sums, name), torch.randn(tokens, 256).to(dtype)
        y = many.linear(blocks, x, bias, code, residual=added)
        assert close(y, activate(sums + added.double(), name))
        y = many.linear(blocks, x, bias, code)
        assert (y.double() - true).norm() <= BOUND[dtype] * true.norm()


def index_of(block: tuple[int, int], group: int | None = None) -> BlockIndex:
    """Of 6 x 9 blocks; a row and a column are empty, a row is full."""
    mask = torch.rand(6, 9) < 0.4
    mask[0], mask[1], mask[:, 3] = True, False, False
    return block_index(mask, block, group=group)


def close(y: torch.Tensor, true: torch.Tensor) -> bool:
    return bool((y.double() - true).norm() <= BOUND[y.dtype] * true.norm())


@pytest.mark.parametrize("tokens", [1, 70, 130])
@pytest.mark.parametrize("block", [(16, 16), (32, 64), (128, 32)])
@pytest.mark.parametrize("dtype", BOUND)
def test_a_layer_and_the_gradient_of_its_input(
    dtype: torch.dtype, block: tuple[int, int], tokens: int
) -> None:
    from kernels.cuda import many

    torch.manual_seed(tokens)
    index = index_of(block)
    values = torch.randn(len(index.columns), *block).to(dtype)
    x, grad = (torch.randn(tokens, n).to(dtype) for n in (index.in_features, index.out_features))
    bias = torch.randn(index.out_features).to(dtype)
    y = many.product(many.by_rows(index, values), x, bias)
    assert close(y, reference.forward(x.double(), values.double(), bias.double(), index))
    given = many.product(many.by_columns(index, values), grad, None)
    assert close(given, reference.input_grad(grad.double(), values.double(), index))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("tokens", [1, 70, 130])
@pytest.mark.parametrize(("block", "group"), [((16, 16), 4), ((32, 64), 3), ((128, 32), 1)])
@pytest.mark.parametrize("dtype", BOUND)
def test_the_gradient_of_a_weight(
    dtype: torch.dtype, block: tuple[int, int], group: int, tokens: int, split: int
) -> None:
    from kernels.cuda import sampled

    torch.manual_seed(tokens)
    index = index_of(block, group)
    x, grad = (torch.randn(tokens, n).to(dtype) for n in (index.in_features, index.out_features))
    found = sampled.weight_grad(index, grad, x, sampled.Plan(split, 32, 4, 2, False))
    assert close(found, reference.weight_grad(grad.double(), x.double(), index))


WALKS = [
    ((1, 1), (1, 1), (1, 1), (3, 3)),
    ((2, 2), (1, 1), (1, 1), (3, 3)),
    ((1, 2), (0, 3), (2, 1), (3, 2)),
    ((2, 2), (0, 0), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("block", [(16, 16), (64, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_convolution(dtype: torch.dtype, block: tuple[int, int], walk: Any) -> None:
    from kernels.cuda import implicit, many

    stride, padding, dilation, kernel = walk
    torch.manual_seed(1)
    grid = torch.rand(64 // block[0], 64 // block[1], *kernel) < 0.4
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight, bias = (torch.randn(64, 64, *kernel) * mask).to(dtype), torch.randn(64)
    blocks = many.packed(blob.read(pack.pack_conv2d(weight).data))
    x = torch.randn(2, 64, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    wide = (x.double(), weight.double(), bias.double())
    true = F.conv2d(*wide, stride, padding, dilation)
    out: Any = tuple(true.shape)
    walked = (blocks, x, bias, Window(kernel, stride, padding, dilation), out)
    y = implicit.conv2d(*walked, 1)
    assert close(y, true.relu())
    added = torch.randn(out).to(dtype).contiguous(memory_format=torch.channels_last)
    y = implicit.conv2d(*walked, 4, residual=added)
    assert close(y, F.gelu(true + added.double()))


WINDOWS = [  # kernel, stride, padding, dilation
    Window((3, 3), (1, 1), (1, 1), (1, 1)),
    Window((3, 3), (2, 2), (1, 1), (1, 1)),
    Window((3, 2), (1, 2), (4, 3), (2, 1)),  # padding may be more than the kernel reaches
    Window((1, 1), (2, 1), (0, 0), (1, 1)),
    Window((1, 1), (1, 1), (1, 2), (1, 1)),
    Window((1, 1), (1, 1), (0, 0), (1, 1)),
]


def of_window(block: tuple[int, int], window: Window, group: int | None = None) -> BlockIndex:
    """Of 3 x 4 blocks at each position; a row and input channels are empty, a row is full."""
    mask = torch.rand(3, 4, *window.kernel) < 0.4
    mask[0], mask[1], mask[:, 2] = True, False, False
    return block_index(flat(mask), block, window.taps, group)


def images(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def bulk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The CPU is taken for a GPU, which has a copy engine or not."""
    from kernels.cuda import block_conv2d, block_linear, implicit, many

    def brings(x: torch.Tensor, stride: tuple[int, int], _: str) -> bool:
        return bool(request.param) and not any(
            size % by for size, by in zip(x.shape[2:], stride, strict=True)
        )

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(implicit, "brings", brings)
    for module in (block_linear, block_conv2d):
        monkeypatch.setattr(module, "pays", lambda *_, **__: True)
    monkeypatch.setattr(many, "gdc_wait", lambda: None)
    monkeypatch.setattr(many, "gdc_launch_dependents", lambda: None)
    return bool(request.param)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 8, 6)])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("dtype", "block", "bulk"),
    [(torch.float32, (16, 16), False), (torch.float16, (32, 64), True)],
    indirect=["bulk"],
)
def test_a_convolution_of_blocks_and_its_gradients(
    dtype: torch.dtype,
    block: tuple[int, int],
    bulk: bool,
    window: Window,
    size: tuple[int, int, int],
) -> None:
    from kernels.cuda import block_conv2d

    torch.manual_seed(size[2])
    if min(window.out(size[1:])) < 1:
        pytest.skip("nothing comes out")
    index = of_window(block, window)
    values = torch.randn(len(index.columns), *block).to(dtype)
    x = images(dtype, size[0], index.channels, *size[1:])
    grad = images(dtype, size[0], index.out_features, *window.out(size[1:]))
    bias = torch.randn(index.out_features).to(dtype)
    wide = (values.double(), index, window)
    y = block_conv2d.forward(x, values, bias, index, window)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert close(y, of_images.forward(x.double(), wide[0], bias.double(), *wide[1:]))
    given = block_conv2d.input_grad(grad, values, index, window, size[1:])
    assert given.is_contiguous(memory_format=torch.channels_last)
    assert close(given, of_images.input_grad(grad.double(), *wide, size[1:]))
    found = block_conv2d.weight_grad(grad, x, index, window)
    assert close(found, of_images.weight_grad(grad.double(), x.double(), *wide[1:]))


@pytest.mark.parametrize("block", [(16, 16), (32, 64), (128, 32)])
@pytest.mark.parametrize("dtype", BOUND)
def test_where_dense_is_faster(
    dtype: torch.dtype, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.cuda import block_linear, whole

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(block_linear, "pays", lambda *_, **__: False)
    torch.manual_seed(2)
    for index in (
        index_of(block),
        block_index(torch.zeros(2, 5, dtype=torch.bool), block),
        block_index(torch.rand(2, 150) < 0.9, block),  # more than are looked through at once
    ):
        values = torch.randn(len(index.columns), *block).to(dtype)
        matrix = whole.matrix_of(values, index)
        assert torch.equal(matrix, scatter(values, index))
        assert torch.equal(whole.blocks_of(matrix, index), values)
        x, grad = (torch.randn(7, n).to(dtype) for n in (index.in_features, index.out_features))
        bias, wide = torch.randn(index.out_features).to(dtype), (values.double(), index)
        y = block_linear.forward(x, values, bias, index)
        assert close(y, reference.forward(x.double(), values.double(), bias.double(), index))
        given = block_linear.input_grad(grad, values, index)
        assert close(given, reference.input_grad(grad.double(), *wide))
        found = block_linear.weight_grad(grad, x, index)
        assert close(found, reference.weight_grad(grad.double(), x.double(), index))
        held = whole_of(values, index)
        assert torch.equal(block_linear.forward(x, held, bias, index), y)
        assert torch.equal(block_linear.input_grad(grad, held, index), given)
        for own in (False, True):  # by a dense product, at the blocks alone
            monkeypatch.setattr(block_linear, "samples", lambda *_, own=own: own)
            masked = block_linear.masked_grad(grad, x, index)
            assert close(masked, whole_of(found.double(), index))
            assert not masked[whole_of(torch.ones_like(values), index) == 0].any()


@pytest.mark.parametrize("window", [w for w in WINDOWS if w.dilation == (1, 1)])
def test_where_a_dense_convolution_is_faster(
    window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kernels.cuda import block_conv2d, block_linear, many, sampled, sampled_conv2d

    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    for of in (block_linear, block_conv2d):
        monkeypatch.setattr(of, "pays", lambda *_, **__: False)
    for module, name in (
        *((many, "by_rows"), (many, "by_columns")),
        *((sampled, "weight_grad"), (sampled_conv2d, "weight_grad")),
    ):
        monkeypatch.delattr(module, name)  # none of our kernels is taken
    torch.manual_seed(3)
    index, size = of_window((16, 32), window), (8, 6)
    values, bias = torch.randn(len(index.columns), 16, 32), torch.randn(index.out_features)
    x = images(torch.float32, 2, index.channels, *size)
    grad = images(torch.float32, 2, index.out_features, *window.out(size))
    wide = (values.double(), index, window)
    y = block_conv2d.forward(x, values, bias, index, window)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert close(y, of_images.forward(x.double(), wide[0], bias.double(), *wide[1:]))
    given = block_conv2d.input_grad(grad, values, index, window, size)
    assert given.is_contiguous(memory_format=torch.channels_last)
    assert close(given, of_images.input_grad(grad.double(), *wide, size))
    found = block_conv2d.weight_grad(grad, x, index, window)
    assert close(found, of_images.weight_grad(grad.double(), x.double(), *wide[1:]))
    held = whole_of(values, index)
    assert torch.equal(block_conv2d.forward(x, held, bias, index, window), y)
    assert torch.equal(block_conv2d.input_grad(grad, held, index, window, size), given)
    masked = block_conv2d.masked_grad(grad, x, index, window)
    assert torch.equal(masked, whole_of(found, index))


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("dtype", "block", "group", "bulk"),
    [(torch.float32, (16, 16), 4, False), (torch.float16, (32, 64), 1, True)],
    indirect=["bulk"],
)
def test_the_gradient_of_a_convolution_s_weight(
    dtype: torch.dtype,
    block: tuple[int, int],
    group: int,
    window: Window,
    split: int,
    bulk: bool,
) -> None:
    from kernels.cuda import sampled, sampled_conv2d

    torch.manual_seed(split)
    index = of_window(block, window, group)
    size = (30 if split == 3 else 5, 2, 4)  # of many images a step takes one pixel each
    x = images(dtype, size[0], index.channels, *size[1:])
    grad = images(dtype, size[0], index.out_features, *window.out(size[1:]))
    assert (sampled_conv2d.step_of((size[0], *grad.shape[2:]), 32)[0] == 32) == (split == 3)
    how = sampled.Plan(split, 32, 4, 2, bulk)
    found = sampled_conv2d.weight_grad(index, grad, x, window, how)
    assert close(found, of_images.weight_grad(grad.double(), x.double(), index, window))
