"""One whole round of DARTS on the cell space, timed: images/s, memory, and the cell it leads to.

    python scripts/bench_supernet.py --data DIR --device cuda --json FILE

First some steps alone are timed at each batch size (an image counts once for its step of the
weights, with its step of the mixture in the time); then a search of one round runs, and the
architecture that it leads to is trained from scratch.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from nas import Evaluate, Flops, NonZeros, Parameters, Training, search
from nas.data import TASKS
from nas.provenance import provenance
from nas.run import Record
from nas.space import Space
from nas.tasks import Task, load_task
from scripts import options
from search_spaces.cell import cell
from strategies.bilevel import Bilevel
from strategies.darts import Darts

STEPS = 12


def arguments() -> argparse.Namespace:
    """The options."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--task", choices=TASKS, default="cifar10")
    p.add_argument("--data", type=Path)
    p.add_argument("--device", type=options.device, default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--cells", type=int, default=8)
    p.add_argument("--channels", type=int, default=16)
    p.add_argument("--batches", type=int, nargs="*", default=[64, 256], help="timed alone")
    p.add_argument("--batch-size", type=int, default=256, help="of the round")
    p.add_argument("--search-epochs", type=int, default=2)
    p.add_argument("--epochs", type=int, default=6, help="of the derived network")
    p.add_argument("--out", type=Path, help="the run's folder (a temporary one)")
    p.add_argument("--json", type=Path)
    return p.parse_args()


def main() -> None:
    """Time steps, run a round, print and write what was seen."""
    given = arguments()
    task = load_task(given.task, given.data)
    space = cell(TASKS[given.task], task.outputs, given.cells, given.channels)
    found: dict[str, Any] = {
        "machine": provenance(given.device),
        "space": {"cells": given.cells, "channels": given.channels, "task": given.task},
        "steps": [timed_steps(space, task, batch, given.device) for batch in given.batches],
    }
    for row in found["steps"]:
        print(json.dumps(row), flush=True)
    found["round"] = whole_round(space, task, given)
    print(json.dumps(found["round"]), flush=True)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def timed_steps(space: Space, task: Task, batch: int, device: str) -> dict[str, Any]:
    """Milliseconds of a bilevel step, images per second and the most memory in use."""
    few = replace(
        task,
        train=task.train.subset(torch.arange(2 * batch * STEPS)),
        validation=task.validation.subset(torch.arange(batch)),
    )
    torch.manual_seed(0)
    network = space.build({}).to(device)
    fit = Bilevel(batch_size=batch, mixture_lr=1e-3)
    fit.fit(network, replace(few, train=few.train.subset(torch.arange(4 * batch))), 1, go_on)
    _reset_peak(device)
    begun = _now(device)
    fit.fit(network, few, 1, go_on)
    step_ms = (_now(device) - begun) / STEPS * 1e3
    rate = batch / step_ms * 1e3
    return {"batch": batch, "step_ms": step_ms, "images_per_s": rate, "peak_gib": _peak(device)}


def go_on(step: int, metrics: Mapping[str, float]) -> bool:
    """Answer every report."""
    return True


def whole_round(space: Space, task: Task, given: argparse.Namespace) -> dict[str, Any]:
    """Search for one closed trial and say what became of it."""
    strategy = Darts(search_epochs=given.search_epochs, batch_size=given.batch_size)
    costs = (Parameters(), NonZeros(), Flops())
    training = Training(given.batch_size)
    evaluate = Evaluate(task, costs=costs, training=training, device=given.device)
    _reset_peak(given.device)
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary) / "run"
        run = search(space, strategy, evaluate, out=out, trials=1, epochs=given.epochs)
        supernet, closed, *_ = run.records.values()
        tested = run.front()[0].record.test if run.front() else {}
    half = len(task.train) // 2
    rate = given.search_epochs * half / supernet.result.seconds
    return {
        "supernet": _described(supernet),
        "supernet_images_per_s": rate,
        "closed": _described(closed),
        "test": tested,
        "mixture": supernet.result.mixture,
        "peak_gib": _peak(given.device),
    }


def _described(record: Record) -> dict[str, Any]:
    result = record.result
    return {
        "picks": record.trial.picks,
        "epochs": record.trial.budget,
        "status": result.status,
        "error": result.error,
        "metrics": result.metrics,
        "seconds": result.seconds,
    }


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


if __name__ == "__main__":
    main()
