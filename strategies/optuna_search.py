"""Optuna's samplers through its own ask and tell: TPE, NSGA-II, GP.

The study lives in memory and is rebuilt by replaying the log. Ordered choices are sent as
integers, others as categories, by index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

from nas.choices import Decision, Picks, Subset
from nas.trial import Problem, Result, Strategy, Trial

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("tpe", "nsga2", "gp")


@dataclass
class OptunaSearch(Strategy):
    """A sampler of Optuna (Akiba et al. 1907.10902).

    Args:
        sampler: `tpe` (Bergstra et al. 2011), `nsga2` (Deb et al. 2002), or `gp` (one or several
            objectives, spaces without conditional choices only: elsewhere it would fall back).
    """

    sampler: str = "tpe"
    study: optuna.Study = field(init=False, repr=False)
    open_trials: dict[int, optuna.Trial] = field(init=False, default_factory=dict, repr=False)

    def start(self, problem: Problem) -> None:
        """Make the study. Raises ValueError for a sampler that would not do its work here."""
        super().start(problem)
        import optuna

        self._check()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        directions = [objective.direction for objective in problem.objectives]
        self.study = optuna.create_study(sampler=self._sampler(), directions=directions)
        self.open_trials = {}

    def ask(self) -> Trial | None:
        """The sampler's next suggestion."""
        suggested = self.study.ask()
        picks: Picks = {}
        for choice in self.problem.space.choices:
            if self.problem.space.choices.active(choice, picks):
                picks[choice.name] = _suggest(suggested, choice)
        trial = self.trial(self.problem.space.choices.canonical(picks))
        self.open_trials[trial.number] = suggested
        return trial

    def tell(self, trial: Trial, result: Result) -> None:
        """Tell the study; what has no metrics counts as failed there."""
        import optuna

        suggested = self.open_trials.pop(trial.number)
        if not result.usable:
            self.study.tell(suggested, state=optuna.trial.TrialState.FAIL)
            return
        for name in self.problem.limits:
            suggested.set_constraint(name, result.violations.get(name, 0.0))
        values = [result.metrics[o.name] for o in self.problem.objectives]
        self.study.tell(suggested, values)

    def _check(self) -> None:
        conditional = [c.name for c in self.problem.space.choices if c.when is not None]
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is none of {list(SAMPLERS)}")
        if self.sampler == "gp" and conditional:
            raise ValueError(
                f"sampler 'gp' falls back to random on conditional choices, such as "
                f"{conditional[0]!r}: take 'tpe', or a space without them"
            )

    def _sampler(self) -> optuna.samplers.BaseSampler:
        import optuna

        made: dict[str, Any] = {
            "tpe": optuna.samplers.TPESampler,
            "nsga2": optuna.samplers.NSGAIISampler,
            "gp": optuna.samplers.GPSampler,
        }
        return made[self.sampler](seed=self.seed)


def _suggest(suggested: optuna.Trial, choice: Decision) -> Any:
    if isinstance(choice, Subset):
        options = [list(c) for c in combinations(choice.items, choice.k)]
        return options[suggested.suggest_categorical(choice.name, range(len(options)))]
    if choice.ordered:
        return choice.labels[suggested.suggest_int(choice.name, 0, len(choice.labels) - 1)]
    return choice.labels[suggested.suggest_categorical(choice.name, range(len(choice.labels)))]
