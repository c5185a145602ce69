import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nas.images import Normalise, crop_and_flip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(n=st.integers(1, 6), channels=st.integers(1, 3), seed=st.integers(0, 999))
def test_each_augmented_image_is_a_shifted_and_perhaps_mirrored_original(
    n: int, channels: int, seed: int
) -> None:
    images = torch.randint(0, 256, (n, channels, 6, 9), generator=seeded(seed), dtype=torch.uint8)
    augmented = crop_and_flip(images, seeded(seed))
    assert (augmented.dtype, augmented.shape) == (images.dtype, images.shape)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    for image, original in zip(augmented, padded, strict=True):
        crops = [original[:, y : y + 6, x : x + 9] for y in range(9) for x in range(9)]
        assert any(torch.equal(image, crop) or torch.equal(image, crop.flip(2)) for crop in crops)


def test_augmentation_reaches_every_shift_and_both_orientations() -> None:
    images = torch.zeros(4000, 1, 9, 9)
    images[:, 0, 4, 3:5] = torch.tensor([1.0, 2.0])
    augmented = crop_and_flip(images, seeded())
    rows = {int(row) for row in (augmented == 2).nonzero()[:, 2]}
    columns = {int(column) for column in (augmented == 2).nonzero()[:, 3]}
    assert rows == columns == set(range(9))
    kept = augmented[((augmented == 1).flatten(1).any(1)) & ((augmented == 2).flatten(1).any(1))]
    mirrored = (kept == 2).nonzero()[:, 3] < (kept == 1).nonzero()[:, 3]
    assert mirrored.double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_normalising_matches_the_statistics_of_floats() -> None:
    images = torch.randint(0, 200, (50, 3, 8, 8), generator=seeded(), dtype=torch.uint8)
    images[:, 1] //= 3
    floats = images.double()
    deviation, mean = torch.std_mean(floats, dim=(0, 2, 3), correction=0)
    expected = (floats - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(Normalise.of(images)(images), expected.float())
