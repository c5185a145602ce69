"""The Triton kernels without a GPU: `TRITON_INTERPRET=1 pytest`, with triton installed.

The interpreter computes float32 and float16 right, bfloat16 not.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kernels.block_index import BlockIndex, block_index
from kernels.block_linear import reference
from kernels.calls import ACTIVATIONS
from kernels.cuda import blob, pack
from kernels.reference import activate

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
    for name, code in ACTIVATIONS.items():
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
    from kernels.cuda import implicit

    stride, padding, dilation, kernel = walk
    torch.manual_seed(1)
    grid = torch.rand(128 // block[0], 64 // block[1], *kernel) < 0.4
    mask = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    weight, bias = (torch.randn(128, 64, *kernel) * mask).to(dtype), torch.randn(128)
    blocks = blob.read(pack.pack_conv2d(weight).data)
    x = torch.randn(3, 64, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    wide = (x.double(), weight.double(), bias.double())
    true = F.conv2d(*wide, stride, padding, dilation)
    out: Any = tuple(true.shape)
    y = implicit.conv2d(blocks, x, bias, implicit.Walk(stride, padding, dilation), out, 1)
    assert close(y, true.relu())
    added = torch.randn(out).to(dtype).contiguous(memory_format=torch.channels_last)
    walked = (blocks, x, bias, implicit.Walk(stride, padding, dilation), out)
    y = implicit.conv2d(*walked, 4, residual=added)
    assert close(y, F.gelu(true + added.double()))
