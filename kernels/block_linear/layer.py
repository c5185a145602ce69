"""A linear layer of which only blocks are kept, and trained."""

import torch
from torch import Tensor, nn

from kernels.block_index import BlockIndex, scatter
from kernels.block_layer import BlockLayer, parts_of


class BlockLinear(BlockLayer):
    """`nn.Linear` with a weight of which only some blocks are kept; it trains them alone.

    Attributes:
        values: the parameter, (blocks, block rows, block columns).
        bias: the parameter (out,), or None.
    """

    def __init__(self, index: BlockIndex, values: Tensor, bias: Tensor | None = None) -> None:
        """Args: values (blocks, h, w) as `gather` gives them of a weight, bias (out,)."""
        super().__init__(index, values, bias)
        self.in_features, self.out_features = index.in_features, index.out_features

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
        return cls(*parts_of(linear.weight, linear.bias, block, mask))

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
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kept()}"
