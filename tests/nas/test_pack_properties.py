"""Any network that can be drawn from these parts is packed to one that gives the same."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nas.packing import pack
from nas.packing.layer import Kernel
from tests.pack_models import assert_same, masked

CHANNELS = 8
ACTIVATIONS: list[type[nn.Module]] = [nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Tanh]


class Sum(nn.Module):
    """Both branches of one input, added."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one = one
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Module:
    groups = draw(st.sampled_from([1, 2, CHANNELS]))
    kernel = draw(st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 3])))
    dilation = draw(st.integers(1, 2))
    return nn.Conv2d(
        CHANNELS,
        CHANNELS,
        kernel,
        padding="same",
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )


@st.composite
def blocks(draw: st.DrawFn) -> nn.Module:
    activation = draw(st.sampled_from(ACTIVATIONS))()
    parts = [draw(convolutions()), activation]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, 2)), nn.BatchNorm2d(CHANNELS, affine=draw(st.booleans())))
    if draw(st.booleans()):
        parts.insert(
            draw(st.integers(0, len(parts))), nn.Dropout(0.3, inplace=draw(st.booleans()))
        )
    return nn.Sequential(*parts)


def networks() -> st.SearchStrategy[nn.Module]:
    return st.recursive(
        blocks(),
        lambda parts: st.one_of(
            st.lists(parts, min_size=1, max_size=3).map(lambda found: nn.Sequential(*found)),
            st.builds(Sum, parts, st.one_of(parts, st.builds(nn.Identity))),
        ),
        max_leaves=5,
    )


def time_us(candidates: list[Kernel], x: Tensor, seconds: float = 0.0) -> list[float]:
    """Kernels take turns in being the fastest, so that every mixture of them is met."""
    order = [
        (len(kernel.steps) + x.numel() + index) % 3 for index, kernel in enumerate(candidates)
    ]
    return [1.0 + place for place in order]


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    network=networks(),
    ratio=st.sampled_from([0.0, 0.5, 0.9]),
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)),
    batch=st.integers(1, 3),
)
def test_a_drawn_network_packs_to_one_that_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
    network: nn.Module,
    ratio: float,
    size: tuple[int, int],
    batch: int,
) -> None:
    for place in ("tune", "runs"):
        monkeypatch.setattr(f"nas.packing.{place}.time_us", time_us)
    home = importlib.import_module("nas.packing.pack")
    monkeypatch.setattr(home, "interleaved", lambda *_: [1.0, 2.0])
    module = masked(network, ratio)
    packed = pack(module, torch.randn(batch, CHANNELS, *size))
    assert packed.notes == ()
    assert_same(packed, module, (CHANNELS, *size))
