"""`torch.ops.sparse_nas.sparse_linear` on a GPU: which kernel takes it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.calls import activation_code
from kernels.cuda import blob, entries, expand, few, table
from kernels.reference import activate

KERNELS = ("few", "many", "entries", "expand", "two_of_four", "dense")
_MANY = 2048  # tokens from which PyTorch's 2:4 was faster than dense


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str = "none"
) -> Tensor:
    """See `kernels.sparse_linear.op`; the weight was packed on a GPU, x has its dtype.

    Raises:
        ValueError: the weight is malformed or does not fit, or an argument has another dtype,
            shape or device.
    """
    activation_code("sparse_linear", activation)
    blocks = blob.read(weight)
    check(x, blocks, bias, out_features)
    shape, tokens = (*x.shape[:-1], out_features), aligned(x)
    if not len(tokens):
        return x.new_empty(shape)
    return compute(chosen(blocks, tokens), blocks, tokens, bias, activation).view(shape)


def compute(
    kernel: str, blocks: blob.Blocks, x: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), as `aligned` gives it, by this kernel."""
    if kernel in ("dense", "two_of_four"):
        wide = None if bias is None else bias.to(x.dtype)
        held = blocks.two_of_four if kernel == "two_of_four" else blocks.whole
        assert held is not None
        return activate(F.linear(x, held, wide).contiguous(), activation)
    wide, code = None if bias is None else bias.float(), activation_code(kernel, activation)
    with torch.cuda.device(x.device):
        return _module(kernel).linear(blocks, x, wide, code)


def chosen(blocks: blob.Blocks, tokens: Tensor) -> str:
    """The kernel for x (tokens, channels): a module here, or PyTorch's `dense`, `two_of_four`.

    The fastest where it was measured (`kernels.tune`), else the one of a rule of thumb.
    """
    measured = table.fastest(blocks, len(tokens))
    if measured is not None and takes(measured, blocks, tokens):
        return measured
    if blocks.dense:
        if entries.takes(blocks, tokens):
            return "entries"
        if expand.takes(blocks, tokens):
            return "expand"
        many = len(tokens) >= _MANY and blocks.two_of_four is not None
        return "two_of_four" if many else "dense"
    return "few" if few.takes(blocks, tokens) else "many"


def takes(kernel: str, blocks: blob.Blocks, x: Tensor) -> bool:
    """Whether one of `KERNELS` computes x (tokens, channels) with this weight."""
    if kernel == "dense":
        return blocks.whole is not None
    if kernel == "two_of_four":
        return blocks.two_of_four is not None
    if kernel == "many":
        return not blocks.dense
    return kernel in KERNELS and _module(kernel).takes(blocks, x)


def _module(kernel: str) -> Any:
    if kernel == "many":
        from kernels.cuda import many  # not at the top: Triton is imported only where it is needed

        return many
    return {"few": few, "entries": entries, "expand": expand}[kernel]


def aligned(x: Tensor) -> Tensor:
    """Gives x as (tokens, channels), contiguous, from a multiple of 16 bytes on."""
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    return tokens.clone() if tokens.data_ptr() % 16 else tokens


def check(x: Tensor, blocks: blob.Blocks, bias: Tensor | None, out_features: int) -> None:
    """Raises ValueError where tensors do not fit each other."""
    shape, stored = (blocks.rows, blocks.channels), blocks.values.dtype
    if not x.dim() or (out_features, x.shape[-1]) != shape:
        raise ValueError(
            f"sparse_linear: the weight was packed as {shape}; it does not fit x "
            f"{tuple(x.shape)}, out_features={out_features}"
        )
    if x.dtype is not stored or x.device != blocks.values.device:
        raise ValueError(
            f"sparse_linear: x must be {stored} on {blocks.values.device} as the packed weight, "
            f"got {x.dtype} on {x.device}"
        )
    if bias is None:
        return
    fits = bias.dtype in (torch.float32, stored) and bias.shape == (blocks.rows,)
    if not fits or bias.device != x.device or not bias.is_contiguous():
        raise ValueError(
            f"sparse_linear: bias must be contiguous float32 or {stored} ({blocks.rows},) on "
            f"{x.device}, got {bias.dtype} {tuple(bias.shape)} on {bias.device}"
        )
