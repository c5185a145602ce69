"""Random networks of a space that keep as many weights as a point: what the search must beat.

Random search as a baseline for sparse architecture search: 2403.08265.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from nas.choices import Picks
from nas.costs import NonZeros
from nas.loop import violations
from nas.reporting.accuracy import Judge, Judged
from nas.reporting.intervals import Estimate, difference, estimate
from nas.run import Point, Run

TOLERANCE = 0.01  # of the point's non-zeros
DRAWS = 300
MOVES = 30  # of a walk
STARTS = 10  # walks for each network that is wanted


@dataclass(frozen=True)
class Match:
    """A random network of nearly as many non-zeros.

    Attributes:
        picks: Its architecture.
        nonzeros: What it keeps.
        off: By what share that differs from the point's.
        moved: Whether single decisions of it were changed to come near, rather than drawn.
    """

    picks: Picks
    nonzeros: int
    off: float
    moved: bool


@dataclass(frozen=True)
class Baseline:
    """Random networks beside a point of the front, trained as long and from the same seeds.

    Attributes:
        matches: The networks.
        judged: Each of them over seeds.
        point: The point over the same seeds.
        estimate: Mean of the networks' means and its interval; the network is what is counted.
        difference: Mean of the networks' means less the point's mean.
        beaten: How many networks have a worse mean than the point.
        note: What falls short, if anything.
    """

    matches: list[Match]
    judged: list[Judged]
    point: Judged
    estimate: Estimate | None
    difference: Estimate | None
    beaten: int
    note: str


def compare_with_random(judge: Judge, point: Point, networks: int, seeds: int) -> Baseline:
    """Draw networks of the point's number of non-zeros and train them as it was trained.

    Args:
        judge: Trains and judges.
        point: Of the front.
        networks: How many.
        seeds: Trainings of each.
    """
    run, rng = judge.run, np.random.default_rng([judge.seed, point.number])
    matches = match_nonzeros(run, point.picks, networks, rng)
    judged = [judge.over_seeds(run.problem.space, m.picks, point, seeds) for m in matches]
    ours = judge.again(point, seeds)
    means = [j.estimate.mean for j in judged if j.estimate]
    return Baseline(
        matches,
        judged,
        ours,
        estimate(means) if means else None,
        difference(means, ours.values) if means and ours.values else None,
        _beaten(judge, ours, means),
        _note(matches, networks),
    )


def match_nonzeros(run: Run, picks: Picks, networks: int, rng: np.random.Generator) -> list[Match]:
    """Random networks within 1 % of these picks' non-zeros and within the run's cheap limits.

    Networks are drawn and kept if they are near enough; where draws do not give enough of them,
    each is brought nearer by the best change of one decision at a time. Where that does not reach
    1 % either, the nearest are given.
    """
    hunt = _Hunt(run, picks, rng)
    found: list[Match] = []
    for match in chain(hunt.drawn(DRAWS), hunt.walked(STARTS * networks)):
        found.append(match)
        if sum(m.off <= TOLERANCE for m in found) >= networks:
            break
    return sorted(found, key=lambda m: max(m.off, TOLERANCE))[:networks]


class _Hunt:
    """Finds networks of a number of non-zeros, none twice and never the one to compare with."""

    def __init__(self, run: Run, picks: Picks, rng: np.random.Generator) -> None:
        self.run, self.space, self.rng = run, run.problem.space, rng
        self.target = NonZeros().value(self.space, picks)
        self.taken = {self.space.architecture(picks).id}

    def drawn(self, most: int) -> Iterator[Match]:
        """Those draws that are near enough."""
        for _ in range(most):
            match = self._match(self.space.sample(self.rng), moved=False)
            if match.off <= TOLERANCE and self._fits(match):
                yield self._take(match)

    def walked(self, most: int) -> Iterator[Match]:
        """The ends of walks to ever nearer neighbours, from as many draws."""
        for _ in range(most):
            match = self._walk(self._match(self.space.sample(self.rng), moved=False))
            if self._fits(match):
                yield self._take(match)

    def _walk(self, here: Match) -> Match:
        for _ in range(MOVES):
            nearest = self._nearest(here)
            if nearest is here:
                break
            here = nearest
        return here

    def _nearest(self, here: Match) -> Match:
        """The nearest neighbour, or the first that is near enough; `here` if none is nearer."""
        best = here
        for picks in self.space.neighbours(here.picks, self.rng):
            if best.off <= TOLERANCE and self._fits(best):
                break
            match = self._match(picks, moved=True)
            if (match.off < best.off or not self._fits(best)) and self._fits(match):
                best = match
        return best

    def _match(self, picks: Picks, moved: bool) -> Match:
        nonzeros = NonZeros().value(self.space, picks)
        return Match(picks, int(nonzeros), abs(nonzeros - self.target) / self.target, moved)

    def _fits(self, match: Match) -> bool:
        """Whether it is new, and within the limits that need no training."""
        if self.space.architecture(match.picks).id in self.taken:
            return False
        limits = self.run.problem.limits
        return not limits or not violations(
            self.run.evaluate.analytic(self.space, match.picks), limits
        )

    def _take(self, match: Match) -> Match:
        self.taken.add(self.space.architecture(match.picks).id)
        return match


def _beaten(judge: Judge, ours: Judged, means: list[float]) -> int:
    if ours.estimate is None:
        return 0
    sign = 1 if judge.metric.direction == "minimize" else -1
    return sum(sign * mean > sign * ours.estimate.mean for mean in means)


def _note(matches: list[Match], wanted: int) -> str:
    far = [m for m in matches if m.off > TOLERANCE]
    notes = []
    if len(matches) < wanted:
        notes.append(f"only {len(matches)} of {wanted} random networks were found")
    if far:
        worst = max(m.off for m in far)
        notes.append(
            f"{len(far)} of {len(matches)} are not within {TOLERANCE:.0%} of the non-zeros: the "
            f"space was not found to reach it, the farthest is {worst:.1%} off"
        )
    return "; ".join(notes)
