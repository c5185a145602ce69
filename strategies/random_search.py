"""Random search: the baseline that every other strategy must beat (Li & Talwalkar 1902.07638)."""

from __future__ import annotations

from dataclasses import dataclass, field

from nas.choices import Picks
from nas.trial import Problem, Strategy, Trial

MOST_DRAWS = 1000


@dataclass
class RandomSearch(Strategy):
    """Draws architectures, each choice uniformly, none twice; ends when the space is used up."""

    seen: set[str] = field(init=False, default_factory=set, repr=False)

    def start(self, problem: Problem) -> None:
        """See `Strategy.start`."""
        super().start(problem)
        self.seen = set()

    def ask(self) -> Trial | None:
        """A new architecture, or None when there is none left (or none was found)."""
        rng = self.rng()
        draws = (self.problem.space.sample(rng) for _ in range(MOST_DRAWS))
        picks = next((p for p in draws if self._is_new(p)), None)
        return None if picks is None else self.trial(picks)

    def _is_new(self, picks: Picks) -> bool:
        known, key = len(self.seen), self.problem.space.architecture(picks).id
        if known == self.problem.space.size():
            return False
        self.seen.add(key)
        return len(self.seen) > known
