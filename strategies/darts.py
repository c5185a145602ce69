"""DARTS, first order (Liu et al. 1806.09055), with what the network costs in its objective.

A round trains a supernet in which everything is open, its weights on one half of the training
data and the mixture on the other, at one weight of the expected cost. The architecture that it
leads to is trained from scratch. The cost's weight changes from round to round, so that the
closed trials give a front. A last trial judges all of them by the weights of the last supernet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nas.choices import Choice, Picks, Subset
from nas.space import Space
from nas.trial import Problem, Result, Strategy, Trial

MOST_FAILURES = 3


@dataclass
class Darts(Strategy):
    """Rounds of `Bilevel`, each with a closed trial of the architecture that it leads to.

    Args:
        cost: `nonzeros` or `flops`.
        penalties: Weight of the cost in the first and in the last round; between them evenly.
        search_epochs: Of a round; None: the budget of a closed trial.
        batch_size: Of a round.
    """

    cost: str = "flops"
    penalties: tuple[float, float] = (0.0, 1.0)
    search_epochs: int | None = None
    batch_size: int = 64
    continues = True
    ends_itself = True
    found: dict[int, Picks] = field(init=False, default_factory=dict, repr=False)
    waiting: Picks | None = field(init=False, default=None, repr=False)
    supernet: int | None = field(init=False, default=None, repr=False)
    out: bool = field(init=False, default=False, repr=False)
    ranked: bool = field(init=False, default=False, repr=False)
    failures: int = field(init=False, default=0, repr=False)

    def start(self, problem: Problem) -> None:
        """See `Strategy.start`."""
        super().start(problem)
        if self.cost not in ("nonzeros", "flops"):
            raise ValueError(f"Darts: cost is nonzeros or flops, got {self.cost!r}")
        if len(self.penalties) != 2:
            raise ValueError(f"Darts: penalties are two, got {self.penalties}")
        for name in ("search_epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise ValueError(f"Darts: {name} must be at least 1, got {value!r}")
        self.found, self.waiting, self.supernet = {}, None, None
        self.out, self.ranked, self.failures = False, False, 0

    def settings(self) -> dict[str, Any]:
        """As `Strategy.settings`, and over how many rounds the penalties are spread."""
        return {**super().settings(), "trials": self.problem.trials}

    def ask(self) -> Trial | None:
        """A round, the architecture it led to, and at last the ranking of all."""
        if self.waiting is not None:
            picks, self.waiting = self.waiting, None
            trial = self.trial(picks)
            self.found[trial.number] = picks
            return trial
        if self.out or self.ranked:
            return None
        self.out = True
        done = len(self.found) == self.problem.trials
        return self._rank() if done else self._round()

    def tell(self, trial: Trial, result: Result) -> None:
        """Take the mixture of a round, or the end of a closed trial."""
        if not self.problem.space.open(trial.picks):
            return
        self.out = False
        self.failures = 0 if result.usable else self.failures + 1
        self.ranked = self.ranked or self.failures == MOST_FAILURES
        if result.usable and not self.ranked:
            self.supernet = trial.number
            self.waiting = derive(self.problem.space, result.mixture)

    def _round(self) -> Trial:
        from strategies.bilevel import Bilevel

        first, last = self.penalties
        share = len(self.found) / max(1, self.problem.trials - 1)
        penalty = first + (last - first) * share
        fit = Bilevel(penalty, self.cost, batch_size=self.batch_size, seed=self.seed)
        return self.trial({}, budget=self.search_epochs or self.problem.budget, fit=fit)

    def _rank(self) -> Trial | None:
        from strategies.bilevel import Rank

        self.ranked = True
        if self.supernet is None:
            return None
        one_hot = [(n, one_hot_mixture(self.problem.space, p)) for n, p in self.found.items()]
        return self.trial({}, parent=self.supernet, fit=Rank(tuple(one_hot)))


def derive(space: Space, mixture: Mapping[str, list[float]]) -> Picks:
    """The architecture that mixture weights lead to.

    Each choice takes its heaviest option that may be picked. A subset keeps its strongest items:
    by weights of its own, or else by the largest weight of the choice that hangs on the item,
    `none` left out.
    """
    picks: Picks = {}
    for choice in space.choices:
        if not space.choices.active(choice, picks):
            continue
        if isinstance(choice, Subset):
            strength = mixture.get(choice.name) or _strengths(space, choice, mixture)
            order = sorted(range(len(choice.items)), key=lambda i: -strength[i])
            picks[choice.name] = [choice.items[i] for i in sorted(order[: choice.k])]
        else:
            picks[choice.name] = max(choice.labels, key=_weight_of(choice, mixture))
    return space.choices.canonical(picks)


def _weight_of(choice: Choice, mixture: Mapping[str, list[float]]) -> Callable[[Any], float]:
    weights = dict(zip(choice.open_labels, mixture[choice.name], strict=True))
    return lambda label: weights[label]


def _strengths(space: Space, subset: Subset, mixture: Mapping[str, list[float]]) -> list[float]:
    def strongest(item: Any) -> float:
        hanging = (c for c in space.choices if c.when and c.when.choice == subset.name)
        mine = [c for c in hanging if isinstance(c, Choice) and item in c.when.among]  # type: ignore[union-attr]
        return max((_weight_of(c, mixture)(x) for c in mine for x in c.labels), default=0.0)

    return [strongest(item) for item in subset.items]


def one_hot_mixture(space: Space, picks: Picks) -> dict[str, list[float]]:
    """Mixture weights under which a supernet computes what the architecture does."""
    mixture = {}
    for choice in space.choices:
        held = picks.get(choice.name)
        if held is not None:
            kept = held if isinstance(held, list) else [held]
            mixture[choice.name] = [float(label in kept) for label in choice.open_labels]
    return mixture
