"""`torch.ops.sparse_nas.sparse_linear` on a GPU: which kernel takes it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.calls import activation_code
from kernels.cuda import blob, entries, expand, few, halves, hopper, table, two_of_four
from kernels.cuda.blocks import LINEAR, MANY, Blocks
from kernels.cuda.driver import has_triton
from kernels.reference import activate

KERNELS = (
    *("few", "many", "hopper", "entries", "expand", "halves", "two_of_four", "channel", "dense"),
)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """See `kernels.sparse_linear.op`; the weight was packed on a GPU, x has its dtype.

    Raises:
        ValueError: the weight is malformed or does not fit, or an argument has another dtype,
            shape or device.
    """
    blocks = blob.read(weight)
    if blocks.form.operation != LINEAR or not x.dim():
        raise ValueError(_mismatch(x, blocks, out_features))
    if (out_features, x.shape[-1]) != (blocks.rows, blocks.channels):
        raise ValueError(_mismatch(x, blocks, out_features))
    activation_code("sparse_linear", activation)
    check("sparse_linear", x, blocks, bias)
    tokens = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    added = None if residual is None else residual.reshape(len(tokens), out_features)
    return product(blocks, tokens, bias, activation, added).view(*x.shape[:-1], out_features)


def product(
    blocks: Blocks,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
) -> Tensor:
    """Gives act(x W^T + b + residual) (tokens, rows), contiguous, of x (tokens, channels)."""
    if not len(x):
        return x.new_empty(0, blocks.rows)
    tokens = aligned(x)
    kernel = chosen(blocks, tokens)
    if kernel == "hopper" and residual is not None and has_triton():
        kernel = "many"  # adds it in one go
    if residual is None:
        return compute(kernel, blocks, tokens, bias, activation)
    if kernel != "many":
        return activate(compute(kernel, blocks, tokens, bias, "none").add_(residual), activation)
    wide, code = None if bias is None else bias.float(), activation_code(kernel, activation)
    with torch.cuda.device(x.device):
        y: Tensor = _module(kernel).linear(blocks, tokens, wide, code, residual=aligned(residual))
        return y


def compute(
    kernel: str, blocks: Blocks, x: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), as `aligned` gives it, by this kernel."""
    here: Any = torch.cuda.device_of
    with here(x):
        if kernel in ("dense", "two_of_four", "channel"):
            return _by_pytorch(kernel, blocks, x, bias, activation)
        wide, code = None if bias is None else bias.float(), activation_code(kernel, activation)
        y: Tensor = _module(kernel).linear(blocks, x, wide, code)
        return y


def _by_pytorch(
    kernel: str, blocks: Blocks, x: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    same = None if bias is None else bias.to(x.dtype)
    if kernel == "two_of_four":
        return activate(two_of_four.linear(blocks, x, same), activation)
    if kernel == "channel":
        held = None if same is None else same[blocks.order]
        kept = activate(F.linear(x, blocks.values, held), activation)
        return spread(kept, blocks, bias, activation)
    assert blocks.whole is not None
    return activate(F.linear(x, blocks.whole, same), activation)


def spread(kept: Tensor, blocks: Blocks, bias: Tensor | None, activation: str) -> Tensor:
    """Gives (n, rows) of what a channel pattern keeps (n, rows kept); of others the bias."""
    y = kept.new_zeros(len(kept), blocks.rows)
    if bias is not None:
        y.copy_(activate(bias.float(), activation))
    return y.index_copy_(1, blocks.order, kept)


def chosen(blocks: Blocks, tokens: Tensor) -> str:
    """The kernel for x (tokens, channels): a module here, or what PyTorch's product is given.

    That is the whole weight (`dense`, `two_of_four`) or the rows that are kept (`channel`). The
    fastest where it was measured (`kernels.tune`), else the one of a rule of thumb.
    """
    count = len(tokens)
    case = lambda: table.linear_case(blocks, count)  # noqa: E731
    measured = table.fastest(blocks, table.bucket(count), case)
    if measured is not None and takes(measured, blocks, tokens):
        return measured
    if blocks.is_channel:
        return "channel"
    if blocks.dense:
        if entries.takes(blocks, tokens) and entries.pays(blocks):
            return "entries"
        if expand.takes(blocks, tokens) and expand.pays(blocks, tokens):
            return "expand"
        if halves.takes(blocks, tokens) and halves.pays(blocks, tokens):
            return "halves"
        return "two_of_four" if two_of_four.takes(blocks, tokens) else "dense"
    dense = blocks.whole is not None
    if few.takes(blocks, tokens):
        return "dense" if dense and not few.pays(blocks, tokens) else "few"
    if dense and not (has_triton() and pays(blocks, count)):
        return "dense"
    return "hopper" if hopper.pays(blocks, tokens) and hopper.takes(blocks, tokens) else "many"


def pays(blocks: Blocks, tokens: int) -> bool:
    """Whether blocks are faster than dense with many tokens, by a rule of thumb.

    Of a small product the longest row of blocks decides, of a narrow one the bytes of a token.
    Microseconds are those of an H200.
    """
    if blocks.values.itemsize != 2:
        return blocks.pays(tokens, blocks.kept)
    height, width = blocks.block
    longest = blocks.longest * width / blocks.channels
    programs = blocks.rows // height * -(-tokens // (128 if height == 128 else 256))
    multiplied = 2 * tokens * blocks.rows * blocks.channels / 850e6
    moved = 2 * tokens * (blocks.rows + blocks.channels)
    narrow = moved > 2**26 and moved / 3.7e6 > multiplied
    ours = 2 + 0.5 * blocks.longest * max(1, width // 64)
    least = 3.3 + max(multiplied, 0.0011 * blocks.channels)
    kept = longest if tokens > MANY and programs <= 400 else blocks.kept
    return ours <= least and blocks.pays(tokens, kept / (0.6 if narrow else 1))


def takes(kernel: str, blocks: Blocks, x: Tensor) -> bool:
    """Whether one of `KERNELS` computes x (tokens, channels) with this weight."""
    if kernel == "dense":
        return blocks.whole is not None
    if kernel == "two_of_four":
        return two_of_four.takes(blocks, x)
    if kernel == "channel":
        return blocks.is_channel
    if kernel == "many":
        return blocks.in_blocks and has_triton()
    return kernel in KERNELS and _module(kernel).takes(blocks, x)


def _module(kernel: str) -> Any:
    if kernel == "many":
        from kernels.cuda import many  # not at the top: Triton is imported only where it is needed

        return many
    found = {"few": few, "hopper": hopper, "entries": entries, "expand": expand, "halves": halves}
    return found[kernel]


def aligned(x: Tensor) -> Tensor:
    """Gives x contiguous and from a multiple of 16 bytes on, as the copy engine wants it."""
    x = x.contiguous()
    if 1 in x.shape:  # where a size is 1 the stride may be anything
        x = x.view(-1).view(x.shape)
    return x.clone() if x.data_ptr() % 16 else x


def _mismatch(x: Tensor, blocks: Blocks, out_features: int) -> str:
    kind = blob.OPERATIONS[blocks.form.operation]
    return (
        f"sparse_linear: the weight was packed as {(blocks.rows, blocks.channels)} for {kind}; it "
        f"does not fit x {tuple(x.shape)}, out_features={out_features}"
    )


def check(name: str, x: Tensor, blocks: Blocks, bias: Tensor | None) -> None:
    """Checks dtypes, devices and the bias.

    Raises:
        ValueError: names the tensor, the rule and what was given.
    """
    stored = blocks.values.dtype
    if x.dtype is not stored or x.device != blocks.values.device:
        raise ValueError(
            f"{name}: x must be {stored} on {blocks.values.device} as the packed weight, "
            f"got {x.dtype} on {x.device}"
        )
    if bias is None:
        return
    fits = bias.dtype in (torch.float32, stored) and bias.shape == (blocks.rows,)
    if not fits or bias.device != x.device or not bias.is_contiguous():
        raise ValueError(
            f"{name}: bias must be contiguous float32 or {stored} ({blocks.rows},) on "
            f"{x.device}, got {bias.dtype} {tuple(bias.shape)} strides {bias.stride()} on "
            f"{bias.device}"
        )
