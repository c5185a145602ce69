"""Packing as on a GPU, on the CPU: all but the GPU's own kernels and clocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule

from nas.packing import devices, load, pack, save
from nas.packing.layer import ConvArgs, Kernel, Layer, sparse_kernel
from nas.packing.trace import Untraceable
from nas.packing.verify import verify
from tests.pack_models import (
    MODELS,
    Branching,
    Mlp,
    ResNet,
    calls,
    kernels_of,
    masked,
    prefer,
)

BF16 = torch.bfloat16


@pytest.fixture
def us(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """CPU tensors are taken for a GPU's; what kernels of a linear layer take, microseconds."""
    us = {"few": 2.0, "many": 3.0, "dense": 4.0}
    monkeypatch.setattr(devices, "of", lambda _: replace(devices.GPU, kind="cpu"))
    monkeypatch.setattr("nas.packing.devices.kernels.tune", lambda *_: us)
    monkeypatch.setattr(devices, "_of_a_convolution", lambda *_: "implicit")
    prefer(monkeypatch, lambda kernel: 4.0 if kernel.name == "dense" else 2.0)
    return us


def narrow(module: nn.Module, dtype: torch.dtype = BF16) -> nn.Module:
    return masked(module).to(dtype)


def assert_near(packed: nn.Module, module: nn.Module, *shapes: tuple[int, ...]) -> None:
    """As near to the module as roundings of all its layers make it, on batches 1, 2 and 5."""
    dtype = next(module.parameters()).dtype
    for batch in (1, 2, 5):
        inputs = tuple(torch.randn(batch, *shape).to(dtype) for shape in shapes)
        with torch.no_grad():
            right, found = module(*inputs), packed(*inputs)
        pairs = (
            zip(right.values(), found.values(), strict=True)
            if isinstance(right, dict)
            else [(right, found)]
        )
        for one, other in pairs:
            assert other.dtype is dtype and other.shape == one.shape
            apart = (other.double() - one.double()).norm()
            assert apart <= 0.03 * one.double().norm() + 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_a_narrow_network_gives_what_its_module_gives(name: str, us: dict[str, float]) -> None:
    make, shapes, layers = MODELS[name]
    module = narrow(make())
    packed = pack(module, tuple(torch.randn(3, *shape).bfloat16() for shape in shapes))
    assert packed.notes == () and packed.runs == () and len(packed.layers) == layers
    assert kernels_of(packed) <= {"sparse_linear[few]", "sparse_conv2d[implicit]"}
    assert all(layer.limit_us is None for layer in packed.layers)
    assert_near(packed, module, *shapes)
    dense = pack(module, tuple(torch.randn(3, *s).bfloat16() for s in shapes), kernels="dense")
    assert kernels_of(dense) == {"dense"}
    assert_near(dense, module, *shapes)


def test_a_layer_whose_fastest_kernel_is_dense_is_dense(us: dict[str, float]) -> None:
    us["dense"] = 1.0
    packed = pack(narrow(Mlp()), torch.randn(2, 33).bfloat16())
    assert kernels_of(packed) == {"dense"} and packed.notes == ()


def test_explain_names_the_kernel(us: dict[str, float]) -> None:
    lines = pack(narrow(Mlp()), torch.randn(2, 33).bfloat16()).explain().splitlines()
    assert [line.split()[5] for line in lines[1:]] == ["sparse_linear[few]"] * 3


def test_what_has_no_kernel_is_dense_and_named(us: dict[str, float]) -> None:
    module = narrow(nn.Linear(16, 16), torch.float16)  # a CPU's kernels take no float16
    packed = pack(module, torch.randn(2, 16).half())
    assert kernels_of(packed) == {"dense"}
    assert packed.notes[0].startswith("weight: sparse kernel refused: pack_linear: weight must be")
    assert_near(packed, module, (16,))


def test_convolutions_lie_channels_last_and_stay_so(us: dict[str, float], tmp_path: Path) -> None:
    class Viewed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(x)
            return x.view(x.shape[0], -1)

    module = narrow(Viewed(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    packed = pack(module, torch.randn(2, 8, 7, 7).bfloat16(), kernels="dense")
    assert packed.layout == "channels_last" and packed.notes == ()
    save(packed, tmp_path)
    for network in (packed, load(tmp_path)):
        weights = [t for t in network.body.state_dict().values() if t.dim() == 4]
        assert len(weights) == 2
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
        assert_near(network, module, (8, 7, 7))


def test_sparse_and_dense_convolutions_are_saved_in_their_layout(
    us: dict[str, float], tmp_path: Path
) -> None:
    module = nn.Sequential(nn.Conv2d(8, 8, 3).eval(), masked(nn.Conv2d(8, 8, 3))).bfloat16()
    packed = pack(module, torch.randn(2, 8, 7, 7).bfloat16())
    assert [layer.kernel for layer in packed.layers] == ["dense", "sparse_conv2d[implicit]"]
    save(packed, tmp_path)
    (weight,) = (t for t in load(tmp_path).body.state_dict().values() if t.dim() == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert_near(load(tmp_path), module, (8, 7, 7))


def test_batch_norm_is_folded_in_float64_and_rounded_once(us: dict[str, float]) -> None:
    conv, norm = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
    module = narrow(nn.Sequential(conv, norm))
    packed = pack(module, torch.randn(2, 4, 5, 5).bfloat16(), kernels="dense")
    wide = norm.double()
    assert wide.running_var is not None and wide.running_mean is not None
    scale = wide.weight / torch.sqrt(wide.running_var + wide.eps)
    weight = (conv.weight.double() * scale.reshape(-1, 1, 1, 1)).bfloat16()
    bias = (wide.bias - wide.running_mean * scale).bfloat16()
    held = {tensor.dim(): tensor for tensor in packed.body.state_dict().values()}
    assert torch.equal(held[4], weight) and torch.equal(held[1], bias)
    assert len(calls(packed)) == 1


def test_layers_are_exchanged_where_there_is_no_graph(us: dict[str, float]) -> None:
    module = narrow(Branching())
    packed = pack(module, torch.randn(2, 3, 6, 6).bfloat16())
    assert packed.signature is None and "conv" in {layer.layer for layer in packed.layers}
    assert_near(packed, module, (3, 6, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_right_kernel_passes_and_a_wrong_one_does_not(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 32, 3, 3), torch.randn(2, 32, 6, 6)
    for activation in ("none", "relu6", "silu", "gelu"):
        layer = Layer("a", weight, torch.randn(64), ConvArgs(padding=(1, 1)), activation).to(dtype)
        true = layer.to(torch.float64)(x.to(dtype).double())
        assert devices.GPU.difference(layer, x.to(dtype), true.to(dtype)) == ""
        assert devices.GPU.difference(layer, x.to(dtype), layer(x.to(dtype))) == ""
        wrong = true.to(dtype)
        wrong[1, 5, 2, 3] += 0.3
        assert "differs from dense" in devices.GPU.difference(layer, x.to(dtype), wrong)
        assert "nan" in devices.GPU.difference(layer, x.to(dtype), wrong * float("nan"))
        assert "gave shape" in devices.GPU.difference(layer, x.to(dtype), wrong[:1])


def test_a_wrong_kernel_is_never_chosen(
    us: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(layer: Layer) -> Kernel:
        kernel = sparse_kernel(layer)
        step = kernel.steps[0]
        return Kernel(
            kernel.name, (type(step)(lambda x, *a: 1.1 * step.target(x, *a), step.args),)
        )

    monkeypatch.setattr("nas.packing.tune.sparse_kernel", wrong)
    packed = pack(narrow(nn.Linear(64, 64)), torch.randn(2, 64).bfloat16())
    assert kernels_of(packed) == {"dense"} and "differs from dense" in packed.notes[0]


def test_a_network_that_gives_something_else_is_refused(us: dict[str, float]) -> None:
    module, x = narrow(ResNet()), torch.randn(2, 3, 8, 8).bfloat16()
    packed = pack(module, x)
    (bias,) = (t for t in packed.body.state_dict().values() if t.shape == (5,))
    with torch.no_grad():
        verify(packed, module, (x,))
        bias += 0.2 * float(module(x).abs().max())
        with pytest.raises(Untraceable, match="another output at batch 2"):
            verify(packed, module, (x,))


def test_outputs_that_are_no_floats_may_differ_a_little(us: dict[str, float]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.fc(x)
            return y > 0, y.argmax(1), y

    packed = pack(narrow(Odd()), torch.randn(30, 64).bfloat16())
    assert packed.notes == () and packed.signature is not None


def test_tensors_on_two_devices_are_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"one device, got 0.weight \(cpu\), 1.weight \(meta\)"):
        pack(module, torch.randn(2, 4))
    with FakeTensorMode():  # tensors of a GPU that need none
        x, y = torch.empty(2, 4, device="cuda:0"), torch.empty(2, 4, device="cuda:1")
        for given in ((x,), (x, y)):
            with pytest.raises(ValueError, match=r"weight \(cpu\), input 0 \(cuda:0\)"):
                devices.of(x).check(nn.Linear(4, 4, device="cpu"), given)
        with pytest.raises(ValueError, match=r"input 0 \(cuda:0\), input 1 \(cuda:1\)"):
            devices.of(x).check(nn.Identity(), (x, y))
        devices.of(x).check(nn.Identity(), (x, x))


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ((torch.float32, torch.float32, torch.float16), r"0.weight \(torch.float32\), input 1"),
        ((BF16, torch.float32, BF16), r"0.weight \(torch.bfloat16\), 1.weight \(torch.float32\)"),
        ((torch.float64,) * 3, r"takes torch.float32, .*, got torch.float64 of 0.weight"),
    ],
)
def test_on_a_gpu_dtypes_that_are_mixed_or_not_served_are_named(
    dtypes: tuple[torch.dtype, ...], message: str
) -> None:
    first, second, given = dtypes
    module = nn.Sequential(nn.Linear(4, 4, dtype=first), nn.Linear(4, 4, dtype=second))
    numbers = torch.ones(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        devices.GPU.check(module, (numbers, torch.ones(2, dtype=given)))


def test_a_network_packed_on_a_gpu_needs_one(tmp_path: Path) -> None:
    packed = pack(masked(Mlp()), torch.randn(2, 33))
    save(packed, tmp_path)
    path = tmp_path / "packed.json"
    assert '"device": "cpu"' in path.read_text()
    path.write_text(path.read_text().replace('"device": "cpu"', '"device": "cuda"', 1))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="was packed on a GPU, and PyTorch finds none here"):
            load(tmp_path)
    path.write_text(path.read_text().replace('"device": "cuda"', '"device": "tpu"', 1))
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'tpu'"):
        load(tmp_path)


def test_devices_of_a_graph_are_saved_without_their_number(tmp_path: Path) -> None:
    class Made(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(x.shape[0], device=x.device).unsqueeze(1)

    packed = pack(Made(), torch.randn(2, 3))
    assert isinstance(packed.body, GraphModule)
    for node in packed.body.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 1)}
    save(packed, tmp_path)
    assert '"device": "cuda"' in (tmp_path / "packed.json").read_text()
    assert "cuda:1" not in (tmp_path / "packed.json").read_text()
