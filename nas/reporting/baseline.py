"""Random networks of a space that keep as many weights as a point: what the search must beat.

Random search as a baseline for sparse architecture search: 2403.08265.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

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
STARTS = 4  # walks for each network that is wanted


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
    target = NonZeros().value(run.problem.space, picks)
    found: dict[str, Match] = {}
    drawn = (_match(run, p, target, False) for p in _draws(run, rng, DRAWS))
    moved = (_approach(run, p, target, rng) for p in _draws(run, rng, STARTS * networks))
    unlike = run.problem.space.architecture(picks).id
    for match in _near_first(drawn, moved):
        name = run.problem.space.architecture(match.picks).id
        if name != unlike and _is_allowed(run, match.picks):
            found.setdefault(name, match)
        if sum(m.off <= TOLERANCE for m in found.values()) >= networks:
            break
    return sorted(found.values(), key=lambda m: max(m.off, TOLERANCE))[:networks]


def _near_first(drawn: Iterable[Match], moved: Iterable[Match]) -> Iterator[Match]:
    """What was drawn near enough, then what was moved there."""
    yield from (m for m in drawn if m.off <= TOLERANCE)
    yield from moved


def _draws(run: Run, rng: np.random.Generator, most: int) -> Iterator[Picks]:
    return islice(iter(lambda: run.problem.space.sample(rng), None), most)


def _match(run: Run, picks: Picks, target: float, moved: bool) -> Match:
    nonzeros = NonZeros().value(run.problem.space, picks)
    return Match(picks, int(nonzeros), abs(nonzeros - target) / target, moved)


def _approach(run: Run, picks: Picks, target: float, rng: np.random.Generator) -> Match:
    """The end of a walk to ever nearer neighbours."""
    here = _match(run, picks, target, False)
    for _ in range(MOVES):
        if here.off <= TOLERANCE:
            break
        nearest = _nearest(run, here, target, rng)
        if nearest.off >= here.off:
            break
        here = nearest
    return here


def _nearest(run: Run, here: Match, target: float, rng: np.random.Generator) -> Match:
    """The nearest neighbour, or the first that is near enough."""
    best = here
    for picks in run.problem.space.neighbours(here.picks, rng):
        match = _match(run, picks, target, True)
        best = min(best, match, key=lambda m: m.off)
        if best.off <= TOLERANCE:
            break
    return best


def _is_allowed(run: Run, picks: Picks) -> bool:
    costs: Mapping[str, float] = run.evaluate.analytic(run.problem.space, picks)
    return not violations(costs, run.problem.limits)


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
