"""A report as Markdown that a terminal shows as well as a browser, and its summary."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from nas.reporting.accuracy import Judged
from nas.reporting.agreement import Prediction, Ranking, Tau
from nas.reporting.baseline import TOLERANCE, Baseline
from nas.reporting.intervals import Estimate
from nas.reporting.report import Report, Row
from nas.reporting.sparseland import answers
from nas.reporting.speed import KERNEL_SHARE, Ratio, Speed, Timed
from nas.reporting.summary import summary

NONE = "-"


NAMES = {
    "packed": "packed",
    "twin": "dense twin, packed",
    "parent": "dense parent, packed",
    "eager": "unpacked, torch eager",
    "compiled": "unpacked, torch.compile",
}
WIDTH = 98


def markdown(report: Report, pictures: Mapping[str, str] | None = None) -> str:
    """The whole report.

    Args:
        report: What it says.
        pictures: What the files beside it show, by name.
    """
    parts = [
        f"# Report of {report.run}",
        "\n".join(_wrapped(f"- {line}", "  ") for line in summary(report)),
        _setting(report),
        _accuracy(report),
        *(_speed(report, i) for i in range(len(report.plan.batches))),
        _baseline(report),
        _ranking(report.ranking),
        _predictions(report.predictions),
        _sparseland(report),
        *(f"![{what}]({name})" for name, what in (pictures or {}).items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _section(title: str, *parts: str) -> str:
    """A heading, and tables and paragraphs below it; what is empty is left out."""
    wrapped = [part if part.startswith("|") else _wrapped(part) for part in parts if part]
    return "\n\n".join([f"## {title}", *wrapped])


def _setting(report: Report) -> str:
    search, made = report.search, report.made
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return _section(
        "Setting",
        f"Search: {search['strategy']['name']}, seed {search['strategy']['seed']}, "
        f"{search['trials']} trials of {search['epochs']} epochs, in a space of "
        f"{search['size']} architectures ({search['space']['fingerprint']}); on "
        f"{search['made']['device']}, git {search['made']['git']}.",
        f"Report: on {made['device']}, kernels for {made['isa']}, speed with one thread; "
        f"{versions}; git {made['git']}.",
    )


def _accuracy(report: Report) -> str:
    name = f"{report.part} {report.metric.name}, 95 % interval"
    name += f" ({report.metric.unit})" if report.metric.unit else ""
    head = ("network", "non-zeros", name, "n", "the search's own")
    points = [(*_judged(f"trial {r.trial}", r.judged), _own(r)) for r in report.points]
    twin = _judged(f"dense twin of {report.best.trial}", report.twin.judged)
    parent = _judged("dense parent", report.parent.judged)
    wilson = ", with its binomial (Wilson) interval" if report.examples else ""
    return _section(
        "Accuracy",
        table(head, [*points, (*twin, NONE), (*parent, NONE)]),
        "Means over n trainings from different seeds, with t intervals; beside them the network "
        f"that the search left, by itself{wilson}.",
        *(f"Trial {row.trial}: {note}." for row in report.points for note in row.notes),
        *_failures(report),
    )


def _judged(name: str, judged: Judged) -> tuple[str, str, str, str]:
    sizes, found = f"{judged.nonzeros} of {judged.parameters}", judged.estimate
    return name, sizes, "failed" if found is None else _said(found), f"{found.n if found else 0}"


def _own(row: Row) -> str:
    held = row.own.binomial
    return f"{row.own.values[0]:.4g}" + (f" {interval(*held[0])}" if held else "")


def _said(found: Estimate) -> str:
    return f"{found.mean:.4g} {interval(found.low, found.high)}"


def interval(low: float | None, high: float | None) -> str:
    """Both ends, or a dash where there are none."""
    return NONE if low is None or high is None else f"[{low:.4g}, {high:.4g}]"


def _failures(report: Report) -> list[str]:
    named = {f"trial {row.trial}": row.judged for row in report.points}
    named |= {"dense twin": report.twin.judged, "dense parent": report.parent.judged}
    return [
        f"Training failed: {name}, seed {seed}: {why}."
        for name, judged in named.items()
        for seed, why in judged.failures.items()
    ]


def _speed(report: Report, index: int) -> str:
    head = ("trial", "network", "ms (quartiles apart)", "packed is faster by")
    rows = [line for row in report.points for line in _speed_rows(row.trial, row.speeds[index])]
    return _section(
        f"Speed at batch {report.plan.batches[index]}",
        table(head, rows),
        "Milliseconds of a call, and times as fast, medians over rounds in which all networks of "
        "a trial took turns, on one thread; `!` marks a spread above 10 %. Twin and parent are "
        "packed too, no zero left out. What is unpacked runs torch's dense kernels on the masked "
        "weights; that is no sparse speed. The share is what kernels, not calls of them, take of "
        f"a packed call; {KERNEL_SHARE:.0%} are wanted.",
        *(
            f"Trial {row.trial}: no {name}: {why}."
            for row in report.points
            for name, why in row.speeds[index].left_out.items()
        ),
    )


def _speed_rows(trial: int, speed: Speed) -> list[tuple[str, str, str, str]]:
    share = f"({speed.profile['share']:.0%} in kernels)" if speed.profile else NONE
    faster = {"packed": share} | {name: _ratio(r) for name, r in speed.speedups.items()}
    return [
        (f"{trial}" if name == "packed" else "", NAMES[name], _time(timed), faster[name])
        for name, timed in speed.networks.items()
    ]


def _time(timed: Timed) -> str:
    return f"{timed.median_ms:.4g} ({timed.iqr_ms:.2g})" + ("" if timed.reliable else " !")


def _ratio(found: Ratio) -> str:
    return f"{found.median:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _baseline(report: Report) -> str:
    found = report.baseline
    if found is None:
        return _section("Random networks", "Not asked for.")
    head = ("network", "non-zeros", f"{report.metric.name}, 95 % interval", "n", "off", "how")
    rows = [(*_judged(f"trial {report.best.trial}", found.point), NONE, "searched")]
    for i, (match, judged) in enumerate(zip(found.matches, found.judged, strict=True)):
        how = "moved" if match.moved else "drawn"
        rows.append((*_judged(f"random {i}", judged), f"{match.off:.1%}", how))
    return _section("Random networks", table(head, rows), *_about(found))


def _about(found: Baseline) -> Iterator[str]:
    yield (
        f"Networks of the same space with the same non-zeros (within {TOLERANCE:.0%}; off is by "
        "how much they differ), trained as long and from the same seeds (2403.08265). Drawn: "
        "uniformly, and kept if near enough; moved: drawn, and brought nearer by single decisions."
    )
    if found.estimate and found.difference:
        yield (
            f"Mean over the networks: {_said(found.estimate)}; less the point's: "
            f"{_said(found.difference)}."
        )
    yield found.note and f"{found.note[0].upper()}{found.note[1:]}."


def _ranking(found: Ranking | None) -> str:
    if found is None:
        return ""
    head = ("trial", "with the supernet's weights", "trained")
    pairs = zip(found.trials, found.pairs, strict=True)
    rows = [(f"{trial}", f"{a:.4g}", f"{b:.4g}") for trial, (a, b) in pairs]
    text = f"Validation {found.metric}; the supernet is trial {found.supernet}. {_tau(found.tau)}."
    return _section("Ranking by the supernet", table(head, rows), text)


def _tau(found: Tau) -> str:
    if found.tau is None:
        return f"Kendall's tau is not defined (n = {found.n})"
    return f"Kendall's tau {found.tau:.2f} {interval(found.low, found.high)}, n = {found.n}"


def _predictions(found: Sequence[Prediction]) -> str:
    if not found:
        return _section("Predicted and measured", "The search measured no latency.")
    head = ("cost", "agreement with latency_ms", "error of a line")
    rows = [(p.cost, _tau(p.tau), NONE if p.error is None else f"{p.error:.0%}") for p in found]
    return _section(
        "Predicted and measured",
        table(head, rows),
        "Over all measured trials. Intervals by bootstrap over trials; the line's error is the "
        "median relative error of predicting each trial from all others.",
    )


def _sparseland(report: Report) -> str:
    return _section(
        "What is reported and what is not",
        "What a sparse result should tell apart (after Liu and Wang 2023, 2302.02596).",
        table(("distinction", "this report"), answers(report)),
    )
