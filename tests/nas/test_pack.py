from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nas.packing import pack
from tests.pack_models import (
    MODELS,
    Mlp,
    Separable,
    assert_same,
    calls,
    kernels_of,
    masked,
    prefer_sparse,
)


@pytest.mark.parametrize("kernels", ["auto", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_network_gives_what_its_masked_module_gives(
    name: str, kernels: Literal["auto", "dense"]
) -> None:
    make, shapes, layers = MODELS[name]
    module = masked(make())
    packed = pack(module, tuple(torch.randn(3, *shape) for shape in shapes), kernels=kernels)
    assert_same(packed, module, *shapes)
    assert len(packed.layers) == layers
    assert packed.notes == ()
    assert kernels == "auto" or kernels_of(packed) == {"dense"}


@pytest.mark.parametrize("name", MODELS)
def test_sparse_kernels_serve_every_product_of_every_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shapes, _ = MODELS[name]
    module = masked(make())
    prefer_sparse(monkeypatch)
    packed = pack(module, tuple(torch.randn(1, *shape) for shape in shapes))
    assert_same(packed, module, *shapes)
    assert all(layer.kernel.startswith("sparse_") for layer in packed.layers)
    assert all(layer.sparsity > 0.5 and layer.pattern != "-" for layer in packed.layers)


def test_batch_norm_bias_and_activation_are_fused() -> None:
    packed = pack(masked(Mlp()), torch.randn(2, 33), kernels="dense")
    called = calls(packed)
    aten = torch.ops.aten
    linear, flatten = aten.linear.default, aten.flatten.using_ints
    assert called == [flatten, linear, aten.gelu_.default, linear, aten.silu_.default, linear]


def test_a_sparse_layer_is_one_call_with_its_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_sparse(monkeypatch)
    packed = pack(masked(Separable()), torch.randn(2, 6, 9, 7))
    called = [str(target) for target in calls(packed)]
    assert not any("batch_norm" in name for name in called)
    assert sum("relu" in name for name in called) == 1


def test_a_layer_that_is_read_twice_keeps_its_activation_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return torch.relu(y) + y

    module = masked(Twice(), 0.5)
    assert_same(pack(module, torch.randn(2, 8)), module, (8,))


def test_writing_in_place_keeps_its_meaning() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            torch.relu_(y.view(-1))
            return self.fc(x.mul_(2)) - y

    module = masked(InPlace(), 0.5)
    assert_same(pack(module, torch.randn(2, 8)), module, (8,))


def test_a_weight_that_the_forward_writes_is_read_afresh() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.weight.copy_(x.sum() * torch.eye(4))  # type: ignore[operator]
            return F.linear(x, self.weight)  # type: ignore[arg-type]

    module = Written()
    assert_same(pack(module, torch.randn(2, 4)), module, (4,))


def test_a_module_called_twice_is_stored_once_and_listed_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefer_sparse(monkeypatch)
    fc = nn.Linear(9, 9)
    module = masked(nn.Sequential(fc, nn.Tanh(), fc))
    packed = pack(module, torch.randn(2, 9))
    assert [layer.layer for layer in packed.layers] == ["0", "0"]
    assert len(list(packed.buffers())) == 2
    assert_same(packed, module, (9,))


def test_the_batch_of_the_example_is_the_one_measured() -> None:
    packed = pack(masked(Mlp()), torch.randn(1, 33))
    assert [layer.input_shape for layer in packed.layers] == [(1, 33), (1, 65), (1, 31)]


def test_explain_shows_every_layer_with_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_sparse(monkeypatch)
    packed = pack(masked(Mlp()), torch.randn(4, 33))
    head, *rows = packed.explain().splitlines()
    assert head.split()[:3] == ["layer", "weight", "input"]
    assert head.split()[6:] == ["us", "of", "limit", "dense", "us", "ratio"]
    assert [row.split()[:3] for row in rows] == [
        ["1", "65x33", "4x33"],
        ["5", "31x65", "4x65"],
        ["7", "7x31", "4x31"],
    ]
