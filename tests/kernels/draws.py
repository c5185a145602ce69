"""What the kernel tests draw, and how they compare."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.calls import ACTIVATIONS

activations = st.sampled_from(list(ACTIVATIONS))
seeds = st.integers(0, 2**31 - 1)
storage = st.sampled_from([torch.float32, torch.bfloat16])
equal_rows = st.sampled_from([0, 1, 4])
densities = st.sampled_from([0.0, 0.05, 0.2, 0.6, 1.0])
channels = st.sampled_from([1, 2, 3, 5, 6, 21])  # the last: more than a vector holds, by some


def weight(seed: int, shape: tuple[int, ...], density: float, rows: int) -> Tensor:
    """Normal numbers, of which a mask of `rows` equal neighbouring rows keeps a share.

    With `rows` 0 whole rows are kept or not.
    """
    generator = torch.Generator().manual_seed(seed)
    if rows == 0:
        kept = torch.rand(shape[0], *(1 for _ in shape[1:]), generator=generator) < density
        return torch.randn(shape, generator=generator) * kept
    mask = torch.rand(-(-shape[0] // rows), *shape[1:], generator=generator) < density
    mask = mask.repeat_interleave(rows, 0)[: shape[0]]
    return torch.randn(shape, generator=generator) * mask


def numbers(seed: int, *shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


def assert_close(y: Tensor, true: Tensor, scale: Tensor) -> None:
    """Within float32 rounding of the float64 truth; scale: the sum of the terms' sizes."""
    assert y.dtype == torch.float32
    assert y.shape == true.shape
    bound = 2e-6 * (1 + scale)
    assert not y.isnan().any()
    assert ((y.double() - true).abs() <= bound).all(), ((y - true).abs() / bound).max()


@dataclass(frozen=True)
class Conv:
    """A drawn convolution."""

    images: int
    groups: int
    inputs: int
    outputs: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.groups * self.outputs, self.inputs, *self.kernel)

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        return (self.images, self.groups * self.inputs, *self.size)

    def fits(self) -> bool:
        axes = zip(self.size, self.kernel, self.padding, self.dilation, strict=True)
        return all(size + 2 * pad > dil * (k - 1) for size, k, pad, dil in axes)


def _pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


general = st.builds(
    Conv,
    images=st.integers(0, 5),
    groups=st.sampled_from([1, 1, 2, 3, 8]),
    inputs=st.sampled_from([1, 3, 8, 20]),
    outputs=st.sampled_from([1, 2, 4, 9]),
    size=st.tuples(st.integers(1, 24), st.integers(1, 40)),
    kernel=_pairs(1, 5),
    stride=_pairs(1, 3),
    padding=_pairs(0, 3),
    dilation=_pairs(1, 3),
).filter(Conv.fits)

pointwise = st.builds(
    Conv,
    images=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 4]),
    inputs=st.sampled_from([1, 9, 20, 300]),
    outputs=st.sampled_from([1, 4, 16, 30]),
    size=st.sampled_from(
        [(1, 1), (4, 4), (7, 7), (5, 13), (14, 14), (16, 16), (16, 32), (33, 31)]
    ),
    kernel=st.just((1, 1)),
    stride=st.just((1, 1)),
    padding=st.just((0, 0)),
    dilation=st.just((1, 1)),
)

# of the kernels that have code of their own, channels that fill vectors and channels that are left
depthwise = st.builds(
    Conv,
    images=st.integers(1, 3),
    groups=st.sampled_from([3, 8, 16, 21, 40]),
    inputs=st.just(1),
    outputs=st.just(1),
    size=st.one_of(st.tuples(st.integers(1, 19), st.integers(1, 35)), st.just((32, 32))),
    kernel=st.sampled_from([(3, 3), (5, 5)]),
    stride=st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 2)]),
    padding=_pairs(0, 3),
    dilation=st.sampled_from([(1, 1), (1, 1), (1, 1), (2, 2)]),
).filter(Conv.fits)
