"""What layers share of whose weight only blocks are kept."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.block_index import (
    BlockIndex,
    block_index,
    block_mask,
    block_of,
    gather,
    is_whole,
    mask_of,
    scatter,
    whole,
)
from kernels.window import Window

TOKENS = 8192  # of a step of training, where nobody says


class BlockLayer(nn.Module):
    """Keeps the blocks of a weight, seen as a matrix (out, taps * in), and trains them alone.

    Attributes:
        values: the parameter, (blocks, block rows, block columns); or the weight whole, (out /
            block rows, block rows, taps * in / block columns, block columns), zeros elsewhere.
        bias: the parameter (out,), or None.
    """

    lists: Tensor
    groups: Tensor

    def __init__(self, index: BlockIndex, values: Tensor, bias: Tensor | None = None) -> None:
        """Args: values as `gather` or `whole` of `kernels.block_index` give them, bias (out,)."""
        super().__init__()
        self._sizes, self._taps = (index.out_features, index.in_features), index.taps
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("lists", index.lists)
        self.register_buffer("groups", index.groups, persistent=False)  # made of the lists
        self.register_load_state_dict_pre_hook(_converted)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_rebuild)  # type: ignore[no-untyped-call]

    @property
    def index(self) -> BlockIndex:
        """Which blocks are kept."""
        height, width = block_of(self.values)
        return BlockIndex(*self._sizes, (height, width), self.lists, self.groups, self._taps)

    def kept(self) -> str:
        """What `print` shows of its parameters."""
        count, (height, width) = len(self.index.columns), block_of(self.values)
        held = ", held whole" if is_whole(self.values) else ""
        return f"bias={self.bias is not None}, blocks={count} of {height}x{width}{held}"


def parts_of(
    weight: Tensor,
    bias: Tensor | None,
    block: tuple[int, int],
    mask: Tensor | None,
    tokens: int,
    window: Window | None = None,
) -> tuple[BlockIndex, Tensor, Tensor | None]:
    """An index, values and bias for a layer, copies: of a matrix (out, taps * in) and its bias.

    Args:
        weight: zero outside the kept blocks.
        bias: (out,), or None.
        block: rows and columns of a block.
        mask: (out / h, taps * in / w) bool, the blocks to keep; None: those not all zeros.
        tokens: that a step of training has, or pixels of the output.
        window: of a convolution.
    """
    if tokens < 1:
        raise ValueError(
            f"block layer: tokens or pixels of a step must be at least 1, got {tokens}"
        )
    with torch.no_grad():
        mask = block_mask(weight, block) if mask is None else mask
        taps = 1 if window is None else window.taps
        index = block_index(mask.to(weight.device), block, taps)
        values = gather(weight, index)
        if weight.is_cuda and _trains_dense(index, weight.dtype, tokens, window):
            values = whole(values, index)
        return index, values, None if bias is None else bias.clone()


def _trains_dense(
    index: BlockIndex, dtype: torch.dtype, tokens: int, window: Window | None
) -> bool:
    from kernels.cuda import block_conv2d, block_linear  # not at the top: where there is a GPU

    if window is None or window.of_pixels:
        return block_linear.trains_dense(index, dtype, tokens)
    return block_conv2d.trains_dense(index, dtype, tokens, window)


def _converted(layer: BlockLayer, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Makes values of a state whole, or blocks of them, as those of the layer are."""
    values, lists = state.get(f"{prefix}values"), state.get(f"{prefix}lists")
    if values is None or lists is None or is_whole(values) == is_whole(layer.values):
        return
    index = layer.index
    if lists.shape != layer.lists.shape or block_of(values) != index.block:
        return  # PyTorch says so
    held = replace(index, lists=lists.to(index.lists.device))
    mask_of(held.starts, held.columns, index.in_features // index.block[1])
    held = held.to(values.device)
    made = gather(scatter(values, held), held) if is_whole(values) else whole(values, held)
    state[f"{prefix}values"] = made


def _rebuild(layer: BlockLayer, _: object) -> None:
    """Checks the lists that were loaded, and makes the groups of them."""
    index = layer.index
    mask = mask_of(index.starts, index.columns, index.in_features // index.block[1])
    made = block_index(mask, index.block, index.taps, index.groups.shape[1] - 2)
    layer.lists.copy_(made.lists)  # a captured graph reads them where they are
    if layer.groups.shape == made.groups.shape:
        layer.groups.copy_(made.groups)
    else:
        layer.groups = made.groups
