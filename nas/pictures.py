"""Pictures of a run: its front, learned mixtures, rankings, architectures.

Each function returns a `matplotlib.figure.Figure` that no window and no global state holds.
matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from nas.drawing import architecture_picture
from nas.front import kendall_tau
from nas.run import Point, Record, Run
from nas.space import Space
from nas.trial import Objective
from nas.words import titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["architecture_picture", "front_picture", "mixture_picture", "ranking_picture"]

# Okabe and Ito's colours, which people with any colour vision can tell apart.
GREY, BLUE, ORANGE, GREEN, VERMILION = "#8c8c8c", "#0072B2", "#E69F00", "#009E73", "#D55E00"
TRIAL = ""  # as a name: the trial's number


def front_picture(run: Run, references: Mapping[str, Mapping[str, float]] | None = None) -> Figure:
    """Draw every closed trial and the front: the first objective against each of the others.

    A run of one objective is drawn over the trials, with the best so far. Where a measured cost
    has the latency of a dense twin, a thin line leads to it from each network of the front.

    Args:
        run: What was found; without a trial only the axes are drawn.
        references: Metrics of networks to compare with, such as the dense parent, by title.
    """
    first, *others = (o.name for o in run.problem.objectives)
    figure = _figure(len(others) or 1)
    panels = figure.subplots(1, len(others) or 1, squeeze=False)[0]
    for axes, x in zip(panels, others or [TRIAL], strict=True):
        _draw_plane(axes, run, x, first, references or {})
    figure.suptitle(_counts(run), fontsize=10, color="#444444")
    return figure


def ranking_picture(
    pairs: Sequence[tuple[float, float]],
    x: str = "error in the supernet",
    y: str = "error when trained",
) -> Figure:
    """Draw what a cheap estimate says against what was found, with Kendall's tau.

    Args:
        pairs: (estimated, found).
        x: What was estimated.
        y: What was found.
    """
    figure = _figure(1)
    axes = figure.subplots()
    estimated, found = [a for a, _ in pairs], [b for _, b in pairs]
    axes.scatter(estimated, found, color=BLUE, s=28, alpha=0.8, linewidths=0)
    tau = kendall_tau(estimated, found)
    axes.set_title(f"Kendall tau {tau:.2f}, n = {len(pairs)}", fontsize=10)
    axes.set(xlabel=x, ylabel=y)
    _quiet(axes)
    return figure


def mixture_picture(space: Space, mixture: Mapping[str, Sequence[float]]) -> Figure:
    """Draw learned mixture weights: a row a choice, a column an option, the largest framed.

    Args:
        space: Has the choices.
        mixture: Weights by choice, as in a result.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in mixture:
        groups.setdefault(space.choices[name].open_labels, []).append(name)
    rows = [len(names) + 1.6 for names in groups.values()]
    columns = max(map(len, groups))
    figure = _figure(1, (2.4 + 1.0 * columns, 0.32 * sum(rows) + 0.4))
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axes, (labels, names) in zip(panels, groups.items(), strict=True):
        _draw_mixture(axes, labels, {name: mixture[name] for name in names}, columns)
    return figure


# The front


def _draw_plane(
    axes: Axes, run: Run, x: str, y: str, references: Mapping[str, Mapping[str, float]]
) -> None:
    usable = sorted(run.usable(), key=lambda r: r.trial.number)
    fine = [r for r in usable if not r.result.violations]
    broken = [r for r in usable if r.result.violations]
    _scatter(axes, fine, x, y, "trial", c=GREY, alpha=0.45, s=22, linewidths=0)
    _scatter(axes, broken, x, y, "over a limit", c=VERMILION, marker="x", s=26, linewidths=1.2)
    front = [] if x == TRIAL else _along(run, x)
    if front:
        _draw_front(axes, run, front, x, y)
    elif fine:
        _draw_best(axes, run, fine, y)
    _draw_references(axes, references, x, y)
    _draw_limits(axes, run, x, y)
    _label(axes, run, x, y)
    _name(axes, front, x, y)


def _along(run: Run, x: str) -> list[Point]:
    return sorted(run.front(), key=lambda p: _objective(run, x).loss(p.metrics))


def _value(record: Record, name: str) -> float:
    return record.trial.number if name == TRIAL else record.result.metrics[name]


def _scatter(
    axes: Axes, records: Sequence[Record], x: str, y: str, title: str, **style: Any
) -> None:
    if records:
        points = [(_value(r, x), _value(r, y)) for r in records]
        axes.scatter(*zip(*points, strict=True), label=f"{title} ({len(points)})", **style)


def _draw_best(axes: Axes, run: Run, records: Sequence[Record], y: str) -> None:
    objective = _objective(run, y)
    better = min if objective.direction == "minimize" else max
    best = list(accumulate((_value(r, y) for r in records), better))
    numbers = [r.trial.number for r in records]
    axes.step(numbers, best, where="post", color=BLUE, lw=1.6, label="best so far")


def _draw_front(axes: Axes, run: Run, front: Sequence[Point], x: str, y: str) -> None:
    """A step line where the plane has all objectives; else the front's points alone."""
    xs, ys = [p.metrics[x] for p in front], [p.metrics[y] for p in front]
    style: Any = {"color": BLUE, "marker": "o", "ms": 5, "lw": 1.6, "zorder": 3}
    whole = len(run.problem.objectives) == 2
    style |= {"ls": "-", "drawstyle": "steps-post"} if whole else {"ls": ""}
    axes.plot(xs, ys, label=f"front ({len(front)})", **style)
    _draw_twins(axes, front, x, y)


def _name(axes: Axes, front: Sequence[Point], x: str, y: str) -> None:
    """Write the trial's number at each point of the front that leaves room for it."""
    style: Any = {"fontsize": 7, "color": BLUE, "textcoords": "offset points"}
    written: list[tuple[float, float]] = []
    for point in front:
        here = (point.metrics[x], point.metrics[y])
        a, b = axes.transData.transform(here)
        if all(abs(a - c) > 36 or abs(b - d) > 24 for c, d in written):
            axes.annotate(str(point.number), here, (4, 4), **style)
            written.append((a, b))


def _draw_twins(axes: Axes, front: Sequence[Point], x: str, y: str) -> None:
    pairs = [(p, twin) for p in front if (twin := _twin(p, x)) is not None]
    for point, twin in pairs:
        height = point.metrics[y]
        axes.plot([point.metrics[x], twin], [height] * 2, color=GREEN, lw=0.7, alpha=0.6, zorder=1)
    if pairs:
        style: Any = {"facecolors": "white", "edgecolors": GREEN, "s": 24, "linewidths": 1.0}
        twins, heights = [twin for _, twin in pairs], [p.metrics[y] for p, _ in pairs]
        axes.scatter(twins, heights, label="time of its dense twin", zorder=2, **style)


def _twin(point: Point, cost: str) -> float | None:
    return point.record.result.details.get(cost, {}).get("twin_median_ms")


def _draw_references(
    axes: Axes, references: Mapping[str, Mapping[str, float]], x: str, y: str
) -> None:
    for marker, (title, metrics) in zip("Ds^P*", references.items(), strict=False):
        if x == TRIAL:
            axes.axhline(metrics[y], color=ORANGE, lw=1.0, ls=":", label=title)
        else:
            axes.scatter(metrics[x], metrics[y], c=ORANGE, marker=marker, s=42, label=title)


def _draw_limits(axes: Axes, run: Run, x: str, y: str) -> None:
    limits = run.problem.limits
    style: Any = {"color": "#222222", "ls": "--", "lw": 1.0}
    for name, draw in ((x, axes.axvline), (y, axes.axhline)):
        if name in limits:
            draw(limits[name], label=f"limit {limits[name]:g}", **style)


def _label(axes: Axes, run: Run, x: str, y: str) -> None:
    """Titles with units, and a scale of powers for what spans more than a factor of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    shown = run.usable()
    for name, axis, rescale in (
        (x, axes.xaxis, axes.set_xscale),
        (y, axes.yaxis, axes.set_yscale),
    ):
        values = [_value(r, name) for r in shown]
        axis.set_label_text("trial" if name == TRIAL else titled(run, name))
        if name != TRIAL and values and min(values) > 0 and max(values) > 10 * min(values):
            rescale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(_short)
    _quiet(axes)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, frameon=False)


def _short(value: float, _: float = 0.0) -> str:
    """A number on an axis: `0.05`, `2000`, `150k`, `3M`."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(factor, 1e4):
            return f"{value / factor:g}{letter}"
    return f"{value:g}"


def _objective(run: Run, name: str) -> Objective:
    return next(o for o in run.problem.objectives if o.name == name)


def _counts(run: Run) -> str:
    """How many trials, and the limits on costs that are no axis."""
    status = Counter(r.result.status for r in run.records.values())
    shown = {o.name for o in run.problem.objectives}
    parts = [f"{run.counted()} trials"]
    parts += [f"{status[s]} {s}" for s in ("failed", "refused") if status[s]]
    hidden = {n: limit for n, limit in run.problem.limits.items() if n not in shown}
    parts += [f"{titled(run, n)} at most {limit:g}" for n, limit in hidden.items()]
    return ", ".join(parts)


# Mixtures


def _draw_mixture(
    axes: Axes, labels: Sequence[Any], rows: Mapping[str, Sequence[float]], columns: int
) -> None:
    from matplotlib.patches import Rectangle

    top = max(max(weights) for weights in rows.values())
    for i, weights in enumerate(rows.values()):
        largest = max(range(len(weights)), key=weights.__getitem__)
        for j, weight in enumerate(weights):
            share = max(weight, 0.0) / top if top > 0 else 0.0
            color = tuple(1 - share * (1 - c) for c in (0.34, 0.63, 0.83))
            edge = (
                {"edgecolor": "#222222", "lw": 1.2, "zorder": 2} if j == largest else {"zorder": 1}
            )
            axes.add_patch(Rectangle((j, i), 0.96, 0.9, facecolor=color, **edge))
            axes.text(
                j + 0.48, i + 0.45, f"{weight:.2f}", fontsize=7, ha="center", va="center", zorder=3
            )
    axes.set(xlim=(0, columns), ylim=(len(rows), 0))
    axes.set_xticks([j + 0.48 for j in range(len(labels))], [str(x) for x in labels], fontsize=8)
    axes.set_yticks([i + 0.45 for i in range(len(rows))], list(rows), fontsize=8)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)


# Figures


def _figure(panels: int, size: tuple[float, float] | None = None) -> Figure:
    from matplotlib.figure import Figure

    return Figure(size or (6.4 * panels, 4.6), dpi=120, facecolor="white", layout="constrained")


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", lw=0.7)
    axes.set_axisbelow(True)
