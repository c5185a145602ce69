"""A linear layer of which only blocks are kept, and trained."""

import torch
from torch import Tensor, nn

from kernels.block_index import BlockIndex
from kernels.block_layer import TOKENS, BlockLayer, parts_of


class BlockLinear(BlockLayer):
    """`nn.Linear` with a weight of which only some blocks are kept; it trains them alone.

    Attributes:
        values: the parameter, (blocks, block rows, block columns); or the weight whole, see `of`.
        bias: the parameter (out,), or None.
    """

    def __init__(self, index: BlockIndex, values: Tensor, bias: Tensor | None = None) -> None:
        """Args: values as `kernels.block_index.gather` or `whole_of` give them, bias (out,)."""
        super().__init__(index, values, bias)
        self.in_features, self.out_features = index.in_features, index.out_features

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        block: tuple[int, int] = (64, 64),
        mask: Tensor | None = None,
        tokens: int = TOKENS,
        whole: bool | None = None,
    ) -> "BlockLinear":
        """The same layer, with copies of its numbers, on the device where it is to train.

        On a GPU where dense is faster, as measured (`tune`) or else by a rule of thumb, it holds
        the weight whole, (out / h, h, in / w, w), zeros elsewhere: products are dense, and the
        gradient is masked. The rule is that of the weight's dtype; made under `torch.autocast`, of
        the dtype there.

        Args:
            linear: one whose weight is zero outside the kept blocks.
            block: rows and columns of a block.
            mask: (out / h, in / w) bool, the blocks to keep; None: those that are not all zeros.
            tokens: that a step of training has; about, where nothing was measured.
            whole: whether to hold the weight whole, in spite of the rule; None: by it.

        Raises:
            ValueError: the weight does not divide into such blocks, or tokens are none.
        """
        return cls(*parts_of(linear.weight, linear.bias, block, mask, tokens, whole))

    def weight(self) -> Tensor:
        """The weight (out, in), zeros where no block is kept; differentiable."""
        return self.matrix()

    def forward(self, x: Tensor) -> Tensor:
        """Gives x W^T + b (..., out) of x (..., in)."""
        return torch.ops.sparse_nas.block_linear(
            x, self.values, self.bias, self.lists, self.groups, self.out_features
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kept()}"
