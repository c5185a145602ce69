"""A search on the terminal: its progress as it runs, and what it found. rich comes when used."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
from io import StringIO
from pathlib import Path
from typing import IO, TYPE_CHECKING

from nas.callbacks import Callback
from nas.run import Point, Run
from nas.tally import Tally
from nas.trial import Result, Trial
from nas.words import number, titled, written

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

WIDTH = 160  # characters that a table may be wide, whatever the terminal's width


class Progress(Callback):
    """A bar with trials done, the best so far and the time left; a line a trial elsewhere.

    First of all it says where the run lies: a trial may take long.

    Args:
        stream: Where to; standard output by default. The bar is drawn on a terminal only.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self.stream = stream

    def start(self, run: Run) -> None:
        """See `Callback.start`."""
        from rich.console import Console

        self._console = Console(file=self.stream, highlight=False, markup=False)
        self._tally = Tally(run)
        for record in run.records.values():
            self._tally.take(record)
        begun = f", goes on behind {len(run.records)} trials" if run.records else ""
        self._say(f"run: {run.folder}{begun}")
        self._bar = _bar(self._console, run) if self._console.is_terminal else None
        self._update(run)

    def told(self, run: Run, trial: Trial, result: Result) -> None:
        """See `Callback.told`."""
        self._tally.take(run.records[trial.number])
        if self._bar is None:
            self._say(self._line(run, trial, result))
        self._update(run)

    def end(self, run: Run) -> None:
        """See `Callback.end`."""
        if self._bar is not None:
            self._bar.stop()

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def _update(self, run: Run) -> None:
        if self._bar is not None:
            done, text = run.counted(), self._so_far(run)
            self._bar.update(self._bar.task_ids[0], completed=done, description=text, refresh=True)

    def _line(self, run: Run, trial: Trial, result: Result) -> str:
        names = [o.name for o in run.problem.objectives if o.name in result.metrics]
        values = ", ".join(written(run, name, result.metrics[name]) for name in names)
        closed = run.is_closed(run.records[trial.number])
        told = f"trial {trial.number} {result.status}{'' if closed else ', choices open'}"
        parts = filter(None, (told, values, result.error, self._so_far(run)))
        return f"[{run.counted()}/{run.problem.trials}] " + "; ".join(parts)

    def _so_far(self, run: Run) -> str:
        best = ", ".join(written(run, name, value) for name, value in self._tally.best.items())
        lost = [f"{n} {s}" for s in ("failed", "refused") if (n := self._tally.status[s])]
        return "; ".join(filter(None, (best and f"best {best}", *lost)))


def _bar(console: Console, run: Run) -> RichProgress:
    """A bar that is drawn anew only when told to, so that nothing runs beside a measurement."""
    from rich import progress as rich

    columns = (
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(compact=True),
        rich.TextColumn("{task.description}", markup=False),
    )
    bar = rich.Progress(*columns, console=console, auto_refresh=False)
    bar.add_task("", total=run.problem.trials, completed=run.counted())
    bar.start()
    atexit.register(bar.stop)  # gives the cursor back if the search raises
    return bar


def pareto_table(run: Run) -> str:
    """The front as a table, where the run lies, and how to look at it in TensorBoard.

    Errors on the test part have their 95 % Wilson interval where they are shares of independent
    examples; measured times have their dense twin's, and whether both were steady.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    front = run.front()
    rows = [_cells(run, point) for point in front]
    titles = list(dict.fromkeys(title for row in rows for title in row))
    table = Table(box=box.SIMPLE_HEAD)
    for title in titles:
        table.add_column(title.replace(" (", "\n("), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(row.get(title, "-") for title in titles))
    text = StringIO()
    Console(file=text, width=WIDTH, highlight=False, markup=False).print(table)
    lines = [f"front: {len(front)} of {run.counted()} trials"]
    lines += [line.rstrip() for line in text.getvalue().splitlines()]
    lines += [f"run: {run.folder}", f"see: {tensorboard_command(run)}"]
    return "\n".join(filter(None, lines))


def _cells(run: Run, point: Point) -> dict[str, str]:
    """Text by column of one point of the front."""
    asked = [*(o.name for o in run.problem.objectives), *run.problem.limits, "nonzeros"]
    names = [name for name in dict.fromkeys(asked) if name in point.metrics]
    return {
        "trial": str(point.number),
        "architecture": run.problem.space.architecture(point.picks).id,
        **{titled(run, name): number(point.metrics[name]) for name in names},
        **_tested(run, point),
        **_measured(run, point),
    }


def _tested(run: Run, point: Point) -> dict[str, str]:
    test = point.record.test
    names = [m.name for m in run.evaluate.metrics if m.name in test]
    told = {f"test {titled(run, name)}": number(test[name]) for name in names}
    interval = _interval(run, test.get("error"))
    return told | ({"test error (95%)": interval} if interval else {})


def _interval(run: Run, error: float | None) -> str:
    """`low to high` where the error is a share of independent examples, else nothing."""
    from nas.tasks import binomial_interval, classification_error

    task = run.evaluate.task
    if task is None or error is None or task.test.targets.ndim != 1:
        return ""
    if task.measures["error"] is not classification_error:
        return ""
    low, high = binomial_interval(error, len(task.test))
    return f"{low:.3g} to {high:.3g}"


def _measured(run: Run, point: Point) -> dict[str, str]:
    """The dense twin's time, the speed-up and its reliability, of every cost that has them."""
    cells = {}
    for name, found in point.record.result.details.items():
        twin = found.get("twin_median_ms")
        if twin is not None:
            cells[f"twin {titled(run, name)}"] = number(twin)
            cells["speed-up"] = f"{twin / found['median_ms']:.2f}x"
            cells["steady"] = "yes" if found["reliable"] else "no"
    return cells


def tensorboard_command(run: Run) -> str:
    """What to type to see the run, with the path of this Python's `tensorboard` if need be."""
    beside = Path(sys.executable).parent / "tensorboard"
    found = shutil.which("tensorboard")
    other = found is None or Path(found) != beside
    program = os.path.relpath(beside) if other and beside.exists() else "tensorboard"
    return f"{program} --logdir {run.folder / 'tensorboard'}"
