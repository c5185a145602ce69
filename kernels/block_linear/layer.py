"""A linear layer of which only blocks are kept, and trained."""

import torch
from torch import Tensor, nn

from kernels.block_linear.index import (
    BlockIndex,
    block_index,
    block_mask,
    gather,
    mask_of,
    scatter,
)


class BlockLinear(nn.Module):
    """`nn.Linear` with a weight of which only some blocks are kept; it trains them alone.

    Attributes:
        values: the parameter, (blocks, block rows, block columns).
        bias: the parameter (out,), or None.
    """

    lists: Tensor
    groups: Tensor

    def __init__(self, index: BlockIndex, values: Tensor, bias: Tensor | None = None) -> None:
        """Args: values (blocks, h, w) as `gather` gives them of a weight, bias (out,)."""
        super().__init__()
        self.in_features, self.out_features = index.in_features, index.out_features
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("lists", index.lists)
        self.register_buffer("groups", index.groups, persistent=False)  # made of the lists
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
        _, *block = self.values.shape
        sizes = self.out_features, self.in_features
        return BlockIndex(*sizes, (block[0], block[1]), self.lists, self.groups)

    def weight(self) -> Tensor:
        """The weight (out, in), zeros where no block is kept; differentiable."""
        return scatter(self.values, self.index)

    def forward(self, x: Tensor) -> Tensor:
        """Gives x W^T + b (..., out) of x (..., in)."""
        return torch.ops.sparse_nas.block_linear(
            x, self.values, self.bias, self.lists, self.groups, self.out_features
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        count, height, width = self.values.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, blocks={count} of {height}x{width}"
        )


def _rebuild(layer: BlockLinear, _: object) -> None:
    """Checks the lists that were loaded, and makes the groups of them."""
    index = layer.index
    mask = mask_of(index.starts, index.columns, len(index.column_starts) - 1)
    made = block_index(mask, index.block, index.groups.shape[1] - 2)
    layer.lists, layer.groups = made.lists, made.groups
