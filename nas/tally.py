"""What is best so far in a search, and how many trials came to what."""

from __future__ import annotations

from collections import Counter

from nas.run import Record, Run


class Tally:
    """Counts records as they come.

    Attributes:
        best: The best value of each objective among feasible closed trials.
        status: How many trials ended how.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.best: dict[str, float] = {}
        self.status: Counter[str] = Counter()

    def take(self, record: Record) -> None:
        """Count one more record."""
        result = record.result
        self.status[result.status] += 1
        if result.usable and not result.violations and self.run.is_closed(record):
            for o in self.run.problem.objectives:
                known = {o.name: self.best.get(o.name, result.metrics[o.name])}
                self.best[o.name] = min(result.metrics, known, key=o.loss)[o.name]
