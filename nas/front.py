"""Feasibility, non-domination and crowding: which results are the best of several objectives.

Feasible first (Deb 2000), then non-dominated sorting and crowding distance (Deb et al. 2002,
NSGA-II). Everything is minimised. This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Losses = Sequence[float]


def dominates(a: Losses, b: Losses) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    pairs = list(zip(a, b, strict=True))
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def fronts(losses: Sequence[Losses]) -> list[list[int]]:
    """Indices by front: the non-dominated ones, then those once they are gone, and so on."""
    left, found = list(range(len(losses))), []
    while left:
        best = [i for i in left if not any(dominates(losses[j], losses[i]) for j in left)]
        found.append(best)
        left = [i for i in left if i not in best]
    return found


def crowding(losses: Sequence[Losses]) -> list[float]:
    """How far each point's neighbours lie, summed over objectives; infinite at the ends."""
    values = np.asarray(losses, dtype=float)
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]] or 1.0
        distance[order[[0, -1]]] = np.inf
        distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance.tolist()


def ranking(losses: Sequence[Losses], violations: Sequence[Mapping[str, float]]) -> list[int]:
    """Indices from best to worst: feasible, then by front and crowding; else least violation.

    Violations are compared by their sum, each relative to its limit as the loop records it.
    """
    feasible = [i for i in range(len(losses)) if not violations[i]]
    order: list[int] = []
    for front in fronts([losses[i] for i in feasible]):
        members = [feasible[i] for i in front]
        spread = crowding([losses[i] for i in members])
        order += [m for _, m in sorted(zip(spread, members, strict=True), key=lambda p: -p[0])]
    broken = [i for i in range(len(losses)) if violations[i]]
    return order + sorted(broken, key=lambda i: sum(violations[i].values()))


def pareto(losses: Sequence[Losses], violations: Sequence[Mapping[str, float]]) -> list[int]:
    """Indices of the feasible non-dominated points; of equal ones the first."""
    feasible = [i for i in range(len(losses)) if not violations[i]]
    first: dict[tuple[float, ...], int] = {}
    for i in feasible:
        first.setdefault(tuple(losses[i]), i)
    best = [i for i in first.values() if not any(dominates(p, losses[i]) for p in first)]
    return sorted(best, key=lambda i: tuple(losses[i]))


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation tau-b of two series of equal length; NaN where one is constant."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    dx, dy = np.sign(x[:, None] - x[None]), np.sign(y[:, None] - y[None])
    pairs = np.sqrt((dx**2).sum() * (dy**2).sum())
    return float((dx * dy).sum() / pairs) if pairs else float("nan")
