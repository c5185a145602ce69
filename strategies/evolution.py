"""Regularised evolution (Real et al. 1802.01548), with several objectives and limits.

A tournament among the youngest: of a sample of the population the best is the parent, one
decision of it is changed, and the oldest dies. With several objectives the best is the feasible,
non-dominated one with most room around it (Deb et al. 2002, NSGA-II).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from nas.choices import Picks
from nas.front import ranking
from nas.trial import Problem, Result, Strategy, Trial

MOST_DRAWS = 200


@dataclass
class Evolution(Strategy):
    """Regularised evolution.

    Args:
        population: How many of the youngest take part; as many random ones come first.
        sample: How many of them a tournament has.
    """

    population: int = 20
    sample: int = 5
    alive: deque[tuple[Picks, Result]] = field(init=False, default_factory=deque, repr=False)
    seen: set[str] = field(init=False, default_factory=set, repr=False)

    def start(self, problem: Problem) -> None:
        """See `Strategy.start`."""
        super().start(problem)
        if not 1 <= self.sample <= self.population:
            raise ValueError(
                f"Evolution: sample must lie in 1..population, got {self.sample} of "
                f"{self.population}"
            )
        self.alive, self.seen = deque(maxlen=self.population), set()

    def ask(self) -> Trial | None:
        """A random architecture, then children of tournaments; none twice."""
        rng = self.rng()
        born = (self._born(rng) for _ in range(MOST_DRAWS))
        picks = next((p for p in born if self._key(p) not in self.seen), None)
        if picks is None:
            return None
        self.seen.add(self._key(picks))
        return self.trial(picks)

    def tell(self, trial: Trial, result: Result) -> None:
        """Let a usable network join the population; the oldest dies."""
        if result.usable:
            self.alive.append((trial.picks, result))

    def _born(self, rng: np.random.Generator) -> Picks:
        space = self.problem.space
        if self.asked < self.population or not self.alive:
            return space.sample(rng)
        return space.mutate(self._winner(rng), rng)

    def _winner(self, rng: np.random.Generator) -> Picks:
        drawn = rng.permutation(len(self.alive))[: self.sample]
        players = [self.alive[i] for i in drawn]
        losses = [self.problem.losses(result) for _, result in players]
        return players[ranking(losses, [r.violations for _, r in players])[0]][0]

    def _key(self, picks: Picks) -> str:
        return self.problem.space.architecture(picks).id
