"""What every strategy must keep, as functions of (strategy, problem)."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from nas.costs import NonZeros
from nas.trial import Problem, Result, Strategy, Trial

Asked = list[tuple[Trial, Result]]


def result_of(problem: Problem, trial: Trial) -> Result:
    """A result that depends on the trial's picks alone; open trials give mixture weights."""
    space, open_names = problem.space, problem.space.open(trial.picks)
    if open_names:
        rng = np.random.default_rng([17, trial.number])
        sizes = {n: len(space.choices[n].open_labels) for n in open_names}
        mixture = {n: rng.dirichlet(np.ones(k)).tolist() for n, k in sizes.items()}
        return Result("ok", {"error": 0.5}, mixture=mixture, seconds=1.0)
    nonzeros = NonZeros().value(space, trial.picks)
    error = float(1 / np.log(nonzeros) + int(space.architecture(trial.picks).id[:4], 16) * 1e-6)
    limit = problem.limits.get("nonzeros")
    broken = {"nonzeros": nonzeros / limit - 1} if limit and nonzeros > limit else {}
    status: Any = "refused" if broken else "ok"
    return Result(status, {"error": error, "nonzeros": nonzeros}, broken, seconds=1.0)


def drive(
    strategy: Strategy,
    problem: Problem,
    in_flight: int = 1,
    judge: Callable[[Problem, Trial], Result] = result_of,
    most: int = 400,
) -> Asked:
    """Ask and tell until the strategy ends or the closed trials are used up; youngest first."""
    strategy.start(problem)
    out: deque[Trial] = deque()
    done: Asked = []
    while len(done) < most:
        while len(out) < in_flight and (_used(problem, done, out) or strategy.ends_itself):
            trial = strategy.ask()
            if trial is None:
                break
            out.append(trial)
        if not out:
            return done
        trial = out.pop()
        result = judge(problem, trial)
        for step in range(1, trial.budget + 1) if result.status == "ok" else ():
            if not strategy.report(trial, step, result.metrics):
                result = Result("stopped", result.metrics)
                break
        strategy.tell(trial, result)
        done.append((trial, result))
    raise AssertionError(f"{strategy}: has not ended after {most} trials")


def _used(problem: Problem, done: Asked, out: deque[Trial]) -> bool:
    closed = [t for t, r in done if r.status != "refused" and not problem.space.open(t.picks)]
    return len(closed) + len(out) < problem.trials


def described(asked: Asked) -> list[str]:
    """Trials as text, in order."""
    return [json.dumps(trial.to_json()) for trial, _ in asked]
