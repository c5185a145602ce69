"""How what was predicted agrees with what was found: rankings and lines."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nas.costs import Flops, NonZeros
from nas.front import kendall_tau
from nas.run import Run

JUDGED = re.compile(r"supernet_(?P<metric>.+)/(?P<n>\d+)")
FEWEST = 4  # pairs that a line and an interval are worth
RESAMPLES = 1000


@dataclass(frozen=True)
class Tau:
    """Kendall's tau-b of some pairs.

    Attributes:
        tau: None where it is not defined: fewer than two pairs, or one side constant.
        low: Lower end of the 95 % bootstrap interval; None with fewer than four pairs.
        high: Upper end, likewise.
        n: How many pairs.
    """

    tau: float | None
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Ranking:
    """How a supernet ranks the networks that were also trained by themselves.

    Attributes:
        supernet: The open trial that judged networks by inherited weights.
        metric: What it judged by.
        trials: The trained networks.
        pairs: Of each, the validation metric with inherited weights and once trained.
        tau: Of the pairs.
    """

    supernet: int
    metric: str
    trials: list[int]
    pairs: list[tuple[float, float]]
    tau: Tau


@dataclass(frozen=True)
class Prediction:
    """How well an analytic cost tells the measured latency.

    Attributes:
        cost: `flops` or `nonzeros`.
        tau: With the latency, over the trials.
        error: Median relative error of a least-squares line, each trial predicted from the
            others; None with fewer than four.
    """

    cost: str
    tau: Tau
    error: float | None


def supernet_ranking(run: Run) -> Ranking | None:
    """From the last open trial that logged `supernet_<metric>/<n>` of trained trials n.

    Returns:
        None where no trial did.
    """
    trained = {record.trial.number: record.result.metrics for record in run.usable()}
    for number, record in sorted(run.records.items(), reverse=True):
        said = [match for name in record.result.metrics if (match := JUDGED.fullmatch(name))]
        pairs = {
            int(match["n"]): (record.result.metrics[match[0]], found[match["metric"]])
            for match in said
            if match["metric"] in (found := trained.get(int(match["n"]), {}))
        }
        if pairs:
            tau = rank_agreement(*zip(*pairs.values(), strict=True))
            return Ranking(number, said[0]["metric"], list(pairs), list(pairs.values()), tau)
    return None


def latency_predictions(run: Run) -> list[Prediction]:
    """FLOPs and non-zeros against the measured latency of all trials that were measured."""
    records = [
        r for r in run.usable() if "latency_ms" in r.result.metrics and r.result.same_as is None
    ]
    if not records:
        return []
    measured = [r.result.metrics["latency_ms"] for r in records]
    picks, found = [r.trial.picks for r in records], []
    for cost in (Flops(), NonZeros()):
        values = [cost.value(run.problem.space, p) for p in picks]
        tau = rank_agreement(values, measured)
        found.append(Prediction(cost.name, tau, line_error(values, measured)))
    return found


def rank_agreement(a: Sequence[float], b: Sequence[float]) -> Tau:
    """Kendall's tau-b of two series, with a percentile bootstrap over pairs (fixed seed)."""
    x, y, n = np.asarray(a, float), np.asarray(b, float), len(a)
    tau = kendall_tau(a, b)
    if n < FEWEST or math.isnan(tau):
        return Tau(None if math.isnan(tau) else tau, None, None, n)
    rng = np.random.default_rng(0)
    drawn = [rng.integers(n, size=n) for _ in range(RESAMPLES)]
    taus = [kendall_tau(x[i].tolist(), y[i].tolist()) for i in drawn]
    low, high = np.nanquantile(taus, [0.025, 0.975]).tolist()
    return Tau(tau, low, high, n)


def line_error(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Median of |prediction / y - 1|, each y predicted by the line through all others."""
    if len(x) < FEWEST:
        return None
    rows, values = np.stack([np.ones(len(x)), np.asarray(x, float)], 1), np.asarray(y, float)
    rows[:, 1] /= np.abs(rows[:, 1]).max() or 1.0  # so that both columns weigh alike
    predicted = [
        rows[i] @ _line(np.delete(rows, i, 0), np.delete(values, i)) for i in range(len(x))
    ]
    return float(np.median(np.abs(np.asarray(predicted) / values - 1)))


def _line(rows: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.floating]:
    return np.linalg.lstsq(rows, values, rcond=None)[0]
