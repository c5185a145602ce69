"""Whole networks: packed beside their dense twin, torch eager and torch.compile.

    python scripts/bench_networks.py --json FILE
    python scripts/bench_networks.py --device cuda --json FILE

Masks keep the largest weights; accuracy is not the question here. Each packed network's output is
checked against its masked module's first. All take turns, round by round; medians in milliseconds.
Where a packed network is one call, what that takes beside the C core is measured too. On a GPU:
see networks_on_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from kernels.network import step_s
from nas.latency import interleaved, no_gc
from nas.masks import attach, bake
from nas.packing import PackedNetwork, pack
from nas.provenance import provenance
from nas.sparsity import Unstructured
from scripts import options
from search_spaces.cell import cell
from search_spaces.sparsified import resnet

SPARSITIES = (0.7, 0.8, 0.9)
SECONDS, ROUNDS = 0.3, 11
PAIRS = 51  # of rounds, each of which gives a difference
TOLERANCE = 1e-4  # of the largest output


def convolution(
    channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Module:
    """A convolution that keeps the size at stride 1, and its batch norm."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


def mobilenet_v1() -> nn.Module:
    """Howard et al. 1704.04861, width 1."""
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5]
    layers, channels = [convolution(3, 32, 3, 2), nn.ReLU()], 32
    for out, stride in (*plan, (1024, 2), (1024, 1)):
        layers += [convolution(channels, channels, 3, stride, channels), nn.ReLU()]
        layers += [convolution(channels, out, 1), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


class Inverted(nn.Module):
    """The block of MobileNet-v2."""

    def __init__(self, channels: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = channels * expand
        widen = [convolution(channels, wide, 1), nn.ReLU6()] if expand > 1 else []
        between = [convolution(wide, wide, 3, stride, wide), nn.ReLU6()]
        self.layers = nn.Sequential(*widen, *between, convolution(wide, out, 1))
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, out, H / stride, W / stride)."""
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilenet_v2() -> nn.Module:
    """Sandler et al. 1801.04381, width 1."""
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)]
    layers, channels = [convolution(3, 32, 3, 2), nn.ReLU6()], 32
    for expand, out, count, stride in (*plan, (6, 160, 3, 2), (6, 320, 1, 1)):
        for i in range(count):
            layers.append(Inverted(channels, out, stride if i == 0 else 1, expand))
            channels = out
    layers += [convolution(320, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, 1000))


class Bottleneck(nn.Module):
    """The block of ResNet-50, its stride in the 3x3."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        layers = [convolution(channels, width, 1), nn.ReLU()]
        layers += [
            convolution(width, width, 3, stride),
            nn.ReLU(),
            convolution(width, 4 * width, 1),
        ]
        self.layers = nn.Sequential(*layers)
        same = channels == 4 * width and stride == 1
        self.shortcut = nn.Identity() if same else convolution(channels, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return torch.relu(self.layers(x) + self.shortcut(x))


def resnet_50() -> nn.Module:
    """He et al. 1512.03385, for images of 224 x 224."""
    layers, channels = [convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(channels, width, 1 if block else stride))
            channels = 4 * width
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))
    return nn.Sequential(*layers, *head)


def residual(depth: int) -> nn.Module:
    """The residual network for CIFAR."""
    space = resnet((3, 32, 32), 10, depth=depth)
    return space.build(space.largest(), masked=False)


def cells() -> nn.Module:
    """A DARTS network, C = 36 and 8 cells, its edges drawn."""
    space = cell((3, 32, 32), 10, cells=8, channels=36)
    return space.build(space.sample(np.random.default_rng(0)), masked=False)


def transformer() -> nn.Module:
    """Four encoder layers of width 256 on 64 tokens."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def tiny() -> nn.Module:
    """Two convolutions of 8 channels: what a call takes beside its kernels shows."""
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))


@dataclass(frozen=True)
class Case:
    """A network, its input, and which of its weights are masked."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    masks: Callable[[nn.Parameter], bool]


def pointwise(weight: nn.Parameter) -> bool:
    """Of a 1x1 convolution."""
    return weight.dim() == 4 and weight.shape[2:] == (1, 1)


def inner(weight: nn.Parameter) -> bool:
    """Of any layer but one that reads pixels."""
    return weight.dim() > 1 and weight.shape[1] > 3


IMAGE, SMALL = (3, 224, 224), (3, 32, 32)
CASES = (
    Case("mobilenet-v1", mobilenet_v1, IMAGE, pointwise),
    Case("mobilenet-v2", mobilenet_v2, IMAGE, pointwise),
    Case("resnet-20", lambda: residual(20), SMALL, inner),
    Case("resnet-56", lambda: residual(56), SMALL, inner),
    Case("resnet-50", resnet_50, IMAGE, inner),
    Case("darts-cells", cells, SMALL, pointwise),
    Case("transformer", transformer, (64, 256), inner),
    Case("tiny", tiny, (8, 4, 4), inner),
)


def arguments() -> argparse.Namespace:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--only", nargs="*", choices=[case.name for case in CASES])
    p.add_argument("--sparsity", type=float, nargs="+", help="default .7 .8 .9, on a GPU .8 .9")
    p.add_argument("--batch", type=int, help="default 1, on a GPU 64")
    p.add_argument("--device", type=options.device, choices=["cpu", "cuda"], default="cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--explain", action="store_true", help="print what each layer got")
    p.add_argument("--json", type=Path)
    return p.parse_args()


def main() -> int:
    """Measure every network; 1 if an output was wrong."""
    given = arguments()
    if given.device == "cuda":
        from scripts import networks_on_gpu

        return networks_on_gpu.run(given)
    given.sparsity, given.batch = given.sparsity or SPARSITIES, given.batch or 1
    torch.set_num_threads(given.threads)
    rows = []
    for case in CASES:
        if given.only is None or case.name in given.only:
            rows += measured(case, given)
    print(*table(rows), sep="\n")
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": provenance("cpu"), "threads": given.threads, "rows": rows}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row["correct"] for row in rows) else 1


def measured(case: Case, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each sparsity."""
    torch.manual_seed(0)
    x, module = torch.randn(given.batch, *case.shape), case.make().eval()
    twin = pack(module, x, kernels="dense", threads=given.threads)
    compiled = None if given.no_compile else torch.compile(module)
    rows = []
    for sparsity in given.sparsity:
        sparse = masked(case, sparsity)
        begun = time.perf_counter()
        packed = pack(sparse, x, threads=given.threads, measure="anew")
        pack_s = time.perf_counter() - begun
        row = {"network": case.name, "batch": given.batch, "sparsity": sparsity, "pack_s": pack_s}
        row |= agreement(packed, sparse, x) | times(packed, twin, module, compiled, x)
        row |= overhead(packed, x)
        if given.explain:
            print(packed.explain())
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def masked(case: Case, sparsity: float) -> nn.Module:
    """The network with masks on the weights that the case names."""
    torch.manual_seed(0)
    module = case.make()
    for path, weight in list(module.named_parameters()):
        if case.masks(weight):
            attach(module, path, (Unstructured(sparsity),)).set_scores(weight.detach().abs())
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():  # statistics of its own, so that numbers neither vanish nor grow
        module.train()(torch.randn(2, *case.shape))
    return module.eval()


@torch.no_grad()
def agreement(packed: PackedNetwork, module: nn.Module, x: Tensor) -> dict[str, Any]:
    """Whether both give the same, and how far they lie apart."""
    right = bake(module)(x)
    apart = float((packed(x) - right).abs().max() / right.abs().max())
    kernels = sorted({layer.kernel.partition("[")[0] for layer in packed.layers})
    notes = [*packed.notes, *([packed.whole] if packed.whole else [])]
    return {"correct": apart < TOLERANCE, "apart": apart, "kernels": kernels, "notes": notes}


@torch.no_grad()
def times(
    packed: nn.Module, twin: nn.Module, eager: nn.Module, compiled: Any, x: Tensor
) -> dict[str, Any]:
    """Milliseconds of each, and how many times faster the packed network is."""
    calls = {"packed": packed, "twin": twin, "eager": eager}
    if compiled is not None:
        calls["compiled"] = compiled
    found = interleaved([partial(call, x) for call in calls.values()], SECONDS, ROUNDS)
    ms = {name: seconds * 1e3 for name, seconds in zip(calls, found, strict=True)}
    best = min(ms[name] for name in ("eager", "compiled") if name in ms)
    return {"ms": ms, "times_twin": ms["twin"] / ms["packed"], "times_torch": best / ms["packed"]}


@torch.no_grad()
def overhead(packed: PackedNetwork, x: Tensor) -> dict[str, Any]:
    """Microseconds inside the C core, and of a call beside them; nothing if there are more calls.

    The second is the median difference of neighbouring rounds: of a large network one of two
    large numbers, so look at its spread.
    """
    program = only_program(packed)
    if program is None:
        return {}
    (seconds,) = interleaved([partial(packed, x)], SECONDS / 3, ROUNDS)
    count, rounds = max(1, int(SECONDS / PAIRS / 2 / seconds)), []
    with no_gc():
        for _ in range(PAIRS):
            inside = sum(step_s(x, *program, count)) / count * 1e6
            rounds.append((inside, clock(packed, x, count) / count * 1e6 - inside))
    core, beside = zip(*rounds, strict=True)
    low, middle, high = statistics.quantiles(beside, n=4)
    found = {"core_us": statistics.median(core), "overhead_us": middle}
    return found | {"overhead_iqr_us": high - low}


def clock(call: Callable[[Tensor], Any], x: Tensor, count: int) -> float:
    """Seconds of so many calls."""
    begun = time.perf_counter()
    for _ in range(count):
        call(x)
    return time.perf_counter() - begun


def only_program(packed: PackedNetwork) -> tuple[Tensor, list[int]] | None:
    """The program and the tail of its output, where a network calls one and nothing else."""
    if not isinstance(packed.body, GraphModule):
        return None
    nodes = [node for node in packed.body.graph.nodes if node.op == "call_function"]
    chain = torch.ops.sparse_nas.sparse_chain.default
    rest = {node.target for node in nodes[1:]} - {torch.ops.aten.flatten.using_ints}
    if not nodes or nodes[0].target is not chain or rest:
        return None
    _, program, tail = nodes[0].args
    return packed.body.get_buffer(str(program.target)), list(tail)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows for reading: milliseconds, and microseconds of a call beside the C core."""
    names = ("packed", "twin", "eager", "compiled")
    head = f"{'network':14} {'zeros':>5} " + " ".join(f"{name + ' ms':>11}" for name in names)
    lines = [f"{head} {'x twin':>7} {'x torch':>7} {'overhead us':>16}"]
    for row in rows:
        ms = " ".join(f"{row['ms'][n]:11.3f}" if n in row["ms"] else f"{'-':>11}" for n in names)
        beside = "-"
        if "overhead_us" in row:
            beside = f"{row['overhead_us']:.1f} +- {row['overhead_iqr_us']:.1f}"
        lines.append(
            f"{row['network']:14} {row['sparsity']:5.2f} {ms} {row['times_twin']:7.2f} "
            f"{row['times_torch']:7.2f} {beside:>16}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
