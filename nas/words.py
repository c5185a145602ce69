"""Names and values of metrics and costs as people read them, with their units."""

from __future__ import annotations

from nas.run import Run

SUFFIXES = {"B": "_bytes"}


def plain(run: Run, name: str) -> str:
    """A name without its unit: `latency` for `latency_ms`."""
    unit = run.evaluate.unit(name)
    return name.removesuffix(SUFFIXES.get(unit, f"_{unit}")).replace("_", " ")


def titled(run: Run, name: str) -> str:
    """A name and its unit: `latency (ms)`."""
    unit = run.evaluate.unit(name)
    return f"{plain(run, name)} ({unit})" if unit else plain(run, name)


def written(run: Run, name: str, value: float) -> str:
    """A name, a value and its unit: `latency 0.125 ms`."""
    return f"{plain(run, name)} {number(value)} {run.evaluate.unit(name)}".strip()


def number(value: float) -> str:
    """Four significant digits; whole numbers whole: `0.03125`, `1802`, `123456`."""
    return f"{value:.0f}" if value == int(value) or abs(value) >= 1e4 else f"{value:.4g}"
