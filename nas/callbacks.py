"""What can listen to a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from nas.trial import Result, Trial

if TYPE_CHECKING:
    from nas.run import Run


class Callback:
    """Listens to a search; override what you need."""

    def start(self, run: Run) -> None:
        """The search begins, or goes on behind the records that it already has."""

    def asked(self, trial: Trial) -> None:
        """A trial was asked for."""

    def reported(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> None:
        """A trial reported from its training."""

    def told(self, run: Run, trial: Trial, result: Result) -> None:
        """A trial has ended and the strategy knows."""

    def end(self, run: Run) -> None:
        """The search is over and its results are written."""
