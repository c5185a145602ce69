"""Training a supernet: weights and mixture in turn (DARTS), and judging with what it learned."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nas.masks import mask_by_magnitude
from nas.tasks import Task
from nas.trial import Report

Sampler = Callable[[Tensor], Tensor]
SAMPLERS: dict[str, Sampler] = {"softmax": lambda logits: logits.softmax(0)}


@dataclass(frozen=True)
class Bilevel:
    """One round: weights and mixture trained in turn, on halves of the training data.

    Args:
        penalty: Weight of the expected cost, relative to that of the uniform mixture.
        cost: `nonzeros` or `flops`.
        sampler: How logits become mixture weights.
        batch_size: Samples in a step, of each half.
        lr: Of the weights (SGD, momentum 0.9), falling to a twenty-fifth along half a cosine.
        mixture_lr: Of the logits (Adam); None: 6 / steps, which is the paper's 3e-4 at its length.
        seed: Of the halves and of the order of samples.
    """

    penalty: float = 0.0
    cost: str = "flops"
    sampler: str = "softmax"
    batch_size: int = 64
    lr: float = 0.025
    mixture_lr: float | None = None
    seed: int = 0

    def fit(self, network: nn.Module, task: Task, budget: int, report: Report) -> dict[str, float]:
        """See `nas.trial.Fit`."""
        return _Round(self, network, task, budget).run(report)


class _Round:
    """A bilevel training at work."""

    def __init__(self, how: Bilevel, network: Any, task: Task, budget: int) -> None:
        self.how, self.network, self.task, self.budget = how, network, task, budget
        halves = task.resplit((0.5, 0.5), how.seed)
        self.halves = replace(task, train=halves[0]), replace(task, train=halves[1])
        self.device = next(network.parameters()).device
        self.logits = {
            name: nn.Parameter(torch.zeros(len(network.mixture[name]), device=self.device))
            for name in network.mixture.names()
        }
        self.last = max(1, budget * (min(len(h) for h in halves) // how.batch_size))
        self._freeze_norms()
        self._optimizers()

    def run(self, report: Report) -> dict[str, float]:
        with torch.no_grad():
            self._mix()
            self.whole = float(self.network.expected_cost(self.network.mixture, self.how.cost))
        metrics: dict[str, float] = {}
        for epoch in range(self.budget):
            mask_by_magnitude(self.network)
            self._epoch(epoch)
            metrics = self._judged()
            if not report(epoch + 1, metrics):
                break
        return metrics

    def _freeze_norms(self) -> None:
        """Scales would hide the mixture weights (as in the paper, which leaves them out)."""
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.affine:
                module.weight.requires_grad_(False)
                module.bias.requires_grad_(False)

    def _optimizers(self) -> None:
        weights = [p for p in self.network.parameters() if p.requires_grad]
        self.weights = torch.optim.SGD(weights, self.how.lr, 0.9, weight_decay=3e-4, fused=True)
        rate = self.how.mixture_lr or 6 / self.last
        logits = list(self.logits.values())
        self.mixture = torch.optim.Adam(logits, rate, (0.5, 0.999), weight_decay=1e-3)
        low = self.how.lr / 25
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.weights, self.last, low)

    def _mix(self) -> None:
        sample = SAMPLERS[self.how.sampler]
        for name, logits in self.logits.items():
            self.network.mixture[name] = sample(logits)

    def _epoch(self, epoch: int) -> None:
        self.network.train()
        for (x, y), (x_val, y_val) in zip(*self._batches(epoch), strict=False):
            self._mixture_step(x_val, y_val)
            self._weight_step(x, y)
        with torch.no_grad():
            self._mix()

    def _batches(self, epoch: int) -> list[Iterator[tuple[Tensor, Tensor]]]:
        seeds = (2 * (self.how.seed + epoch), 2 * (self.how.seed + epoch) + 1)
        return [
            half.batches("train", self.how.batch_size, _generator(seed), self.device)
            for half, seed in zip(self.halves, seeds, strict=True)
        ]

    def _mixture_step(self, x: Tensor, y: Tensor) -> None:
        self._mix()
        cost = self.network.expected_cost(self.network.mixture, self.how.cost) / self.whole
        loss = self.task.loss(self.network(x), y) + self.how.penalty * cost
        logits = list(self.logits.values())
        for logit, grad in zip(logits, torch.autograd.grad(loss, logits), strict=True):
            logit.grad = grad
        self.mixture.step()

    def _weight_step(self, x: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            self._mix()
        loss = self.task.loss(self.network(x), y)
        self.weights.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.weights.step()
        self.schedule.step()

    def _judged(self) -> dict[str, float]:
        """Metrics of the supernet, the entropy of its mixture, and what it is expected to cost."""
        mixture = self.network.mixture
        entropies = [_entropy(mixture[name]) for name in self.logits]
        cost = float(self.network.expected_cost(mixture, self.how.cost))
        return {
            **self.task.evaluate(self.network, device=self.device),
            "entropy": sum(entropies) / max(1, len(entropies)),
            f"expected_{self.how.cost}": cost,
        }


@dataclass(frozen=True)
class Rank:
    """Judges closed architectures by the weights of a supernet, batch norm recalibrated.

    Args:
        candidates: (number of the closed trial, its mixture as one-hot weights by choice).
        batches: Batches of training data for batch norm's statistics.
    """

    candidates: tuple[tuple[int, dict[str, list[float]]], ...]
    batches: int = 10

    def fit(self, network: nn.Module, task: Task, budget: int, report: Report) -> dict[str, float]:
        """See `nas.trial.Fit`; gives `supernet_<metric>/<number>` for the task's first metric."""
        metric, found = task.metrics[0].name, {}
        for number, mixture in self.candidates:
            _set_mixture(network, mixture)
            recalibrate(network, task, self.batches)
            judged = task.evaluate(network, device=next(network.parameters()).device)
            found[f"supernet_{metric}/{number}"] = judged[metric]
        report(budget, found)
        return found


@torch.no_grad()
def recalibrate(network: nn.Module, task: Task, batches: int) -> None:
    """Estimate batch norm's statistics afresh on training data, unaugmented."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    held = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    network.train()
    device = next(network.parameters()).device
    for (x, _), _ in zip(task.batches("train", 64, device=device), range(batches), strict=False):
        network(x)
    for norm, momentum in zip(norms, held, strict=True):
        norm.momentum = momentum


def _set_mixture(network: Any, mixture: Mapping[str, list[float]]) -> None:
    for name, weights in mixture.items():
        network.mixture.add(name, len(weights))
        network.mixture[name] = torch.tensor(weights)


def _entropy(weights: Tensor) -> float:
    """Of mixture weights, as a share of the uniform one's: 1 undecided, 0 decided."""
    if len(weights) < 2:
        return 0.0
    w = weights.detach().clamp_min(1e-12)
    return float(-(w * w.log()).sum() / math.log(len(w)))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
