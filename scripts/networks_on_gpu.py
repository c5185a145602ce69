"""The GPU half of bench_networks.py: packed networks beside their dense twins and torch eager.

Bfloat16, images channels-last, masks in blocks of 64 x 64 by magnitude wherever a weight has two
such blocks or more and divides into them: not the first convolution, nor the classifier. Each
output is checked against float32 first; every time is that of replayed CUDA graphs, in turn.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.latency import Timing, measure
from nas.masks import attach_all, bake, pairs
from nas.packing import PackedNetwork, pack
from nas.provenance import provenance
from nas.sparsity import Block
from scripts.bench_networks import resnet_50

DEVICE, DTYPE = "cuda", torch.bfloat16
SIDE = 64  # of a block
NEAR, FURTHER = 0.02, 3.0  # of the norm; than the masked module itself in bfloat16
SECONDS = 0.5
BATCH, SPARSITIES = 64, (0.8, 0.9)
NAMES = ("packed", "twin", "eager")


@dataclass(frozen=True)
class Case:
    """A network and the shape of one sample of its input."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def encoder() -> nn.Module:
    """Four encoder layers of width 1024."""
    layer = nn.TransformerEncoderLayer(
        1024, 16, 4096, batch_first=True, norm_first=True, activation="gelu"
    )
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


CASES = (
    Case("resnet-50", resnet_50, (3, 224, 224)),
    Case("transformer", encoder, (128, 1024)),
)


def run(given: argparse.Namespace) -> int:
    """Measure every network and print a row for each sparsity; 1 if an output was wrong."""
    rows: list[dict[str, Any]] = []
    torch.backends.cudnn.benchmark = True  # dense, in turn, is at its best
    machine = provenance(DEVICE)
    print(machine["device"], machine["versions"]["torch"], HEAD, sep="\n", flush=True)
    for case in CASES:
        if given.only is None or case.name in given.only:
            twin, x = None, _input(given.batch or BATCH, case.shape)
            for sparsity in given.sparsity or SPARSITIES:
                module = _masked(case, sparsity)
                twin = twin or pack(_masked(case, 0.0), x, kernels="dense")
                rows.append(_row(case, sparsity, module, twin, x, given.explain))
                print(_line(rows[-1]), flush=True)
                if given.json:  # after every row: time on such a machine may end
                    given.json.parent.mkdir(parents=True, exist_ok=True)
                    found = {"machine": machine, "rows": rows}
                    given.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row["correct"] for row in rows) else 1


def _input(batch: int, shape: tuple[int, ...]) -> Tensor:
    torch.manual_seed(0)
    return _last(torch.randn(batch, *shape, device=DEVICE).to(DTYPE))


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _masked(case: Case, sparsity: float) -> nn.Module:
    """The network in eval mode, with masks; batch norms have the statistics of random inputs.

    At sparsity 0 there are none: its dense twin is packed from that.
    """
    torch.manual_seed(0)
    module = case.make().to(DEVICE)
    plan = {
        path: ((block,), None)
        for path, weight in module.named_parameters()
        if (block := _block(weight, sparsity)) is not None
    }
    attach_all(module, plan if sparsity else {})
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 1.0
    with torch.no_grad():  # so that numbers neither vanish nor grow
        module.train()(torch.randn(8, *case.shape, device=DEVICE))
    return module.eval().to(DTYPE)


def _block(weight: Tensor, sparsity: float) -> Block | None:
    """What masks a weight: of few blocks one at least is kept; None: it stays dense."""
    if weight.dim() not in (2, 4) or weight.shape[0] % SIDE or weight.shape[1] % SIDE:
        return None
    blocks = weight.numel() // SIDE**2
    return None if blocks < 2 else Block(SIDE, SIDE, min(sparsity, 1 - 1 / blocks))


@torch.no_grad()
def _row(
    case: Case, sparsity: float, module: nn.Module, twin: PackedNetwork, x: Tensor, explain: bool
) -> dict[str, Any]:
    begun = time.perf_counter()
    packed = pack(module, x, measure="anew")
    pack_s = time.perf_counter() - begun
    eager = bake(copy.deepcopy(module)).requires_grad_(False)
    eager = eager.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    row: dict[str, Any] = {"network": case.name, "batch": len(x), "dtype": str(DTYPE)}
    row |= {"sparsity": sparsity, "kept": _kept(module), "pack_s": pack_s}
    row |= _agreement(packed, eager, x)
    row |= {"kernels": dict(Counter(layer.kernel for layer in packed.layers))}
    row |= {"notes": [*packed.notes, *([packed.whole] if packed.whole else [])]}
    row |= {"layers": [asdict(layer) for layer in packed.layers]}
    if explain:
        print(packed.explain())
    if row["correct"]:
        row |= _times(packed, twin, eager, x)
    return row


def _kept(module: nn.Module) -> float:
    """The share that the masks keep of the weights that have one."""
    masks = [sparse.masks for sparse, _ in pairs(module)]
    return sum(float(m.double().sum()) for m in masks) / max(1, sum(m.numel() for m in masks))


def _agreement(packed: PackedNetwork, eager: nn.Module, x: Tensor) -> dict[str, Any]:
    """How far the packed network and the module itself lie from the module in float32."""
    true = copy.deepcopy(eager).float()(x.float())
    norm = float(true.norm())
    apart, own = (float((network(x).float() - true).norm()) / norm for network in (packed, eager))
    return {"correct": apart <= max(NEAR, FURTHER * own), "apart": apart, "eager_apart": own}


def _times(
    packed: PackedNetwork, twin: PackedNetwork, eager: nn.Module, x: Tensor
) -> dict[str, Any]:
    """Milliseconds and spreads, and how many times faster the packed network is."""
    beside = [measure(packed, other, x, seconds=SECONDS) for other in (twin, eager)]
    ms = {"packed": beside[0].median_ms} | _of_the_other(beside, "twin_median_ms")
    iqr_ms = {"packed": beside[0].iqr_ms} | _of_the_other(beside, "twin_iqr_ms")
    return {
        "ms": ms,
        "iqr_ms": iqr_ms,
        "reliable": all(timing.reliable for timing in beside),
        "times_twin": beside[0].speedup,
        "times_eager": beside[1].speedup,
    }


def _of_the_other(beside: list[Timing], what: str) -> dict[str, Any]:
    return dict(zip(NAMES[1:], (getattr(timing, what) for timing in beside), strict=True))


HEAD = (
    f"{'network':12} {'batch':>5} {'zeros':>5} {'kept':>5} {'packed ms':>10} {'twin ms':>10} "
    f"{'eager ms':>10} {'x twin':>7} {'x eager':>7} {'pack s':>6}  kernels"
)


def _line(row: dict[str, Any]) -> str:
    name = f"{row['network']:12} {row['batch']:5} {row['sparsity']:5.2f} {row['kept']:5.2f} "
    if not row["correct"]:
        apart, own = row["apart"], row["eager_apart"]
        return f"{name} WRONG: {apart:.3g} from float32, the module itself {own:.3g}"
    ms = " ".join(f"{row['ms'][key]:10.3f}" for key in NAMES)
    kernels = ", ".join(f"{count} {kernel}" for kernel, count in row["kernels"].items())
    unsure = "" if row["reliable"] else " (unsteady)"
    return (
        f"{name}{ms} {row['times_twin']:7.2f} {row['times_eager']:7.2f} {row['pack_s']:6.1f}  "
        f"{kernels}{unsure}"
    )
