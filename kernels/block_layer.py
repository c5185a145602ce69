"""What layers share of whose weight only blocks are kept."""

import torch
from torch import Tensor, nn

from kernels.block_index import BlockIndex, block_index, block_mask, gather, mask_of


class BlockLayer(nn.Module):
    """Keeps the blocks of a weight, seen as a matrix (out, taps * in), and trains them alone.

    Attributes:
        values: the parameter, (blocks, block rows, block columns).
        bias: the parameter (out,), or None.
    """

    lists: Tensor
    groups: Tensor

    def __init__(self, index: BlockIndex, values: Tensor, bias: Tensor | None = None) -> None:
        """Args: values (blocks, h, w) as `gather` gives them of a weight, bias (out,)."""
        super().__init__()
        self._sizes, self._taps = (index.out_features, index.in_features), index.taps
        self.values = nn.Parameter(values)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("lists", index.lists)
        self.register_buffer("groups", index.groups, persistent=False)  # made of the lists
        self.register_load_state_dict_post_hook(_rebuild)  # type: ignore[no-untyped-call]

    @property
    def index(self) -> BlockIndex:
        """Which blocks are kept."""
        _, *block = self.values.shape
        return BlockIndex(*self._sizes, (block[0], block[1]), self.lists, self.groups, self._taps)

    def kept(self) -> str:
        """What `print` shows of its parameters."""
        count, height, width = self.values.shape
        return f"bias={self.bias is not None}, blocks={count} of {height}x{width}"


def parts_of(
    weight: Tensor,
    bias: Tensor | None,
    block: tuple[int, int],
    mask: Tensor | None,
    taps: int = 1,
) -> tuple[BlockIndex, Tensor, Tensor | None]:
    """An index, values and bias for a layer, copies: of a matrix (out, taps * in) and its bias.

    Args:
        weight: zero outside the kept blocks.
        bias: (out,), or None.
        block: rows and columns of a block.
        mask: (out / h, taps * in / w) bool, the blocks to keep; None: those not all zeros.
        taps: of the weight.
    """
    with torch.no_grad():
        mask = block_mask(weight, block) if mask is None else mask
        index = block_index(mask.to(weight.device), block, taps)
        return index, gather(weight, index), None if bias is None else bias.clone()


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
