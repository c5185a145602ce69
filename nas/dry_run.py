"""What a search would take, before it is started."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from nas.evaluate import Evaluate
from nas.space import Space
from nas.trial import Trial
from nas.worker import run_trial


def dry_run(
    space: Space, evaluate: Evaluate, seed: int, trials: int, epochs: int, workers: int
) -> Iterator[str]:
    """Lines: cheap costs of the smallest and the largest architecture, one trial timed, the total.

    Raises:
        ValueError: The trial failed.
    """
    for name, picks in (("smallest", space.smallest()), ("largest", space.largest())):
        found = evaluate.analytic(space, picks)
        yield f"  {name}: " + ", ".join(f"{k} {v:,.0f}" for k, v in found.items())
    each = _timed_trial(space, evaluate, seed, epochs)
    minutes = each * trials / workers / 60
    yield f"one trial: {each:.1f} s; {trials} trials: about {minutes:.1f} min"


def _timed_trial(space: Space, evaluate: Evaluate, seed: int, epochs: int) -> float:
    picks, begun = space.sample(np.random.default_rng([seed, 0])), time.perf_counter()
    outcome = run_trial(evaluate, space, Trial(0, picks, epochs), seed, lambda step, metrics: True)
    if outcome.state is None:
        raise ValueError(f"the trial failed: {outcome.error}")
    evaluate.measure(space, picks, outcome.state)
    return time.perf_counter() - begun
