"""Trained residual networks, pruned, fine-tuned briefly and packed: predictions and speed.

    python scripts/bench_pruned.py --data DIR --json FILE

DIR holds CIFAR-10, `resnet20_cifar10.safetensors` and `resnet56_cifar10.safetensors`. The packed
predictions are compared with the masked ones on the whole test set; they may differ only
where two classes tie within rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from nas import pack
from nas.data import LabelledImages, read_cifar10
from nas.latency import measure
from nas.masks import attach
from nas.provenance import provenance
from nas.sparsity import Unstructured
from scripts.bench_sparsify import Case, agreement, error, images, outputs, trained

TRAINED_ON = 10_000
DEPTHS, SPARSITIES = (20, 56), (0.8, 0.9)


def arguments() -> argparse.Namespace:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--epochs", type=int, default=1, help=f"of fine-tuning on {TRAINED_ON} images")
    p.add_argument("--json", type=Path)
    return p.parse_args()


def main() -> None:
    """Prune, fine-tune, pack and compare; print and write what was seen."""
    given = arguments()
    parts, rows = read_cifar10(given.data), []
    for depth in DEPTHS:
        for sparsity in SPARSITIES:
            torch.manual_seed(0)
            case = made(trained(given.data, depth), f"resnet-{depth}", *parts)
            rows.append(row(case, sparsity, given.epochs))
            print(json.dumps(rows[-1]), flush=True)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": provenance("cpu"), "rows": rows}
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def made(model: nn.Module, name: str, train: LabelledImages, test: LabelledImages) -> Case:
    """A case whose test part is the whole test set."""
    whole = images(test, slice(None))
    return Case(name, model, images(train, slice(TRAINED_ON)), whole, whole, lr=0.01)


def row(case: Case, sparsity: float, epochs: int) -> dict[str, Any]:
    """What one network gives, masked and packed, and how fast it is."""
    module, (x, y) = case.model, case.test
    dense_error = error(outputs(module, x), y)
    for path, weight in list(module.named_parameters()):
        if weight.dim() > 1 and weight.shape[1] > 3:
            attach(module, path, (Unstructured(sparsity),)).set_scores(weight.detach().abs())
    case.train(module, epochs)
    masked = outputs(module, x)
    packed, twin = pack(module, x[:1], threads=1), pack(module, x[:1], kernels="dense", threads=1)
    return {
        "network": case.name,
        "sparsity": sparsity,
        "epochs": epochs,
        "test_error": {"before pruning": dense_error, "masked": error(masked, y)},
        "agreement": agreement(masked, outputs(packed, x)),
        "latency": asdict(measure(packed, twin, x[:1], threads=1)),
        "kernels": sorted({layer.kernel for layer in packed.layers}),
    }


if __name__ == "__main__":
    main()
