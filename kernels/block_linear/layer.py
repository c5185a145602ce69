"""A linear layer of which only blocks are kept, and trained."""

from typing import Any

import torch
from torch import Tensor, nn

from kernels.block_linear.index import (
    NAMES,
    BlockIndex,
    block_index,
    block_mask,
    gather,
    mask_of,
    scatter,
)

_STORED = ("starts", "columns")  # in a state dict; the others are made of them


class BlockLinear(nn.Module):
    """`nn.Linear` with a weight of which only some blocks are kept; it trains them alone.

    Attributes:
        values: the parameter, (blocks, block rows, block columns).
        bias: the parameter (out,), or None.
    """

    def __init__(self, index: BlockIndex, values: Tensor, bias: Tensor | None = None) -> None:
        """Args: values (blocks, h, w) as `gather` gives them of a weight, bias (out,)."""
        super().__init__()
        self.in_features, self.out_features = index.in_features, index.out_features
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)
        for name in NAMES:
            self.register_buffer(name, getattr(index, name), persistent=name in _STORED)
        self.register_load_state_dict_post_hook(_rebuild)  # type: ignore[no-untyped-call]

    @classmethod
    def of(
        cls, linear: nn.Linear, block: tuple[int, int] = (64, 64), mask: Tensor | None = None
    ) -> "BlockLinear":
        """The same layer, with copies of its numbers.

        Args:
            linear: one whose weight is zero outside the kept blocks.
            block: rows and columns of a block.
            mask: (out / h, in / w) bool, the blocks to keep; None: those that are not all zeros.

        Raises:
            ValueError: the weight does not divide into such blocks.
        """
        with torch.no_grad():
            mask = block_mask(linear.weight, block) if mask is None else mask
            index = block_index(mask.to(linear.weight.device), block)
            bias = None if linear.bias is None else linear.bias.clone()
            return cls(index, gather(linear.weight, index), bias)

    @property
    def index(self) -> BlockIndex:
        """Which blocks are kept."""
        return BlockIndex(self.out_features, self.in_features, *self._index())

    def weight(self) -> Tensor:
        """The weight (out, in), zeros where no block is kept; differentiable."""
        return scatter(self.values, self.index)

    def forward(self, x: Tensor) -> Tensor:
        """Gives x W^T + b (..., out) of x (..., in)."""
        return torch.ops.sparse_nas.block_linear(
            x, self.values, self.bias, self._index(), self.out_features
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        count, height, width = self.values.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, blocks={count} of {height}x{width}"
        )

    def _index(self) -> list[Tensor]:
        return [getattr(self, name) for name in NAMES]


def _rebuild(layer: Any, _: Any) -> None:
    """Makes what is not stored of what was loaded, and checks that."""
    index = layer.index
    width = len(index.column_starts) - 1
    group = index.groups.shape[1] - 2
    made = block_index(mask_of(index.starts, index.columns, width), index.block, group)
    for name in NAMES:
        setattr(layer, name, getattr(made, name))
