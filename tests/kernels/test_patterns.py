import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels.patterns import pattern_of
from nas.sparsity import mask, parse

LABELS = {
    "0.8": "unstructured",
    "2:4": "2:4",
    "1:8": "1:8",
    "3:4": "3:4",
    "block4x1:0.8": "4x1",
    "block16x1:0.7": "16x1",
    "block1x4:0.8": "1x4",
    "block8x4:0.6": "8x4",
    "channel:0.5": "channel",
    "dense": "dense",
}


@pytest.mark.parametrize("shape", [(64, 32), (32, 32, 3, 3), (64, 32, 1, 1)])
@pytest.mark.parametrize("label", LABELS)
def test_the_pattern_of_a_mask_is_found(label: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if label != "dense":
        weight = weight * mask(weight, parse(label))
    pack = kernels.pack_linear if weight.dim() == 2 else kernels.pack_conv2d
    packed = pack(weight)
    assert packed.meta["pattern"] == LABELS[label]
    whole_rows = label in ("block4x1:0.8", "block16x1:0.7", "block8x4:0.6", "channel:0.5", "dense")
    if label != "3:4":  # so few zeros that blocks pay whatever the pattern
        assert packed.meta["block"] == ("4x1" if whole_rows else "1x1")
    kernels.validate(packed.data, packed.meta)


@given(
    rows=st.integers(1, 9),
    channels=st.integers(1, 9),
    taps=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_a_pattern_that_is_named_is_followed(
    rows: int, channels: int, taps: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(rows, channels, taps, generator=generator) < 0.3).numpy()
    name = pattern_of(kept)
    if "x" in name:
        height, width = map(int, name.split("x"))
        parts = kept.reshape(rows // height, height, channels // width, width, taps)
        assert (parts.any((1, 3)) == parts.all((1, 3))).all()
    elif ":" in name:
        n, m = map(int, name.split(":"))
        assert kept.reshape(rows, channels // m, m, taps).sum(2).max() == n < m
    else:
        assert (name == "dense") == kept.all()
