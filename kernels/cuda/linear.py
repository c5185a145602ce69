"""`torch.ops.sparse_nas.sparse_linear` on a GPU: which kernel takes it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.calls import activation_code
from kernels.cuda import blob, entries, expand, few
from kernels.reference import activate

_MANY = 2048  # tokens from which PyTorch's 2:4 was faster than dense


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, activation: str = "none"
) -> Tensor:
    """See `kernels.sparse_linear.op`; the weight was packed on a GPU, x has its dtype.

    Raises:
        ValueError: the weight is malformed or does not fit, or an argument has another dtype,
            shape or device.
    """
    code = activation_code("sparse_linear", activation)
    blocks = blob.read(weight)
    _check(x, blocks, bias, out_features)
    shape = (*x.shape[:-1], out_features)
    tokens = aligned(x.reshape(x.shape[:-1].numel(), x.shape[-1]))
    if not len(tokens):
        return x.new_empty(shape)
    kernel = chosen(blocks, tokens)
    if kernel in ("dense", "two_of_four"):
        wide = None if bias is None else bias.to(x.dtype)
        held = blocks.values if kernel == "dense" else blocks.two_of_four
        assert held is not None
        return activate(F.linear(tokens, held, wide).contiguous(), activation).view(shape)
    wide = None if bias is None else bias.float()
    with torch.cuda.device(x.device):
        return _module(kernel).linear(blocks, tokens, wide, code).view(shape)


def chosen(blocks: blob.Blocks, tokens: Tensor) -> str:
    """The kernel for x (tokens, channels): a module here, or PyTorch's `dense`, `two_of_four`."""
    if blocks.dense:
        if entries.takes(blocks, tokens):
            return "entries"
        if expand.takes(blocks, tokens):
            return "expand"
        many = len(tokens) >= _MANY and blocks.two_of_four is not None
        return "two_of_four" if many else "dense"
    return "few" if few.takes(blocks, tokens) else "many"


def _module(kernel: str) -> Any:
    if kernel == "many":
        from kernels.cuda import many  # not at the top: Triton is imported only where it is needed

        return many
    return {"few": few, "entries": entries, "expand": expand}[kernel]


def aligned(x: Tensor) -> Tensor:
    """Gives x contiguous and from a multiple of 16 bytes on, as the copy engine wants it."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _check(x: Tensor, blocks: blob.Blocks, bias: Tensor | None, out_features: int) -> None:
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
