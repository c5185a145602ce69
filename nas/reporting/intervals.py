"""Means over seeds and networks with their 95 % intervals, and differences of means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and the 95 % interval it lies in.

    Attributes:
        mean: Of the values.
        low: Lower end; None where one value tells nothing of the spread.
        high: Upper end, likewise.
        n: How many values.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def sign(self) -> int:
        """-1 or 1 where the whole interval lies below or above 0, else 0: it cannot be told."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values and its t interval.

    Raises:
        ValueError: No values.
    """
    if not values:
        raise ValueError("estimate: needs at least one value, got none")
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Estimate(mean, None, None, 1)
    reach = student_t(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - reach, mean + reach, n)


def difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Mean of `a` less mean of `b`, with Welch's interval (Welch 1947, Biometrika 34).

    Degrees of freedom are rounded down, which widens the interval. `n` is that of the smaller
    sample.
    """
    mean, n = statistics.fmean(a) - statistics.fmean(b), min(len(a), len(b))
    if n == 1:
        return Estimate(mean, None, None, 1)
    u, v = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if u + v == 0:
        return Estimate(mean, mean, mean, n)
    share = u / (u + v)
    freedom = 1 / (share**2 / (len(a) - 1) + (1 - share) ** 2 / (len(b) - 1))
    reach = student_t(max(1, math.floor(freedom + 1e-9))) * math.sqrt(u + v)
    return Estimate(mean, mean - reach, mean + reach, n)


def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t that |T| stays below with this probability, by bisection.

    Raises:
        ValueError: Fewer than one degree of freedom, or a confidence not inside 0 .. 1.
    """
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(
            "student_t: needs freedom >= 1 and confidence in (0, 1), got "
            f"{freedom} and {confidence}"
        )
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle)): Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    odd, cosine = freedom % 2, math.cos(angle)
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))
