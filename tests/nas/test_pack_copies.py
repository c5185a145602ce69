"""Copies that only views read are left to the views, and only those."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nas.packing import pack
from tests.pack_models import assert_same, masked, prefer_sparse, transformer


class Shuffle(nn.Module):
    """Channels of two groups in turn, as in ShuffleNet."""

    def __init__(self, change: bool) -> None:
        super().__init__()
        self.first, self.last, self.change = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), change

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        pairs = x.view(-1, 2, 4, 6, 6).transpose(1, 2).contiguous()
        if self.change:
            pairs.mul_(2)
        return self.last(pairs.view(-1, 8, 6, 6)) + x[:, :4]


def targets(module: nn.Module) -> list[str]:
    return [str(node.target) for node in module.graph.nodes]  # type: ignore[union-attr]


def test_attention_takes_its_parts_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_sparse(monkeypatch)  # dense products ask for copies of their own
    module = masked(transformer())
    packed = pack(module, torch.randn(2, 5, 16))
    assert "aten.contiguous.default" not in targets(packed.body)
    assert_same(packed, module, (5, 16))


@pytest.mark.parametrize("change", [False, True])
def test_a_copy_that_is_written_into_stays(change: bool) -> None:
    module = masked(Shuffle(change))
    packed = pack(module, torch.randn(2, 3, 6, 6))
    assert ("aten.contiguous.default" in targets(packed.body)) == change
    assert_same(packed, module, (3, 6, 6))


class Turned(nn.Module):
    """Something is computed between a copy and the view that needed it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(1, 2).contiguous().unsqueeze(1)
        return self.last(torch.relu(turned).view(x.shape[0], 24))


def test_views_behind_what_was_computed_still_hold() -> None:
    module = masked(Turned())
    packed = pack(module, torch.randn(2, 4, 6))
    assert packed.signature is not None
    assert_same(packed, module, (4, 6))


def test_a_dense_product_of_transposed_samples_is_one_product() -> None:
    """PyTorch would make a batch of them, a copy of the weight for each, and take much longer."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.transpose(0, 1)).transpose(0, 1)

    module = masked(Turned())
    packed = pack(module, torch.randn(3, 4, 6), kernels="dense")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        packed(torch.randn(3, 4, 6))
    heard = {event.key for event in profile.key_averages()}
    assert "aten::addmm" in heard and "aten::bmm" not in heard
    assert_same(packed, module, (4, 6))
