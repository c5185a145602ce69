"""A search in TensorBoard: `tensorboard --logdir RUN/tensorboard`.

`search` holds what belongs to the search as a whole, over the trials told so far; each trial that
was trained has a run of its own, `trials/0007`, over its epochs. TensorBoard is imported when a
search begins, matplotlib when the first picture is drawn.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nas import hparams
from nas.callbacks import Callback
from nas.run import Point, Record, Run
from nas.space import Space
from nas.tally import Tally
from nas.trial import Result, Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

MOST_DRAWN = 6
UNDECIDED = ("failed", "refused")


class TensorBoard(Callback):
    """Writes scalars, hyperparameters, pictures and text as a search goes on.

    A resumed search goes on behind what lies there; trials that an earlier one left unwritten, or
    may have left torn, are written again from the log.

    Args:
        folder: Where to; `tensorboard` in the run's folder by default.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = folder

    def start(self, run: Run) -> None:
        """See `Callback.start`."""
        self._place = Path(self.folder or run.folder / "tensorboard")
        self._space, self._trials = run.problem.space, dict[int, _TrialWriter]()
        records = list(run.records.values())
        whole = self._whole(records)
        self._search = _SearchWriter(run, _writer(self._place / "search", whole or None))
        self._search.describe(whole)
        for step, record in enumerate(records):
            self._search.tally.take(record)
            if step >= whole:
                self._write_again(run, record, step)
        if records:
            self._search.draw(len(records) - 1)

    def reported(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> None:
        """See `Callback.reported`."""
        self._trial(trial).report(step, metrics)

    def told(self, run: Run, trial: Trial, result: Result) -> None:
        """See `Callback.told`."""
        step = len(run.records) - 1
        self._search.tally.take(run.records[trial.number])
        self._write(trial, result, step)
        self._search.draw(step)

    def end(self, run: Run) -> None:
        """See `Callback.end`."""
        self._search.end()

    def _write(self, trial: Trial, result: Result, step: int) -> None:
        if result.status != "refused":
            self._trial(trial).end(result)
            del self._trials[trial.number]
        self._search.write(result, step)

    def _trial(self, trial: Trial) -> _TrialWriter:
        """The trial's writer; a new one begins with an empty folder."""
        if trial.number not in self._trials:
            folder = self._folder(trial)
            shutil.rmtree(folder, ignore_errors=True)
            self._trials[trial.number] = _TrialWriter(self._space, trial, _writer(folder))
        return self._trials[trial.number]

    def _folder(self, trial: Trial) -> Path:
        return self._place / "trials" / f"{trial.number:04d}"

    def _whole(self, records: Sequence[Record]) -> int:
        """How many records an earlier search has surely written whole: not the last."""
        for i, record in enumerate(records[:-1]):
            if record.result.status != "refused" and not self._folder(record.trial).exists():
                return i
        return max(0, len(records) - 1)

    def _write_again(self, run: Run, record: Record, step: int) -> None:
        for at, metrics in _reports(run, record.trial.number):
            self.reported(record.trial, at, metrics)
        self._write(record.trial, record.result, step)


class _TrialWriter:
    """Writes one trial's reports, and its hyperparameters beside what became of it."""

    def __init__(self, space: Space, trial: Trial, writer: SummaryWriter) -> None:
        self.space, self.trial, self.writer = space, trial, writer
        self.last: dict[str, float] = {}

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        _add_scalars(self.writer, metrics, step)
        self.last = dict(metrics)

    def end(self, result: Result) -> None:
        new = {n: v for n, v in result.metrics.items() if v != self.last.get(n)}
        _add_scalars(self.writer, new, self.trial.budget)
        _add_summary(self.writer, hparams.session_start(self.space, self.trial, result))
        _add_summary(self.writer, hparams.session_end(result))
        if result.error:
            self.writer.add_text("error", result.error)
        self.writer.close()


class _SearchWriter:
    """Writes what belongs to the search as a whole; steps count the trials told."""

    def __init__(self, run: Run, writer: SummaryWriter) -> None:
        self.run, self.writer = run, writer
        self.tally = Tally(run)
        self.front: list[int] = []

    def describe(self, step: int) -> None:
        problem, evaluate = self.run.problem, self.run.evaluate
        self.writer.add_text("run", described(self.run.store.read("run.json")), step)
        known: list[Any] = [*problem.objectives, *evaluate.metrics, *evaluate.costs]
        names = list(dict.fromkeys(m.name for m in known))
        _add_summary(self.writer, hparams.experiment(problem.space, names))

    def write(self, result: Result, step: int) -> None:
        _add_scalars(self.writer, {f"best/{name}": v for name, v in self.tally.best.items()}, step)
        counts = {f"trials/{status}": float(self.tally.status[status]) for status in UNDECIDED}
        _add_scalars(self.writer, counts, step)
        if result.mixture:
            self._write_mixture(result.mixture, step)

    def _write_mixture(self, mixture: Mapping[str, Sequence[float]], step: int) -> None:
        from nas.pictures import mixture_picture

        entropies = {name: entropy(weights) for name, weights in mixture.items()}
        _add_scalars(self.writer, {f"entropy/{n}": v for n, v in entropies.items()}, step)
        _add_scalars(self.writer, {"entropy/mean": float(np.mean([*entropies.values()]))}, step)
        for name, weights in mixture.items():
            self.writer.add_histogram(f"mixture/{name}", np.asarray(weights), step)
        _add_picture(
            self.writer, "mixture", mixture_picture(self.run.problem.space, mixture), step
        )

    def draw(self, step: int) -> None:
        """Draw the front if it has changed, and its first network if that has."""
        from nas.pictures import front_picture

        front, before = self.run.front(), self.front
        self.front = [point.number for point in front]
        if self.front != before:
            _add_picture(self.writer, "front", front_picture(self.run), step)
        if self.front[:1] != before[:1]:
            self._draw_network("best_architecture", front[0], step)
        self.writer.flush()

    def _draw_network(self, tag: str, point: Point, step: int) -> None:
        from nas.pictures import architecture_picture

        space, details = self.run.problem.space, point.record.result.details
        _add_picture(self.writer, tag, architecture_picture(space, point.picks, details), step)

    def end(self) -> None:
        """Draw the networks of the front, and write them down with their test metrics."""
        front, step = self.run.front(), len(self.run.records)
        for point in front[:MOST_DRAWN]:
            self._draw_network(f"front_architectures/trial_{point.number:04d}", point, step)
        self.writer.add_text("front", front_table(front), step)
        self.writer.close()


def entropy(weights: Sequence[float]) -> float:
    """Entropy in nats of weights, taken as shares of their sum."""
    shares = np.clip(np.asarray(weights, dtype=float), 0, None)
    shares = shares[shares > 0] / max(shares.sum(), 1e-12)
    return float(-(shares * np.log(shares)).sum())


def described(run: Mapping[str, Any]) -> str:
    """`run.json` as Markdown: a table of values, one of choices, and the command."""
    values = [(key, value) for key, value in _flat(run) if not key.startswith("choices")]
    choices = [
        (c["name"], ", ".join(map(str, c["labels"])), _condition(c["when"]))
        for c in run["choices"]
    ]
    command = shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    tables = table(("setting", "value"), values) + table(("choice", "options", "where"), choices)
    return f"    {command}\n\n{tables}"


def front_table(front: Sequence[Point]) -> str:
    """The front as Markdown, with validation metrics, costs and test metrics."""
    names = list(front[0].metrics) if front else []
    tested = list(front[0].record.test) if front else []
    rows = [
        (
            p.number,
            p.run.problem.space.architecture(p.picks).id,
            *(f"{p.metrics[n]:.5g}" for n in names),
            *(f"{p.record.test[n]:.5g}" for n in tested),
        )
        for p in front
    ]
    return table(("trial", "architecture", *names, *(f"test {n}" for n in tested)), rows)


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    written = (
        "| " + " | ".join(str(x).replace("|", "\\|") for x in line) + " |" for line in lines
    )
    return "\n".join(written) + "\n\n"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for i, item in enumerate(value):
            yield from _flat(item, f"{key}.{i}")
    else:
        yield key, value


def _condition(when: Mapping[str, Any] | None) -> str:
    return "" if when is None else f"{when['choice']}: {', '.join(map(str, when['among']))}"


def _reports(run: Run, number: int) -> list[tuple[int, dict[str, float]]]:
    """What the log says that a trial has reported since it was last begun."""
    found: dict[int, dict[str, float]] = {}
    for event in run.store.events():
        if event["event"] == "report" and event["trial"] == number:
            found = {step: m for step, m in found.items() if step < event["step"]}
            found[event["step"]] = event["metrics"]
    return list(found.items())


# Writing


def _writer(folder: Path, purge_step: int | None = None) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=purge_step)


def _add_scalars(writer: SummaryWriter, values: Mapping[str, float | None], step: int) -> None:
    for name, value in values.items():
        if value is not None and math.isfinite(value):
            writer.add_scalar(name, value, step)


def _add_summary(writer: SummaryWriter, summary: Any) -> None:
    assert writer.file_writer is not None
    writer.file_writer.add_summary(summary)


def _add_picture(writer: SummaryWriter, tag: str, figure: Figure, step: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    writer.add_image(tag, pixels, step, dataformats="HWC")
