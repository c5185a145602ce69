from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.blob import head
from kernels.network import Step
from kernels.network.plan import plan
from kernels.network.program import read
from nas.packing import PackedLayer, PackedNetwork, PackedRun, pack
from nas.packing.layer import Kernel
from tests.pack_models import CALL_US, Mlp, Residual, masked, prefer, prefer_sparse

OTHER_US = 1000.0  # of a step without a weight


class Mixed(nn.Module):
    """All that a run may hold: a norm by itself, pooling, a sum, a layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 16, 1, stride=2)
        self.fc = nn.Linear(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(self.norm(x)), 3, 1, 1)
        x = self.conv(F.relu(x + self.conv(x)))
        x = F.avg_pool2d(self.down(x), 2)
        return self.head(F.relu(self.fc(x.mean((2, 3)))))


def nonzeros(step: Step) -> float:
    """What a step with a weight takes in these tests, microseconds."""
    assert step.packed is not None
    return float(head(step.packed.data.numpy())["nonzeros"])


def step_s(x: Tensor, program: Tensor, tail: Sequence[int], calls: int = 1) -> list[float]:
    """As `kernels.network.step_s`, of steps that take so long by their weights."""
    graph = read(program)
    own = [OTHER_US if step.packed is None else nonzeros(step) for step in graph.steps]
    runs = plan(graph).runs
    return [sum(own[i : i + count]) * calls / 1e6 for i, count in enumerate(runs)]


def packed_mixed(monkeypatch: pytest.MonkeyPatch) -> PackedNetwork:
    """One run; of its layers by themselves only `head` takes 6 us, all others 2."""

    def rank(kernel: Kernel) -> float:
        head = kernel.name == "sparse_linear" and kernel.steps[0].args[2] == 5
        return {"dense": 8.0, "apart": 60.0}.get(kernel.name, 6.0 if head else 2.0)

    prefer(monkeypatch, rank)
    monkeypatch.setattr("kernels.network.step_s", step_s)
    packed = pack(masked(Mixed(), 0.5), torch.randn(2, 3, 8, 8))
    assert {layer.kernel for layer in packed.layers} == {"sparse_chain[0]"}
    return packed


def kept(layer: PackedLayer) -> float:
    return float((1 - layer.sparsity) * torch.Size(layer.weight_shape).numel())


def test_a_layer_in_a_run_takes_what_its_own_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = packed_mixed(monkeypatch).layers
    assert [x.layer for x in layers] == ["stem", "conv", "conv", "down", "fc", "head"]
    assert len({kept(layer) for layer in layers}) == 5
    for layer in layers[:4]:
        assert layer.us == pytest.approx(kept(layer))


def test_layers_that_run_as_one_step_share_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = packed_mixed(monkeypatch).layers[-2:]
    whole = kept(first) + kept(second)
    assert (first.us, second.us) == pytest.approx((whole / 4, whole * 3 / 4))


def test_the_rows_of_a_run_add_up_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_mixed(monkeypatch)
    (run,) = packed.runs
    assert run.between_us > 3 * OTHER_US and run.between_us % OTHER_US == 3  # the norm's weights
    lines = packed.explain().splitlines()
    assert len(lines) == 1 + len(packed.layers) + 2
    at = lines[0].index("us ")
    times = [float(line[at:].split()[0]) for line in lines[1:]]
    assert lines[-2].startswith("(pooling, sums, copies) ") and times[-2] == run.between_us
    assert lines[-1].startswith("(the call) ") and times[-1] == run.call_us == CALL_US
    steps_us = sum(layer.us for layer in packed.layers) + run.between_us
    assert sum(times) == pytest.approx(steps_us + CALL_US)


def test_what_a_run_does_besides_stands_behind_its_last_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = packed_mixed(monkeypatch)
    others = [
        replace(layer, kernel=f"sparse_chain[{i}]") for i in (1, 2) for layer in packed.layers
    ]
    runs = (PackedRun("sparse_chain[1]", 0.0, 5.0), PackedRun("sparse_chain[2]", 7.0, 5.0))
    alone = replace(packed.layers[0], kernel="dense")
    both = PackedNetwork(nn.Identity(), (*others[:6], alone, *others[6:]), (), runs=runs)
    rows = [line.split("  ")[0] for line in both.explain().splitlines()[1:]]
    names = [layer.layer for layer in packed.layers]
    rest = "(pooling, sums, copies)"
    assert rows == [*names, "(the call)", alone.layer, *names, rest, "(the call)"]


def test_without_a_core_layers_share_the_time_of_their_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prefer_sparse(monkeypatch, runs=True)
    monkeypatch.setattr("nas.packing.spent.library", lambda: None)
    monkeypatch.setattr("nas.packing.report.limits", lambda: None)
    packed = pack(masked(Mlp()), torch.randn(1, 33))
    assert [layer.us for layer in packed.layers] == pytest.approx([1.0, 1.0, 1.0])
    assert {layer.limit_us for layer in packed.layers} == {None}
    head, *rows = packed.explain().splitlines()
    assert {row[head.index("of limit") :].split()[0] for row in rows} == {"-"}


class Core:
    """A core that does a multiply-add in 1 us and reads a byte in 1 ms, if not both at once."""

    def least_us(self, multiply_adds: float, size: float) -> float:
        return multiply_adds + 1000 * size


@pytest.mark.parametrize("threads", [1, 2])
def test_the_limit_is_the_least_time_with_the_zeros_left_out(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nas.packing.report.limits", Core)
    layers: list[tuple[nn.Conv2d | nn.Linear, tuple[int, ...]]] = [
        (nn.Conv2d(8, 6, (3, 5), stride=2, padding=1, dilation=(1, 2), groups=2), (2, 8, 9, 13)),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), (1, 8, 5, 5)),
        (nn.Linear(12, 7), (3, 4, 12)),
    ]
    positions = [2 * 5 * 4, 5 * 5, 3 * 4]
    outputs = [2 * 6 * 5 * 4, 8 * 5 * 5, 3 * 4 * 7]
    for (module, shape), places, written in zip(layers, positions, outputs, strict=True):
        x = torch.randn(shape)
        (layer,) = pack(masked(module, 0.75), x, threads=threads).layers
        zeros_out = module.weight.numel() // 4
        assert module(x).numel() == written
        size = 4 * (zeros_out + x.numel() + written)
        assert layer.limit_us == pytest.approx((zeros_out * places + 1000 * size) / threads)


def test_explain_gives_the_share_of_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_sparse(monkeypatch)
    packed = pack(masked(Mlp()), torch.randn(4, 33))
    packed.layers = tuple(
        replace(x, us=80.0, limit_us=20.0 * i) for i, x in enumerate(packed.layers)
    )
    head, *rows = packed.explain().splitlines()
    at = head.index("of limit")
    assert [row[at:].split()[0] for row in rows] == ["0%", "25%", "50%"]


def test_layers_exchanged_one_by_one_have_limits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Residual(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) if bool(x.sum() > 0) else x

    monkeypatch.setattr("nas.packing.report.limits", Core)
    packed = pack(masked(Deciding()), torch.ones(1, 4, 6, 6))
    assert packed.runs == ()
    assert all(layer.limit_us is not None and layer.limit_us > 0 for layer in packed.layers)
