"""A convolution of which only blocks are kept, and trained."""

import torch
from torch import Tensor, nn

from kernels.block_index import BlockIndex, flat, unflat
from kernels.block_layer import TOKENS, BlockLayer, parts_of
from kernels.window import Pair, Window


class BlockConv2d(BlockLayer):
    """`nn.Conv2d` with a weight of which only some blocks are kept; it trains them alone.

    A block is some output channels by some input channels at one position of the kernel.

    Attributes:
        values: the parameter, (blocks, block rows, block columns); or the weight whole, see `of`.
        bias: the parameter (out,), or None.
        window: kernel size, stride, padding and dilation.
    """

    def __init__(
        self, window: Window, index: BlockIndex, values: Tensor, bias: Tensor | None = None
    ) -> None:
        """Args: index of the weight as a matrix, see `flat`; values (or whole), bias (out,)."""
        super().__init__(index, values, bias)
        self.window = window
        self.in_channels, self.out_channels = index.channels, index.out_features

    @classmethod
    def of(
        cls,
        conv: nn.Conv2d,
        block: tuple[int, int] = (64, 64),
        mask: Tensor | None = None,
        pixels: int = TOKENS,
        whole: bool | None = None,
    ) -> "BlockConv2d":
        """The same layer, with copies of its numbers, on the device where it is to train.

        On a GPU where dense is faster, as measured (`tune`) or else by a rule of thumb, it holds
        the weight whole, (out / h, h, taps * in / w, w), zeros elsewhere: convolutions are dense,
        and the gradient is masked. The rule is that of the weight's dtype; made under
        `torch.autocast`, of the dtype there.

        Args:
            conv: one whose weight is zero outside the kept blocks.
            block: output and input channels of a block.
            mask: (out / h, in / w, kernel height, kernel width) bool, the blocks to keep; None:
                those that are not all zeros.
            pixels: of the output that a step of training has, about: batch * height * width.
            whole: whether to hold the weight whole, in spite of the rule; None: by it.

        Raises:
            ValueError: the weight does not divide into such blocks, the mask is not of them, the
                convolution has groups or pads otherwise than with as many zeros on each side, or
                pixels are none.
        """
        window = _window(conv)
        kept = None if mask is None else _matrix_of(mask, conv, block)
        parts = parts_of(flat(conv.weight), conv.bias, block, kept, pixels, whole, window)
        return cls(window, *parts)

    def weight(self) -> Tensor:
        """The weight (out, in, *kernel size), zeros where no block is kept; differentiable."""
        return unflat(self.matrix(), self.window.kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Gives x * W + b (N, out, H', W') of x (N, in, H, W), channels last in memory."""
        layer = (self.values, self.bias, self.lists, self.groups, self.out_channels)
        walk = (self.window.kernel, *self.window.pairs)
        return torch.ops.sparse_nas.block_conv2d(x, *layer, *walk)

    def extra_repr(self) -> str:
        """What `print` shows."""
        (height, width), (stride, padding, dilation) = self.window.kernel, self.window.pairs
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size=({height}, {width}), "
            f"stride={stride}, padding={padding}, dilation={dilation}, {self.kept()}"
        )


def _matrix_of(mask: Tensor, conv: nn.Conv2d, block: Pair) -> Tensor:
    (rows, columns), (height, width) = conv.weight.shape[:2], block
    shape = (rows // height, columns // width, *conv.kernel_size)
    if tuple(mask.shape) != shape:
        raise ValueError(f"BlockConv2d: mask must be {shape}, got {tuple(mask.shape)}")
    return flat(mask)


def _window(conv: nn.Conv2d) -> Window:
    """How it walks, its padding in numbers."""
    if conv.groups != 1 or conv.padding_mode != "zeros":
        raise ValueError(
            "BlockConv2d: needs a convolution with groups=1 that pads with zeros, got "
            f"groups={conv.groups}, padding_mode={conv.padding_mode!r}"
        )
    (kernel, dilation), padding = (_pair(conv.kernel_size), _pair(conv.dilation)), conv.padding
    spread = (dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1))
    if padding == "same" and any(both % 2 for both in spread):
        raise ValueError(
            "BlockConv2d: padding='same' must be even, as much on each side, got "
            f"kernel_size={kernel}, dilation={dilation}"
        )
    if isinstance(padding, str):
        padding = (0, 0) if padding == "valid" else (spread[0] // 2, spread[1] // 2)
    return Window(kernel, _pair(conv.stride), _pair(padding), dilation)


def _pair(pair: tuple[int, ...]) -> Pair:
    height, width = pair
    return height, width
