"""On a GPU: `pytest -m gpu`."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernels.cuda import tuning
from nas.costs import Latency
from nas.masks import attach, sparse_weights
from nas.packing import PackedNetwork, load, pack, save
from nas.sparsity import Block
from tests.pack_models import Branching, Residual

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEAR = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the norm


class Images(nn.Sequential):
    """Convolutions with batch norm, residual blocks, a linear layer."""

    def __init__(self) -> None:
        stem = (nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        wide = (nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU())
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 128), nn.GELU())
        super().__init__(*stem, Residual(64), nn.MaxPool2d(2), *wide, *head, nn.Linear(128, 10))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (Images, (3, 32, 32)),
    "encoder": (encoder, (24, 256)),
}


def masked(make: Callable[[], nn.Module], dtype: torch.dtype, ratio: float = 0.9) -> nn.Module:
    """In eval mode on the GPU, masked in blocks of 32 there, wherever that divides the weight."""
    torch.manual_seed(0)
    module = make().cuda()
    for path, weight in list(module.named_parameters()):
        if weight.dim() > 1 and weight.shape[0] % 32 == 0 and weight.shape[1] % 32 == 0:
            sparse = attach(module, path, (Block(32, 32, ratio),))
            sparse.set_scores(torch.rand_like(weight))
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            part.running_mean = 0.1 * torch.randn(part.num_features, device="cuda")
            part.running_var = torch.rand(part.num_features, device="cuda") + 0.5
    return module.eval().to(dtype)


def example(shape: tuple[int, ...], dtype: torch.dtype, batch: int = 4) -> Tensor:
    return torch.randn(batch, *shape, device="cuda").to(dtype)


@torch.no_grad()
def assert_near(packed: nn.Module, module: nn.Module, x: Tensor) -> None:
    """As near as to be right: against the module in float64, and its own distance from that."""
    wide = copy.deepcopy(module).double()
    true, right, found = wide(x.double()), module(x).double(), packed(x)
    assert found.dtype is x.dtype and found.shape == true.shape
    own = float((right - true).norm() / true.norm())
    assert (found.double() - true).norm() <= max(NEAR[x.dtype], 3 * own) * true.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_network_gives_what_its_module_gives(name: str, dtype: torch.dtype) -> None:
    make, shape = MODELS[name]
    module = masked(make, dtype)
    packed = pack(module, example(shape, dtype))
    assert packed.signature is not None, packed.notes
    for batch in (1, 3, 4, 7):
        assert_near(packed, module, example(shape, dtype, batch))
    assert len(packed.layers) == {"images": 6, "encoder": 8}[name]
    assert all(layer.us > 0 and layer.dense_us > 0 for layer in packed.layers)
    twin = pack(module, example(shape, dtype), kernels="dense")
    assert {layer.kernel for layer in twin.layers} == {"dense"}
    assert_near(twin, module, example(shape, dtype))


@pytest.mark.parametrize("name", MODELS)
def test_sparse_kernels_give_it_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is faster: each sparse kernel is taken that is there."""
    make, shape = MODELS[name]
    module = masked(make, torch.bfloat16)
    packed = all_sparse(monkeypatch, module, example(shape, torch.bfloat16))
    linear = [line for line in packed.layers if line.operation == "linear" and line.sparsity > 0.5]
    assert linear and all(line.kernel.startswith("sparse_linear[") for line in linear)
    for batch in (1, 3, 4, 7):
        assert_near(packed, module, example(shape, torch.bfloat16, batch))
    assert "sparse_linear[" in packed.explain()


def all_sparse(monkeypatch: pytest.MonkeyPatch, module: nn.Module, x: Tensor) -> PackedNetwork:
    """Packed as if dense took longer, kernel by kernel and as a whole."""
    measure = tuning._measure

    def without_dense(*args: object) -> dict[str, float]:
        us = measure(*args)  # type: ignore[arg-type]
        return {name: taken for name, taken in us.items() if name != "dense"} or us

    monkeypatch.setattr(tuning, "_measure", without_dense)
    monkeypatch.setattr(
        "nas.packing.tune.time_us",
        lambda kernels, x: [9.0 if kernel.name == "dense" else 3.0 for kernel in kernels],
    )
    monkeypatch.setattr(importlib.import_module("nas.packing.pack"), "FAR", 0.0)
    return pack(module, x)


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_network_is_captured_and_replayed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = MODELS[name]
    module, x = masked(make, torch.bfloat16), example(shape, torch.bfloat16)
    packed = all_sparse(monkeypatch, module, x)
    packed(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, packed(x), rtol=1e-2, atol=1e-2)


def test_a_call_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = masked(encoder, torch.bfloat16), example((24, 256), torch.bfloat16)
    packed = all_sparse(monkeypatch, module, x)
    packed(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that it does not see all that waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        packed(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_network_comes_back_to_the_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = MODELS[name]
    module, x = masked(make, torch.bfloat16), example(shape, torch.bfloat16)
    packed = all_sparse(monkeypatch, module, x)
    save(packed, tmp_path)
    loaded = load(tmp_path)
    assert all(tensor.is_cuda for tensor in loaded.body.state_dict().values())
    torch.testing.assert_close(loaded(x), packed(x), rtol=1e-2, atol=1e-2)
    assert loaded.explain() == packed.explain()
    assert loaded.layout == packed.layout


def test_convolutions_are_channels_last() -> None:
    module = masked(Images, torch.bfloat16)
    packed = pack(module, example((3, 32, 32), torch.bfloat16), kernels="dense")
    weights = [tensor for tensor in packed.body.state_dict().values() if tensor.dim() == 4]
    assert len(weights) == 4
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_masks_are_baked_on_the_gpu() -> None:
    module = masked(encoder, torch.bfloat16, 0.5)
    before = {path: sparse.masks.clone() for path, sparse in sparse_weights(module).items()}
    packed = pack(module, example((24, 256), torch.bfloat16))
    assert all(
        torch.equal(before[p], sparse.masks) for p, sparse in sparse_weights(module).items()
    )
    assert [round(layer.sparsity, 3) for layer in packed.layers] == [0.5] * 8


def test_layers_are_exchanged_where_there_is_no_graph() -> None:
    torch.manual_seed(0)
    module = Branching().eval().cuda()
    packed = pack(module, torch.randn(2, 3, 6, 6, device="cuda"))
    assert packed.signature is None
    for sign in (1, -1):
        x = sign * torch.randn(2, 3, 6, 6, device="cuda")
        torch.testing.assert_close(packed(x), module(x).detach(), rtol=1e-2, atol=1e-3)


def test_what_is_mixed_is_named() -> None:
    module = masked(encoder, torch.bfloat16)
    with pytest.raises(ValueError, match=r"one device, got .* \(cuda:0\), input 0 \(cpu\)"):
        pack(module, torch.randn(2, 24, 256).bfloat16())
    with pytest.raises(ValueError, match=r"one floating dtype, got .*bfloat16\), input 0 "):
        pack(module, torch.randn(2, 24, 256, device="cuda"))
    with pytest.raises(ValueError, match=r"got torch.float64 of"):
        pack(nn.Linear(4, 4).cuda().double(), torch.randn(2, 4, device="cuda").double())


def test_a_latency_is_that_of_replayed_graphs() -> None:
    network, twin = masked(Images, torch.float32), Images().eval()
    found = Latency(device="cuda").measure(network, twin, torch.randn(1, 3, 32, 32))
    assert found["device"] == "cuda" and found["value"] > 0 and found["twin_median_ms"] > 0
    assert len(found["layers"]) == 6
