"""What a report comes to, in sentences that are computed from its numbers."""

from __future__ import annotations

from nas.reporting.intervals import Estimate
from nas.reporting.report import Report
from nas.reporting.speed import KERNEL_SHARE, Speed


def summary(report: Report) -> list[str]:
    """Sentences: the best network, its speed, its error, and what sparsity brought."""
    lines = [_best(report), *(_speed(speed) for speed in report.best.speeds)]
    lines += [_beside(report, "dense twin"), _beside(report, "dense parent"), verdict(report)]
    lines += [_baseline(report), _kernels(report), _ranking(report)]
    return [line for line in lines if line]


def verdict(report: Report) -> str:
    """Whether sparsity brought anything beyond packing, against the dense twin."""
    faster = [s for s in report.best.speeds if s.speedups["twin"].low > 1]
    better = _advantage(report, report.twin.difference) > 0
    if not faster and not better:
        return (
            "Sparsity brings nothing beyond packing here: against its dense twin the best network "
            f"is neither told to be faster nor better in {report.metric.name}; it keeps "
            f"{_share(report)} of the twin's weights"
        )
    gains = [f"speed at batch {s.batch}" for s in faster]
    gains += [report.metric.name] if better else []
    worse = _advantage(report, report.twin.difference) < 0
    price = f", at the price of a worse {report.metric.name}" if worse else ""
    return f"Beyond packing, sparsity brings {' and '.join(gains)}{price}"


def _best(report: Report) -> str:
    best, found = report.best, report.best.judged.estimate
    mean = f"{found.mean:.4g} {_interval(found)}" if found else "not known, all trainings failed"
    n = f" over {found.n} seeds" if found else ""
    return (
        f"Best by {report.search['objectives'][0]['name']}: trial {best.trial}, "
        f"{report.part} {report.metric.name} {mean}{n}, {best.judged.nonzeros} non-zeros of "
        f"{best.judged.parameters} (the dense parent has {report.parent.judged.parameters})"
    )


def _interval(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return "(one value, no interval)"
    return f"[{found.low:.4g}, {found.high:.4g}]"


def _speed(speed: Speed) -> str:
    twin, parent, unpacked = (speed.speedups[n] for n in ("twin", "parent", speed.unpacked))
    unsteady = [name for name, timed in speed.networks.items() if not timed.reliable]
    doubt = f"; unreliable, with spreads above 10 %: {', '.join(unsteady)}" if unsteady else ""
    return (
        f"Batch {speed.batch}: {speed.networks['packed'].median_ms:.4g} ms packed, "
        f"{twin.median:.2f} times as fast as its dense twin (quartiles {twin.low:.2f} to "
        f"{twin.high:.2f}), {parent.median:.2f} times the dense parent, {unpacked.median:.2f} "
        f"times torch {speed.unpacked}{doubt}"
    )


def _beside(report: Report, name: str) -> str:
    dense = report.twin if name == "dense twin" else report.parent
    found = dense.difference
    if found is None:
        return f"Against the {name}: a training failed, nothing to compare"
    sign = _advantage(report, found)
    told = {1: "better", -1: "worse", 0: "not told apart"}[sign]
    return (
        f"Against the {name}, {report.metric.name} differs by {found.mean:+.4g} "
        f"{_interval(found)}: {told}"
    )


def _advantage(report: Report, found: Estimate | None) -> int:
    """1 where the best point's metric is better for sure, -1 where worse, else 0."""
    if found is None:
        return 0
    return found.sign * (1 if report.metric.direction == "maximize" else -1)


def _share(report: Report) -> str:
    return f"{report.best.judged.nonzeros / report.best.judged.parameters:.0%}"


def _baseline(report: Report) -> str:
    found = report.baseline
    if found is None:
        return ""
    if found.difference is None:
        return f"No random network of as many non-zeros could be compared; {found.note}"
    sign = -_advantage(report, found.difference)
    told = {1: "better than", -1: "worse than", 0: "not told apart from"}[sign]
    near = "nearly as many" if found.note else "as many"
    return (
        f"Against {len(found.matches)} random networks of {near} non-zeros it is {told} their "
        f"mean (theirs differs by {found.difference.mean:+.4g} {_interval(found.difference)}), "
        f"and ahead of {found.beaten}" + (f"; {found.note}" if found.note else "")
    )


def _kernels(report: Report) -> str:
    shares = [
        f"{s.profile['share']:.0%} at batch {s.batch}" for s in report.best.speeds if s.profile
    ]
    if not shares:
        return "How much of a packed call kernels take is not known: it was not traced"
    return f"Kernels take {', '.join(shares)} of a packed call (wanted: {KERNEL_SHARE:.0%})"


def _ranking(report: Report) -> str:
    found = report.ranking
    if found is None or found.tau.tau is None:
        return ""
    return (
        f"The supernet ranks {found.tau.n} trained networks with Kendall's tau {found.tau.tau:.2f}"
    )
