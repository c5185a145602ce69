"""Networks of all kinds, and what to hold their packed forms against."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from nas.masks import attach
from nas.packing import PackedNetwork
from nas.packing.layer import Kernel
from nas.sparsity import Unstructured

CALL_US = 9.0  # of an empty call, where `prefer` says what takes how long


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


def prefer(monkeypatch: pytest.MonkeyPatch, rank: Callable[[Kernel], float]) -> None:
    """Let kernels take the time that `rank` says, whatever the machine does.

    A whole network is faster with its chosen kernels than dense. Runs are called a few times.
    """

    def time_us(candidates: list[Kernel], x: Tensor, seconds: float = 0.0) -> list[float]:
        return [rank(kernel) for kernel in candidates]

    def whole(*_: object) -> list[float]:
        return [1.0, 2.0]

    monkeypatch.setattr("nas.packing.spent.SECONDS", 0.0)
    monkeypatch.setattr("nas.packing.spent._seconds", lambda kernel, x: CALL_US / 1e6)
    for place in ("tune", "runs"):
        monkeypatch.setattr(f"nas.packing.{place}.time_us", time_us)
    monkeypatch.setattr(importlib.import_module("nas.packing.pack"), "interleaved", whole)


def prefer_sparse(monkeypatch: pytest.MonkeyPatch, runs: bool = False) -> None:
    ranks = {"sparse_linear": 2.0, "sparse_conv2d": 2.0, "dense": 4.0, "apart": 6.0}
    prefer(monkeypatch, lambda kernel: ranks.get(kernel.name, 3.0 if runs else 9.0))
