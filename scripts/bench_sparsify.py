"""Sparsify trained models of one's own, search, and check what the front promises.

    python scripts/bench_sparsify.py --data DIR --json FILE

For each point of each front: the packed network against the masked one on all evaluation samples,
its error against the one that the run reported, and its latency measured once more.
DIR holds CIFAR-10 and `resnet20_cifar10.safetensors`; without it that model is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nas import Evaluate, Latency, NonZeros, pack, search, sparsify
from nas.data import LabelledImages, read_cifar10
from nas.latency import measure
from nas.packing import PackedNetwork
from nas.provenance import provenance
from nas.run import Point
from search_spaces.sparsified import resnet
from strategies.random_search import RandomSearch

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAINED_ON, HELD_OUT, TESTED_ON = 4000, 2000, 2000
LENGTH, FEATURES = 8, 8
BATCH = 100

Part = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A trained model, its data, and functions on a plain `nn.Module` such as a user writes."""

    name: str
    model: nn.Module
    train_part: Part
    validation: Part
    test: Part
    lr: float

    def train(self, module: nn.Module, epochs: int) -> None:
        """Fine-tune in place by SGD."""
        x, y = self.train_part
        optimizer = torch.optim.SGD(module.parameters(), self.lr, 0.9, weight_decay=1e-4)
        module.train()
        for _ in range(epochs):
            for i in torch.split(torch.randperm(len(x)), BATCH):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(module(x[i]), y[i]))
                nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()

    def validate(self, module: nn.Module) -> dict[str, float]:
        """Error on the validation part."""
        return {"error": error(outputs(module, self.validation[0]), self.validation[1])}


class Classifier(nn.Module):
    """A transformer encoder and a head on the mean of its outputs."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, LENGTH, FEATURES) to (N, FEATURES)."""
        return self.head(self.encoder(self.embed(x)).mean(1))


class Refining(nn.Module):
    """One layer, called again for as long as its output still changes by much."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        self.first = nn.Linear(LENGTH * FEATURES, width)
        self.again = nn.Linear(width, width)
        self.head = nn.Linear(width, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, LENGTH, FEATURES) to (N, FEATURES)."""
        hidden = torch.relu(self.first(x.flatten(1)))
        for _ in range(3):
            change = torch.relu(self.again(hidden))
            hidden = hidden + change
            if change.abs().mean() < 0.1 * hidden.abs().mean():
                break
        return self.head(hidden)


def arguments() -> argparse.Namespace:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--data", type=Path)
    p.add_argument("--json", type=Path)
    return p.parse_args()


def main() -> None:
    """Search every case, print and write what was seen."""
    given = arguments()
    torch.manual_seed(0)
    cases = [resnet20(given.data)] if given.data else []
    cases += [on_sequences("transformer", Classifier()), on_sequences("refining", Refining())]
    found = {"machine": provenance("cpu"), "cases": [searched(case) for case in cases]}
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def trained(data: Path, depth: int) -> nn.Module:
    """The residual network of `resnet20_cifar10.safetensors`, or another depth's."""
    described, file = resnet((3, 32, 32), 10, depth=depth), f"resnet{depth}_cifar10.safetensors"
    model = described.build(described.largest(), masked=False)
    missing, unexpected = model.load_state_dict(load_file(data / file), strict=False)
    wrong = [name for name in missing if not name.endswith("num_batches_tracked")] + unexpected
    if wrong:
        raise ValueError(f"{file}: does not fit a ResNet-{depth}: {wrong}")
    return model


def resnet20(data: Path) -> Case:
    """The trained ResNet-20; its validation images were among those it was first trained on."""
    model, (train, test) = trained(data, 20), read_cifar10(data)
    return Case(
        "resnet20",
        model,
        images(train, slice(TRAINED_ON)),
        images(train, slice(-HELD_OUT, None)),
        images(test, slice(TESTED_ON)),
        lr=0.02,
    )


def images(part: LabelledImages, which: slice) -> Part:
    """Normalised images (N, 3, 32, 32) float32 and labels."""
    pixels = torch.from_numpy(np.ascontiguousarray(part.images[which])).float() / 255
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (pixels - mean) / deviation, torch.from_numpy(part.labels[which])


def on_sequences(name: str, model: nn.Module) -> Case:
    """A model trained to say which feature has the largest sum over a made-up sequence."""
    x = torch.randn(TRAINED_ON + HELD_OUT + TESTED_ON, LENGTH, FEATURES)
    sizes = [TRAINED_ON, HELD_OUT, TESTED_ON]
    xs, ys = (torch.split(whole, sizes) for whole in (x, x.sum(1).argmax(1)))
    train, held, test = zip(xs, ys, strict=True)
    case = Case(name, model, train, held, test, lr=0.05)
    case.train(model, 4)
    return case


def searched(case: Case) -> dict[str, Any]:
    """Search the case for three trials and check each point of the front."""
    begun = time.perf_counter()
    space = sparsify(case.model.eval(), case.validation[0][:2])
    costs = (NonZeros(), Latency("cpu", threads=1))
    evaluate = Evaluate(train=case.train, validate=case.validate, costs=costs)
    start = {"validation": case.validate(case.model)["error"], "test": tested(case, case.model)}
    found: dict[str, Any] = {"case": case.name, "choices": len(space.choices), "start": start}
    print(json.dumps(found), flush=True)
    with tempfile.TemporaryDirectory() as out:
        wanted = ("error", "latency_ms")
        strategy = RandomSearch(seed=0)
        run = search(space, strategy, evaluate, out=out, objectives=wanted, trials=3, epochs=1)
        found["trials"] = [
            {"status": r.result.status, "error": r.result.error, "metrics": r.result.metrics}
            for r in run.records.values()
        ]
        found["front"] = [checked(case, point) for point in run.front()]
    for row in found["front"]:
        print(json.dumps(row), flush=True)
    return found | {"seconds": time.perf_counter() - begun}


def checked(case: Case, point: Point) -> dict[str, Any]:
    """What the packed network of a point gives, beside what the run promised."""
    module, (x, y) = point.module(), case.validation
    packed = pack(module, x[:1], threads=1)
    agrees = agreement(outputs(module, x), given := outputs(packed, x))
    return {
        "trial": point.number,
        "nonzeros": point.metrics["nonzeros"],
        "agreement": agrees,
        "error": {"reported": point.metrics["error"], "packed": error(given, y)},
        "test_error": tested(case, packed),
        "latency_ms": latency(point, packed, pack(module, x[:1], kernels="dense"), x[:1]),
        "kernels": dict(Counter(layer.kernel for layer in packed.layers)),
        "notes": list(packed.notes),
        "whole": packed.whole,
    }


def agreement(masked: Tensor, packed: Tensor) -> dict[str, Any]:
    """How far outputs (N, classes) lie apart; predictions within that distance of a tie may turn.

    Raises:
        ValueError: Other predictions differ: a time of such a network would mean nothing.
    """
    apart = float((masked - packed).abs().max())
    first, second = masked.topk(2).values.unbind(1)
    differ = masked.argmax(1) != packed.argmax(1)
    beyond = int((differ & (first - second > 2 * apart)).sum())
    scale = float(masked.abs().max())
    if beyond or not apart <= 1e-3 * scale:
        raise ValueError(
            f"packed outputs are {apart:g} apart (largest {scale:g}), {beyond} differ"
        )
    return {"max_abs_difference": apart, "largest": scale, "differ_at_ties": int(differ.sum())}


def latency(point: Point, packed: PackedNetwork, twin: PackedNetwork, x: Tensor) -> dict[str, Any]:
    """The latency that the run reported and one measured now, each in turn with its twin."""
    reported = point.record.result.details["latency_ms"]
    again = measure(packed, twin, x, threads=1)
    apart, spread = again.median_ms - reported["value"], again.iqr_ms + reported["iqr_ms"]
    return {
        "reported": reported["value"],
        "reported_iqr": reported["iqr_ms"],
        "reported_reliable": reported["reliable"],
        "dense_twin": reported["twin_median_ms"],
        "again": {k: v for k, v in asdict(again).items() if not k.startswith("twin")},
        "within_both_iqrs": abs(apart) <= spread,
        "ratio": again.median_ms / reported["value"],
    }


@torch.no_grad()
def outputs(module: nn.Module, x: Tensor) -> Tensor:
    """Outputs (N, classes) in eval mode, batch by batch."""
    module.eval()
    return torch.cat([module(part) for part in torch.split(x, BATCH)])


def error(given: Tensor, y: Tensor) -> float:
    """Share of wrong predictions."""
    return (given.argmax(1) != y).double().mean().item()


def tested(case: Case, module: nn.Module) -> float:
    """Error on the test part."""
    return error(outputs(module, case.test[0]), case.test[1])


if __name__ == "__main__":
    main()
