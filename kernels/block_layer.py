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
    masked,
    scatter,
    whole_of,
    whole_shape,
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
        """Args: values as `kernels.block_index.gather` or `whole_of` give them, bias (out,)."""
        super().__init__()
        blocks, whole = (len(index.columns), *index.block), whole_shape(index)
        if tuple(values.shape) not in (blocks, whole):
            raise ValueError(
                f"{type(self).__name__}: values must be {blocks}, or whole {whole}, as the index "
                f"says, got {tuple(values.shape)}"
            )
        self._sizes, self._taps = (index.out_features, index.in_features), index.taps
        self.values = nn.Parameter(masked(values, index))
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

    def matrix(self) -> Tensor:
        """The weight (out, taps * in), zeros where no block is kept; differentiable."""
        return scatter(masked(self.values, self.index), self.index)  # so its gradient is, too

    def tune(self, x: Tensor, anew: bool = False) -> dict[str, float]:
        """Measures by which way steps of training on a GPU take the least time, and takes it.

        A step is forward and backward, of x too, replayed in a CUDA graph; what was measured is
        kept (`kernels.measured`). From then on steps with as many tokens, or pixels of the output,
        go the fastest way, also of other layers of this size and about this share of blocks, and
        layers that are made for so many hold their weight so. `values` becomes another parameter
        where the fastest way holds it otherwise (whole, or its blocks): call it before an
        optimizer takes the parameters, and in one process before others start, whose times may
        choose another form.

        Args:
            x: an input as of a step, finite; under `torch.autocast` where steps are.
            anew: whether to measure what was measured before.

        Returns:
            Microseconds of a step by each way whose results are right beside float64.

        Raises:
            ValueError: the layer is not on a GPU, x does not fit it, is empty or not finite, or
                what is multiplied is not float32, bfloat16 or float16.
        """
        if not self.values.is_cuda:
            raise ValueError(f"tune: needs a layer on a GPU, got one on {self.values.device}")
        from kernels.cuda import step_tuning  # not at the top: nobody without a GPU needs it

        values, us = step_tuning.tune(self, x, anew)
        if values.shape != self.values.shape:
            with torch.inference_mode(False):
                self.values = nn.Parameter(values, self.values.requires_grad)
        return us

    def _apply(self, fn: Any, recurse: bool = True) -> "BlockLayer":
        """Values lie in order, also in a model that was moved to torch.channels_last."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for part in (self.values, self.values.grad):
            if part is not None and not part.is_contiguous():
                part.data = part.data.contiguous()
        return self

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
    whole: bool | None,
    window: Window | None = None,
) -> tuple[BlockIndex, Tensor, Tensor | None]:
    """An index, values and bias for a layer, copies: of a matrix (out, taps * in) and its bias.

    Args:
        weight: zero outside the kept blocks.
        bias: (out,), or None.
        block: rows and columns of a block.
        mask: (out / h, taps * in / w) bool, the blocks to keep; None: those not all zeros.
        tokens: that a step of training has, or pixels of the output.
        whole: whether to hold the weight whole; None: on a GPU where that is faster.
        window: of a convolution.
    """
    if tokens < 1:
        raise ValueError(f"BlockLayer: tokens, or pixels, must be at least 1, got {tokens}")
    with torch.no_grad():
        mask = block_mask(weight, block) if mask is None else mask
        taps = 1 if window is None else window.taps
        index = block_index(mask.to(weight.device), block, taps)
        values = gather(weight, index)
        if whole is None:
            whole = weight.is_cuda and _trains_dense(index, weight.dtype, tokens, window)
        values = whole_of(values, index) if whole else values
        return index, values, None if bias is None else bias.clone()


def _trains_dense(
    index: BlockIndex, dtype: torch.dtype, tokens: int, window: Window | None
) -> bool:
    from kernels.cuda import block_conv2d, block_linear  # not at the top: where there is a GPU

    if torch.is_autocast_enabled("cuda") and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype("cuda")
    if window is None:
        return block_linear.trains_dense(index, dtype, tokens)
    return block_conv2d.trains_dense(index, dtype, tokens, window)


def _converted(layer: BlockLayer, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Makes values of a state whole, or blocks of them, as those of the layer are.

    What does not fit is left to PyTorch, which says so; then nothing of the layer changes.
    """
    name, listed, index = f"{prefix}values", f"{prefix}lists", layer.index
    values, lists = state.get(name), state.get(listed, layer.lists)
    if values is None:
        return
    if lists.shape != layer.lists.shape:
        state[name] = layer.values.detach()  # the lists are refused: nothing is to change
        return
    fits = whole_shape(index) if is_whole(values) else (len(index.columns), *index.block)
    if values.shape != fits:
        state[listed] = layer.lists
        return
    if not is_whole(values) and not is_whole(layer.values):
        return
    held = replace(index, lists=lists.to(values.device, torch.int32))
    mask_of(held.starts, held.columns, index.in_features // index.block[1])
    blocks = gather(scatter(values, held), held) if is_whole(values) else values
    state[name] = whole_of(blocks, held) if is_whole(layer.values) else blocks


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
    if is_whole(layer.values):  # also where a state held lists alone
        layer.values.data.copy_(masked(layer.values.data, index))
