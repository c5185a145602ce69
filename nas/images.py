"""What image batches go through: normalising and augmentation, on whole batches at once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CROP_PADDING = 4


@dataclass(frozen=True)
class Normalise:
    """Turn bytes (N, C, H, W) uint8 into float32 of mean 0 and deviation 1 in each channel.

    Attributes:
        mean: Mean of each channel, in bytes.
        deviation: Standard deviation of each channel, in bytes.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor) -> "Normalise":
        """Take the statistics of images (N, C, H, W) uint8, without a copy as floats."""
        levels = torch.arange(256, dtype=torch.float64)
        counts = [images[:, c].flatten().bincount(minlength=256) for c in range(images.shape[1])]
        shares = torch.stack(counts).double() / counts[0].sum()
        mean = shares @ levels
        variance = (shares * (levels - mean[:, None]) ** 2).sum(dim=1)
        return cls(tuple(mean.tolist()), tuple(variance.sqrt().tolist()))

    def __call__(self, images: Tensor) -> Tensor:
        """Return the normalised images, on their device."""
        mean, deviation = (
            torch.tensor(one, device=images.device)[:, None, None]
            for one in (self.mean, self.deviation)
        )
        return (images - mean) / deviation


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image at random by up to 4 pixels, filled with zeros, and mirror half of them.

    The augmentation that is usual on CIFAR-10 (He et al. 2015, arXiv:1512.03385).

    Args:
        images: (N, C, H, W) of any dtype.
        generator: A CPU generator.
    """
    n, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * _CROP_PADDING + 1, (2, n, 1), generator=generator)
    mirrored = torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.bool)
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    padded = F.pad(images, (_CROP_PADDING,) * 4)
    example, channel = torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None]
    return padded[example, channel, rows[:, None, :, None], columns[:, None, None, :]]
