"""How the kernel of a convolution moves over an image."""

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.calls import out_size

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A convolution beside its tensors, pairs are (height, width)."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def pairs(self) -> tuple[Pair, Pair, Pair]:
        """Stride, padding and dilation, as PyTorch's functions take them."""
        return self.stride, self.padding, self.dilation

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def of_pixels(self) -> bool:
        """Whether each output pixel is a product of the input pixel at its place."""
        return (self.kernel, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0))

    def out(self, size: Sequence[int]) -> Pair:
        """Height and width of the output of an image (height, width)."""
        axes = zip(size, self.kernel, *self.pairs, strict=True)
        height, width = (out_size(*axis) for axis in axes)
        return height, width
