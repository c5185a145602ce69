from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.network.program import read
from nas.packing import pack
from nas.packing.layer import Kernel
from tests.pack_models import (
    MODELS,
    Mlp,
    Residual,
    assert_same,
    calls,
    kernels_of,
    masked,
    prefer,
    prefer_sparse,
)


@pytest.mark.parametrize("name", MODELS)
def test_runs_of_layers_in_one_call_give_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shapes, _ = MODELS[name]
    module = masked(make())
    prefer_sparse(monkeypatch, runs=True)
    packed = pack(module, tuple(torch.randn(1, *shape) for shape in shapes))
    assert_same(packed, module, *shapes)
    chained = [layer for layer in packed.layers if layer.kernel.startswith("sparse_chain")]
    assert len(chained) == {"mlp": 3, "separable": 3, "transformer": 4, "resnet": 6}.get(
        name, len(chained)
    )


def test_a_run_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_sparse(monkeypatch, runs=True)
    packed = pack(masked(Mlp()), torch.randn(1, 33))
    aten, ops = torch.ops.aten, torch.ops.sparse_nas
    assert calls(packed) == [aten.flatten.using_ints, ops.sparse_chain.default]
    assert kernels_of(packed) == {"sparse_chain[0]"}


@pytest.mark.parametrize(("batch", "parts"), [(1, 0), (8, 2), (20, 1)])
def test_several_small_images_may_lie_beside_each_other(
    batch: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock of this test the fewer images a program takes at a time the slower it is."""

    def parts_of(kernel: Kernel) -> int:
        return read(kernel.steps[0].args[0]).parts

    ranks = {"sparse_conv2d": 20.0, "sparse_linear": 20.0, "dense": 30.0, "apart": 40.0}
    prefer(monkeypatch, lambda kernel: ranks.get(kernel.name) or 9.0 - bool(parts_of(kernel)))
    module = masked(Residual(6))
    packed = pack(module, torch.randn(batch, 6, 8, 8))
    (program,) = (t for t in packed.body.state_dict().values() if t.dtype == torch.uint8)
    assert read(program).parts == parts
    assert_same(packed, module, (6, 8, 8))
    assert all(layer.us > 0 for layer in packed.layers)


def test_what_changes_nothing_does_not_cut_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().contiguous().reshape(x.shape).flatten(1)

    prefer_sparse(monkeypatch, runs=True)
    module = masked(nn.Sequential(nn.Linear(8, 8), Idle(), nn.Identity(), nn.Linear(8, 8)))
    packed = pack(module, torch.randn(2, 8))
    assert_same(packed, module, (8,))
    assert calls(packed) == [torch.ops.sparse_nas.sparse_chain.default]


def test_a_run_ends_where_its_result_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.layers[1](self.layers[0](x))
            return y + self.layers[3](self.layers[2](y))

    prefer_sparse(monkeypatch, runs=True)
    module = masked(Skip(), 0.5)
    packed = pack(module, torch.randn(2, 8))
    assert_same(packed, module, (8,))
    assert [layer.kernel[-3:] for layer in packed.layers] == ["[0]", "[0]", "[1]", "[1]"]


def test_where_the_longest_run_loses_its_sparse_stretches_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of four layers the second is faster dense; only a run of two is faster in one call."""

    def rank(kernel: Kernel) -> float:
        if kernel.name == "apart":
            return 5.0
        if kernel.name == "sparse_chain":
            return 4.0 if kernel.steps[0].args[0].numel() < 4000 else 6.0
        wide = kernel.name == "sparse_linear" and kernel.steps[0].args[2] == 64
        return {"dense": 3.0}.get(kernel.name, 4.0 if wide else 2.0)

    prefer(monkeypatch, rank)
    sizes = (16, 16, 64, 16, 16)
    module = masked(nn.Sequential(*(nn.Linear(i, o) for i, o in pairwise(sizes))))
    packed = pack(module, torch.randn(2, 16))
    assert_same(packed, module, (16,))
    names = ["sparse_linear", "dense", "sparse_chain[0]", "sparse_chain[0]"]
    assert [layer.kernel for layer in packed.layers] == names


def test_products_that_cannot_be_packed_run_dense_and_are_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.exact = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            computed = F.linear(self.fc(x), x.mean(0, keepdim=True) * self.fc.weight)
            return self.exact(computed.double()).float() @ torch.ones(4)

    module = masked(Odd(), 0.5)
    packed = pack(module, torch.randn(2, 4))
    assert [layer.layer for layer in packed.layers] == ["fc"]
    computed, exact = packed.notes
    assert "computed from the input" in computed
    assert exact.startswith("exact: ") and "float32" in exact
    for batch in (1, 3):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(packed(x), module(x).detach())


def test_a_copy_of_a_packed_network_has_tensors_of_its_own() -> None:
    packed = pack(masked(Mlp()), torch.randn(2, 33), kernels="dense")
    x, twin = torch.randn(3, 33), copy.deepcopy(packed)
    before = packed(x)
    torch.testing.assert_close(twin(x), before)
    for buffer in twin.buffers():
        buffer.zero_()
    torch.testing.assert_close(packed(x), before)
    assert not twin(x).any()


def test_values_of_every_kind_pass_through_a_graph() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            y = self.fc(x)[:, 1:5]
            mask = torch.ones(4, 4, dtype=torch.bool, device=x.device).tril()
            filled = (y.unsqueeze(1) * y.unsqueeze(2)).masked_fill(~mask, float("-inf"))
            with torch.no_grad():
                low, high = self.fc(x).clamp(min=-1.0, max=float("inf")).chunk(2, dim=1)
            return filled.softmax(-1), [low.to(torch.float64), high.argmax(1)]

    module = masked(Kinds(), 0.5)
    packed = pack(module, torch.randn(2, 6))
    assert packed.notes == ()
    assert len(packed.layers) == 2
    assert_same(packed, module, (6,))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_dense_network_takes_the_faster_layout(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = [1.0, 2.0] if layout == "contiguous" else [2.0, 1.0]

    def interleaved(networks: list[Callable[[], Tensor]], *_: float) -> list[float]:
        assert len({network().stride() for network in networks}) == 2
        return times

    monkeypatch.setattr("nas.packing.layout.interleaved", interleaved)
    module = masked(nn.Sequential(nn.Conv2d(8, 4, 3), Residual(4)))
    packed = pack(module, torch.randn(2, 8, 5, 5), kernels="dense")
    assert packed.layout == layout
    assert_same(packed, module, (8, 5, 5))


def test_a_network_whose_views_need_it_stays_contiguous() -> None:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).view(x.shape[0], 64)

    module = masked(View(), 0.5)
    packed = pack(module, torch.randn(2, 3, 6, 6), kernels="dense")
    assert (packed.layout, packed.notes) == ("contiguous", ())
    assert_same(packed, module, (3, 6, 6))


@pytest.mark.parametrize("pays", [True, False])
def test_a_pooling_among_sparse_layers_takes_the_layout_that_pays(
    pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer_sparse(monkeypatch)
    times = [2.0, 1.0] if pays else [1.0, 2.0]
    monkeypatch.setattr("nas.packing.layout.interleaved", lambda *_: times)
    pools = [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2, ceil_mode=True), nn.AdaptiveAvgPool2d(2)]
    module = masked(nn.Sequential(nn.Conv2d(3, 8, 3), *pools, nn.Conv2d(8, 4, 1)))
    packed = pack(module, torch.randn(2, 3, 9, 9))
    assert calls(packed).count(torch.ops.aten.contiguous.default) == (6 if pays else 0)
    assert packed.layout == "contiguous"
    assert_same(packed, module, (3, 9, 9))
