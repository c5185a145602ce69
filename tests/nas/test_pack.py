from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from nas.masks import attach
from nas.packing import PackedNetwork, pack
from nas.packing.layer import Kernel, Layer, sparse_kernel
from nas.sparsity import Unstructured


def masked(module: nn.Module, ratio: float = 0.9) -> nn.Module:
    """`module` in eval mode with magnitude masks on every weight of two dimensions or more."""
    torch.manual_seed(0)
    for path, parameter in list(module.named_parameters()):
        if parameter.dim() > 1:
            attach(module, path, (Unstructured(ratio),)).set_scores(parameter.detach().abs())
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d):
            for parameter in part.parameters():
                nn.init.uniform_(parameter, 0.5, 1.5)
            part.running_mean = torch.randn(part.num_features)
            part.running_var = torch.rand(part.num_features) + 0.5
    return module.eval()


def assert_same(packed: nn.Module, module: nn.Module, *shapes: tuple[int, ...]) -> None:
    """`packed` gives what `module` gives in eval mode on batches 0, 1, 2 and 5."""
    for batch in (0, 1, 2, 5):
        inputs = tuple(torch.randn(batch, *shape) for shape in shapes)
        with torch.no_grad():
            expected = module(*(x.clone() for x in inputs))
        torch.testing.assert_close(packed(*inputs), expected, rtol=1e-4, atol=1e-5)


def kernels_of(packed: PackedNetwork) -> set[str]:
    return {layer.kernel for layer in packed.layers}


def calls(packed: PackedNetwork) -> list[object]:
    assert isinstance(packed.body, GraphModule)
    return [node.target for node in packed.body.graph.nodes if node.op == "call_function"]


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(33, 65),
            nn.BatchNorm1d(65),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(65, 31, bias=False),
            nn.SiLU(),
            nn.Linear(31, 7),
        )


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.first(x)))
        return self.act(x + self.norm2(self.second(y)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        return self.head(self.blocks(x).mean(dim=(2, 3)))


class Separable(nn.Sequential):
    """The operations of DARTS' cells: ReLU first, then convolutions, then batch norm."""

    def __init__(self) -> None:
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False),
            nn.Conv2d(6, 9, 1, bias=False),
            nn.BatchNorm2d(9, affine=False),
            nn.ReLU(),
            nn.Conv2d(9, 6, (3, 5), stride=(2, 1), padding="valid", groups=3),
            nn.Conv2d(6, 4, 3, padding="same", padding_mode="circular"),
        )


class Branching(nn.Module):
    """Data-dependent control flow: it cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding="same")
        self.left = nn.Linear(8, 4)
        self.right = nn.Linear(8, 4)
        self.read = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean(dim=(2, 3))
        x = self.left(x) if bool(x.sum() > 0) else -self.right(x)
        return F.linear(x, self.read.weight)


class Functional(nn.Module):
    """Reads weights without calling their modules; one weight is computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(12, 16)
        self.two = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(F.linear(x, self.one.weight) + self.one.bias)
        x = torch.addmm(self.two.bias, x, 2 * self.two.weight.t())
        return x @ self.one.weight.t()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(10, 10, bias=False)
        self.decode = nn.Linear(10, 10)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.encode(x))
        return self.decode(self.encode(x))


class Cross(nn.Module):
    """Attention whose keys differ from its queries: halves of one weight are used apart."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"seen": self.attention(x, y, y, need_weights=False)[0], "also": x + 1}


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], int]] = {
    "mlp": (Mlp, ((1, 3, 11),), 3),
    "resnet": (ResNet, ((3, 9, 11),), 6),
    "separable": (Separable, ((6, 9, 7),), 4),
    "transformer": (transformer, ((5, 16),), 8),
    "functional": (Functional, ((12,),), 3),
    "tied": (Tied, ((10,),), 3),
    "cross attention": (Cross, ((3, 16), (7, 16)), 3),
    "one layer": (lambda: nn.Linear(8, 8), ((4, 8),), 1),
}


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


def prefer(monkeypatch: pytest.MonkeyPatch, rank: Callable[[Kernel], float]) -> None:
    """Let kernels take the time that `rank` says, whatever the machine does."""

    def time_us(candidates: list[Kernel], x: Tensor) -> list[float]:
        return [rank(kernel) for kernel in candidates]

    for place in ("tune", "runs"):
        monkeypatch.setattr(f"nas.packing.{place}.time_us", time_us)


def prefer_sparse(monkeypatch: pytest.MonkeyPatch, runs: bool = False) -> None:
    ranks = {"sparse_linear": 2.0, "sparse_conv2d": 2.0, "dense": 4.0, "apart": 6.0}
    prefer(monkeypatch, lambda kernel: ranks.get(kernel.name, 3.0 if runs else 9.0))


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
    assert len(chained) == {"mlp": 3, "separable": 3, "transformer": 4, "resnet": 4}.get(
        name, len(chained)
    )


def test_a_run_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_sparse(monkeypatch, runs=True)
    packed = pack(masked(Mlp()), torch.randn(1, 33))
    aten, ops = torch.ops.aten, torch.ops.sparse_nas
    assert calls(packed) == [aten.flatten.using_ints, ops.sparse_chain.default]
    assert sum(layer.us for layer in packed.layers) == pytest.approx(3.0)
    assert kernels_of(packed) == {"sparse_chain[0]"}


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
    module = masked(nn.Sequential(fc, nn.Flatten(), fc))
    packed = pack(module, torch.randn(2, 9))
    assert [layer.layer for layer in packed.layers] == ["0", "0"]
    assert len(list(packed.buffers())) == 2
    assert_same(packed, module, (9,))


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


def test_the_batch_of_the_example_is_the_one_measured() -> None:
    packed = pack(masked(Mlp()), torch.randn(1, 33))
    assert [layer.input_shape for layer in packed.layers] == [(1, 33), (1, 65), (1, 31)]


def test_a_layer_without_zeros_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_sparse(monkeypatch)
    packed = pack(nn.Sequential(nn.Linear(16, 16), masked(nn.Linear(16, 16))), torch.randn(2, 16))
    assert [layer.kernel == "dense" for layer in packed.layers] == [True, False]


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


def test_explain_shows_every_layer_with_its_kernel() -> None:
    packed = pack(masked(Mlp()), torch.randn(4, 33))
    head, *rows = packed.explain().splitlines()
    assert head.split()[:3] == ["layer", "weight", "input"]
    assert [row.split()[:3] for row in rows] == [
        ["1", "65x33", "4x33"],
        ["5", "31x65", "4x65"],
        ["7", "7x31", "4x31"],
    ]


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


def test_a_packed_network_records_no_gradient() -> None:
    packed = pack(masked(Mlp()), torch.randn(2, 33))
    assert not packed(torch.randn(2, 33, requires_grad=True)).requires_grad
    assert not any(parameter.requires_grad for parameter in packed.parameters())


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
