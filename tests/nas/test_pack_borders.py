from __future__ import annotations

import copy
import importlib
import logging
from dataclasses import replace
from math import inf
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nas.packing import devices, pack
from nas.packing.layer import ConvArgs, Kernel, Layer, sparse_kernel
from nas.packing.tune import choose
from tests.pack_models import (
    Branching,
    Mlp,
    ResNet,
    assert_same,
    kernels_of,
    masked,
    prefer_sparse,
    transformer,
)


def test_control_flow_on_data_falls_back_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer_sparse(monkeypatch)
    module = masked(Branching())
    x = torch.randn(2, 3, 6, 6)
    with caplog.at_level(logging.WARNING, logger="nas"):
        packed = pack(module, x)
    assert len(caplog.records) == 1 and "data-dependent" in caplog.text
    assert "data-dependent" in packed.notes[0]
    served = {layer.layer for layer in packed.layers}
    assert "conv" in served and len(served & {"left", "right"}) == 1
    assert any(note.startswith("read: left as it is") for note in packed.notes)
    for sign in (1, -1, 0.1, -3):
        torch.testing.assert_close(packed(sign * x), module(sign * x).detach())


def test_a_branch_on_the_batch_size_is_not_baked_in() -> None:
    class Batch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.shape[0] > 1 else -self.fc(x)

    module = masked(Batch(), 0.5)
    packed = pack(module, torch.randn(4, 8))
    assert_same(packed, module, (8,))
    assert "batch 1" in packed.notes[0]


def test_outputs_that_are_no_finite_floats_are_compared_too() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.fc(x)
            return y > 0, y.argmax(1), y.masked_fill(y > 0, float("-inf")), (y * 0) / (y * 0)

    packed = pack(masked(Odd(), 0.5), torch.randn(3, 8))
    assert packed.notes == ()


def test_packing_leaves_the_module_and_its_mode_alone() -> None:
    module = masked(ResNet()).train()
    before = copy.deepcopy(module.state_dict())
    pack(module, torch.randn(2, 3, 8, 8))
    assert module.training
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_packing_leaves_threads_and_attention_as_they_were() -> None:
    before = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    pack(masked(transformer()), torch.randn(1, 5, 16), threads=2)
    assert before == (torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled())


def test_a_layer_without_zeros_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_sparse(monkeypatch)
    packed = pack(nn.Sequential(nn.Linear(16, 16), masked(nn.Linear(16, 16))), torch.randn(2, 16))
    assert [layer.kernel == "dense" for layer in packed.layers] == [True, False]


def test_a_network_that_is_faster_dense_as_a_whole_is_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefer_sparse(monkeypatch)
    home = importlib.import_module("nas.packing.pack")
    monkeypatch.setattr(home, "interleaved", lambda *_: [0.002, 0.001])
    monkeypatch.setattr(home, "FAR", inf)  # tried, however slow its layers were
    module = masked(ResNet())
    packed = pack(module, torch.randn(2, 3, 8, 8))
    assert kernels_of(packed) == {"dense"}
    assert packed.whole == "dense takes 1.000 ms, with sparse kernels 2.000"
    assert packed.explain().endswith(packed.whole)
    assert_same(packed, module, (3, 8, 8))


def test_a_wrong_kernel_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_sparse(monkeypatch)

    def wrong(layer: Layer) -> Kernel:
        kernel = sparse_kernel(layer)
        step = kernel.steps[0]
        spoiled = type(step)(lambda x, *args: step.target(x, *args) + 1e-3, step.args)
        return type(kernel)(kernel.name, (spoiled,))

    monkeypatch.setattr("nas.packing.tune.sparse_kernel", wrong)
    packed = pack(masked(nn.Linear(16, 16)), torch.randn(2, 16))
    assert kernels_of(packed) == {"dense"}
    assert "differs from dense" in packed.notes[0]


def test_a_product_without_a_sparse_kernel_is_named() -> None:
    packed = pack(masked(nn.Conv1d(4, 4, 3)), torch.randn(2, 4, 8))
    assert packed.layers == ()
    assert "conv1d" in packed.notes[0] and "dense" in packed.notes[0]


@pytest.mark.parametrize(
    ("example", "kernels", "error", "message"),
    [
        (torch.randn(0, 8), "auto", ValueError, "batch of at least 1"),
        (torch.randn(2, 8), "fast", ValueError, "'fast'"),
        ((torch.randn(2, 8), None), "auto", TypeError, "NoneType"),
        (torch.randn(2, 7), "auto", RuntimeError, "shapes"),
    ],
)
def test_bad_input_is_refused(
    example: object, kernels: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pack(nn.Linear(8, 8), example, kernels=kernels)  # type: ignore[arg-type]


def test_a_packed_network_refuses_other_shapes_types_and_training() -> None:
    packed = pack(masked(Mlp()), torch.randn(2, 33))
    with pytest.raises(ValueError, match=r"input 0 was packed as \(batch, 33\).*\(2, 34\)"):
        packed(torch.randn(2, 34))
    with pytest.raises(ValueError, match="float64"):
        packed(torch.randn(2, 33, dtype=torch.float64))
    with pytest.raises(ValueError, match="takes 1 inputs, got 2"):
        packed(torch.randn(2, 33), torch.randn(2, 33))
    with pytest.raises(ValueError, match="inference"):
        packed.train()


def test_what_was_accepted_before_lets_nothing_else_in() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    packed = pack(Sum(), (torch.randn(2, 8), torch.randn(2, 8)))
    for batch in (2, 5, 2):
        x, y = torch.randn(batch, 8), torch.randn(batch, 8)
        torch.testing.assert_close(packed(x, y), x + y)
        for wrong in (y[:1], y[:, :7], y.double()):
            with pytest.raises(ValueError, match="input 1 was packed as"):
                packed(x, wrong)
        with pytest.raises(ValueError, match="takes 2 inputs, got 1"):
            packed(x)


def test_a_call_that_fails_leaves_gradients_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(masked(Mlp()), torch.randn(2, 33))
    assert packed(torch.randn(1, 33)).shape == (1, 7) and torch.is_grad_enabled()

    def fails(*_: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        raise RuntimeError("broken")

    monkeypatch.setattr(packed, "_direct", fails)
    for recording in (True, False):
        with torch.set_grad_enabled(recording), pytest.raises(RuntimeError, match="broken"):
            packed(torch.randn(1, 33))
        with torch.set_grad_enabled(recording):
            assert torch.is_grad_enabled() == recording
    assert torch.is_grad_enabled()


def test_a_packed_network_records_no_gradient() -> None:
    packed = pack(masked(Mlp()), torch.randn(2, 33))
    assert not packed(torch.randn(2, 33, requires_grad=True)).requires_grad
    assert not any(parameter.requires_grad for parameter in packed.parameters())


class Scaled(nn.Linear):
    """A subclass with a forward of its own: another layer."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Named(nn.Linear):
    """A subclass that forwards as its base does, and that others ask for more."""

    @property
    def width(self) -> int:
        return self.out_features


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.scaled = Scaled(8, 8)
        self.named = Named(8, 8)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.named.weight
        self.hooked = nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, result: -result)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x) if bool(x.mean() > -9) else x
        return self.hooked(self.tied(self.named(self.scaled(x)))) / self.named.width


def test_exchange_serves_exact_layers_and_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefer_sparse(monkeypatch)
    module = masked(Mixed(), 0.5)
    packed = pack(module, torch.randn(2, 3, 8))
    assert_same(packed, module, (3, 8))
    served = [layer.layer for layer in packed.layers]
    assert served == ["encoder.linear1", "encoder.linear2", "named", "tied"]
    assert kernels_of(packed) == {"sparse_linear"}
    left = [note.split(":")[0] for note in packed.notes[1:]]
    assert left == ["encoder.self_attn", "encoder.self_attn.out_proj", "scaled", "hooked"]


def test_exchanged_layers_run_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's fused path reads weights and calls no layer: it must not be taken."""
    prefer_sparse(monkeypatch)
    packed = pack(masked(Mixed(), 0.5), torch.randn(2, 3, 8))
    called: list[str] = []
    for name, part in packed.named_modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    fast = torch.backends.mha.get_fastpath_enabled()
    packed(torch.randn(2, 3, 8))
    assert [name for name in called if "encoder" in name] == [
        "body.module.encoder.linear1",
        "body.module.encoder.linear2",
    ]
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_a_graph_that_goes_wrong_is_left_for_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("what no one thought of")

    monkeypatch.setattr("nas.packing.constants.fold", broken)
    module = masked(ResNet())
    packed = pack(module, torch.randn(2, 3, 8, 8))
    assert "what no one thought of" in packed.notes[0]
    assert len(packed.layers) == 6
    assert_same(packed, module, (3, 8, 8))


def test_whoever_listens_to_operators_hears_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain calls leave torch's dispatcher out; modes and profilers must not miss it."""
    prefer_sparse(monkeypatch)
    packed = pack(masked(Mlp()), torch.randn(2, 33))
    x, heard = torch.randn(3, 33), list[str]()

    class Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            heard.append(str(function))
            return function(*args, **(kwargs or {}))

    plain = packed(x)
    with Listener():  # type: ignore[no-untyped-call]
        assert torch.equal(packed(x), plain)
    assert any("sparse_nas" in name for name in heard)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        packed(x)
    assert any("sparse_nas" in event.key for event in profile.key_averages())
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert packed(mode.from_tensor(x)).shape == plain.shape
    assert packed(x.to("meta")).is_meta
    assert torch.equal(packed(nn.Parameter(x)), plain)


@pytest.mark.parametrize(("dense_us", "ahead"), [(10.0, False), (14.0, False), (16.0, True)])
def test_a_dense_network_is_tried_only_where_it_might_win(dense_us: float, ahead: bool) -> None:
    module = importlib.import_module("nas.packing.pack")
    layer, x = Layer("a", torch.randn(4, 4), None), torch.randn(1, 4)
    choice = choose(layer, x, False)
    halves = {at: replace(choice, us=5.0, dense_us=dense_us / 2) for at in range(2)}
    assert module._far_ahead(halves, []) == ahead


@pytest.mark.parametrize("kernel", [3, 5])
def test_what_two_rows_of_a_depthwise_layer_share_is_rounding(kernel: int) -> None:
    """Rows a thousand times larger, beside the one that a weight takes, cancel."""
    torch.manual_seed(0)
    weight = torch.randn(32, 1, kernel, kernel)
    weight[:, :, 1:] = 0
    x = torch.randn(2, 32, 14, 14)
    x[:, :, 1::2] *= 1000
    layer = Layer("depthwise", weight, None, ConvArgs(padding=(kernel // 2,) * 2, groups=32))
    result = sparse_kernel(layer)(x)
    assert devices.CPU.difference(layer, x, result) == ""
    wrong = result + 1e-3 * result.abs().max()
    assert "differs from dense" in devices.CPU.difference(layer, x, wrong)
