"""Checking what is asked for, before any work. This file imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from nas.costs import COSTS, Analytic, Cost
from nas.space import Space
from nas.trial import Objective, Problem

Direction = Literal["minimize", "maximize"]


def make_problem(
    space: Space,
    objectives: Sequence[str | Objective],
    limits: Mapping[str, float],
    trials: int,
    epochs: int,
    *,
    metrics: Mapping[str, Direction] | None,
    costs: Sequence[Cost],
) -> Problem:
    """Check what is asked for.

    Args:
        space: Where to search.
        objectives: Names of metrics or costs, or objectives.
        limits: Upper bounds of costs.
        trials: Closed trials.
        epochs: Budget of one.
        metrics: Directions of the metrics that training gives; None: known only when it does.
        costs: What networks cost.

    Raises:
        ValueError: In one line, naming the law and the values.
    """
    known: dict[str, Direction] = {**(metrics or {}), **{c.name: "minimize" for c in costs}}
    wanted = tuple(_objective(o, known) for o in objectives)
    if not wanted or len({o.name for o in wanted}) != len(wanted):
        raise ValueError(f"objectives: at least one, each once, got {[o.name for o in wanted]}")
    for name in (o.name for o in wanted):
        if name not in known and (metrics is not None or name in COSTS):
            raise ValueError(f"objective {name!r} is none of {sorted(known)}")
    if min(trials, epochs) < 1:
        raise ValueError(f"trials and epochs must be at least 1, got {trials} and {epochs}")
    check_limits(limits, [c.name for c in costs])
    check_smallest(space, costs, limits)
    return Problem(space, wanted, dict(limits), trials, epochs)


def _objective(wanted: str | Objective, known: Mapping[str, Direction]) -> Objective:
    if isinstance(wanted, Objective):
        return wanted
    return Objective(wanted, known.get(wanted, "minimize"))


def check_limits(limits: Mapping[str, float], costs: Iterable[str]) -> None:
    """Raise ValueError for a limit that is not positive, or not on a cost."""
    for name, limit in limits.items():
        if name not in costs:
            raise ValueError(f"limit {name}: only a cost can be limited, one of {sorted(costs)}")
        if not limit > 0:
            raise ValueError(f"limit {name}: must be positive, got {limit:g}")


def check_smallest(space: Space, costs: Iterable[Cost], limits: Mapping[str, float]) -> None:
    """Raise ValueError for a limit on an analytic cost that the smallest architecture misses."""
    for cost in costs:
        if isinstance(cost, Analytic) and cost.name in limits:
            least = cost.value(space, space.smallest())
            if least > limits[cost.name]:
                raise ValueError(
                    f"limit {cost.name}={limits[cost.name]:g} cannot be kept: "
                    f"the smallest architecture has {least:g}"
                )
