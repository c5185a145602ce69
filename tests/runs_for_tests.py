"""Runs to look at: a real one that takes a second, and ones whose results are made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nas.callbacks import Callback
from nas.costs import Latency, NonZeros, Parameters
from nas.evaluate import Evaluate
from nas.latency import using_threads
from nas.loop import search
from nas.run import Record, Run
from nas.space import GraphSpace
from nas.store import Store
from nas.tasks import Metric, digits
from nas.trial import Objective, Problem, Result, Trial
from search_spaces.mlp import mlp
from strategies.random_search import RandomSearch


def small_space() -> GraphSpace:
    return mlp((1, 8, 8), 10, depths=(1, 2, 3), widths=(16, 32))


def small_run(
    out: Path, trials: int = 3, callbacks: Sequence[Callback] = (), **options: Any
) -> Run:
    """Random search of small MLPs on digits, one epoch each, of error and non-zeros."""
    evaluate = Evaluate(digits(), costs=(Parameters(), NonZeros()))
    asked = {"objectives": ("error", "nonzeros"), "epochs": 1, **options}
    given = {"out": out, "trials": trials, "callbacks": callbacks, **asked}
    with using_threads(1):
        return search(small_space(), RandomSearch(), evaluate, **given)


def made_up_run(
    out: Path,
    results: Sequence[Mapping[str, float] | Result],
    objectives: Sequence[str] = ("error", "latency_ms"),
    limits: Mapping[str, float] | None = None,
) -> Run:
    """A run of trials with these metrics or results; limits are judged as the loop does."""
    metrics = (Metric("error"), Metric("accuracy", direction="maximize"))
    evaluate = Evaluate(
        train=lambda module, epochs: None,
        validate=lambda module: 0.0,
        costs=(Parameters(), Latency()),
        metrics=metrics,
    )
    directions = evaluate.directions or {}
    wanted = tuple(Objective(name, directions.get(name, "minimize")) for name in objectives)
    space, limits = small_space(), dict(limits or {})
    store = Store(out)
    store.close()
    run = Run(store, Problem(space, wanted, limits, len(results), 1), evaluate)
    for number, result in enumerate(results):
        picks = space.sample(np.random.default_rng(number))
        run.records[number] = Record(Trial(number, picks, 1), _judged(result, limits))
    return run


def _judged(result: Mapping[str, float] | Result, limits: Mapping[str, float]) -> Result:
    if isinstance(result, Result):
        return result
    over = {n: result[n] / most - 1 for n, most in limits.items() if result[n] > most}
    return Result("ok", dict(result), over)
