"""Three strategies, at most 60 lines each, that show what the core carries beyond its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nas.choices import Picks, Subset
from nas.masks import original, sparse_weights
from nas.tasks import Task
from nas.trial import Problem, Report, Result, Strategy, Trial
from strategies.bilevel import Bilevel
from strategies.darts import derive


# PC-DARTS-like (1907.05737): the inputs of a node have weights of their own, which derive it.
@dataclass(frozen=True)
class WithEdges(Bilevel):
    """A bilevel round in which the subsets are weighed too."""

    subsets: tuple[tuple[str, int], ...] = ()

    def fit(self, network: Any, task: Task, budget: int, report: Report) -> dict[str, float]:
        for name, items in self.subsets:
            network.mixture.add(name, items)
        return super().fit(network, task, budget, report)


@dataclass
class EdgeWeights(Strategy):
    """One round, then the architecture whose edges weigh most."""

    epochs: int = 1
    continues = True
    mixture: dict[str, list[float]] = field(init=False, default_factory=dict, repr=False)

    def ask(self) -> Trial | None:
        if self.asked == 0:
            held = [c for c in self.problem.space.choices if isinstance(c, Subset)]
            subsets = tuple((c.name, len(c.items)) for c in held)
            fit = WithEdges(seed=self.seed, subsets=subsets, mixture_lr=0.1)
            return self.trial({}, budget=self.epochs, fit=fit)
        if self.asked == 1 and self.mixture:
            return self.trial(derive(self.problem.space, self.mixture))
        return None

    def tell(self, trial: Trial, result: Result) -> None:
        self.mixture = result.mixture or self.mixture


# DASS-like (2207.06968): pre-train, learn scores, fine-tune what is left; on one set of weights.
@dataclass(frozen=True)
class Phase(Bilevel):
    """One of the three: `pretrain`, `score` or `finetune`."""

    phase: str = "pretrain"

    def fit(self, network: Any, task: Task, budget: int, report: Report) -> dict[str, float]:
        if self.phase == "pretrain":
            return super().fit(network, task, budget, report)
        sparse = sparse_weights(network)
        for path, weight in sparse.items():
            weight.learn(original(network, path)) if self.phase == "score" else weight.freeze()
        scores = {id(w.scores) for w in sparse.values()}
        chosen = self.phase == "score"
        trained = [p for p in network.parameters() if (id(p) in scores) == chosen]
        metrics = _descend(network, trained, task, budget, report)
        for weight in sparse.values():
            weight.freeze()
        return metrics


def _descend(
    network: nn.Module, parameters: list[Any], task: Task, budget: int, report: Report
) -> dict[str, float]:
    optimizer = torch.optim.SGD(parameters, 0.05, 0.9)
    for epoch in range(budget):
        network.train()
        for x, y in task.batches("train", 64, torch.Generator().manual_seed(epoch)):
            optimizer.zero_grad()
            torch.autograd.backward(task.loss(network(x), y))
            optimizer.step()
        report(epoch + 1, task.evaluate(network))
    return task.evaluate(network)


@dataclass
class ThreePhases(Strategy):
    """Three fits, each on the state of the one before, then the architecture that they lead to."""

    continues = True
    mixture: dict[str, list[float]] = field(init=False, default_factory=dict, repr=False)
    told: int = field(init=False, default=0, repr=False)

    def ask(self) -> Trial | None:
        ready = self.asked == self.told <= 3 and (self.asked == 0 or self.mixture)
        if not ready:
            return None
        if self.asked == 3:
            return self.trial(derive(self.problem.space, self.mixture), parent=2)
        phase = ("pretrain", "score", "finetune")[self.asked]
        parent = self.asked - 1 if self.asked else None
        return self.trial({}, parent=parent, fit=Phase(seed=self.seed, phase=phase))

    def tell(self, trial: Trial, result: Result) -> None:
        self.told += 1
        self.mixture = result.mixture or self.mixture


# ASHA-like (1810.05934): the best third of a rung goes on at thrice the budget, asynchronously.
@dataclass
class Halving(Strategy):
    """Asynchronous successive halving; reports stop what is far behind at once."""

    factor: int = 3
    least: int = 1
    continues = True
    rungs: dict[int, dict[int, float]] = field(init=False, default_factory=dict, repr=False)
    picks: dict[int, Picks] = field(init=False, default_factory=dict, repr=False)
    promoted: set[int] = field(init=False, default_factory=set, repr=False)
    seen: dict[int, dict[int, float]] = field(init=False, default_factory=dict, repr=False)

    def start(self, problem: Problem) -> None:
        super().start(problem)
        self.rungs, self.picks, self.promoted, self.seen = {}, {}, set(), {}

    def ask(self) -> Trial | None:
        parent = self._promotable()
        if parent is None:
            return self._kept(self.trial(self.problem.space.sample(self.rng()), budget=self.least))
        self.promoted.add(parent)
        budget = next(b for b, told in self.rungs.items() if parent in told) * self.factor
        return self._kept(self.trial(self.picks[parent], budget=budget, parent=parent))

    def tell(self, trial: Trial, result: Result) -> None:
        if result.status == "ok":
            self.rungs.setdefault(trial.budget, {})[trial.number] = self.problem.losses(result)[0]

    def report(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> bool:
        at = self.seen.setdefault(step, {})
        at[trial.number] = metrics[self.problem.objectives[0].name]
        best = sorted(at.values())
        return len(at) < 2 * self.factor or at[trial.number] <= best[len(best) // 2]

    def _kept(self, trial: Trial) -> Trial:
        self.picks[trial.number] = trial.picks
        return trial

    def _promotable(self) -> int | None:
        for budget, told in sorted(self.rungs.items(), reverse=True):
            best = sorted(told, key=lambda n: told[n])[: len(told) // self.factor]
            ready = [n for n in best if n not in self.promoted]
            if ready and budget * self.factor <= self.problem.budget:
                return ready[0]
        return None


STRATEGIES = {"edges": EdgeWeights, "phases": ThreePhases, "halving": Halving}
