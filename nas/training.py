"""The task's own training: one optimiser, schedules as functions of (step, last step), a recipe.

What a step does depends on the seed, the step and the last step alone, so that a trial that is
continued to a larger budget goes on as if it had been meant to from the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from nas.recipes import Magnitude, Recipe
from nas.store import State
from nas.tasks import Task
from nas.trial import Report


@dataclass(frozen=True)
class Training:
    """How a closed network is trained on a task.

    Args:
        batch_size: Samples in a step.
        optimizer: `adamw` or `sgd` (momentum 0.9).
        lr: Learning rate at the start; it falls to 0 along half a cosine.
        weight_decay: Decoupled for `adamw`.
        clip: Largest norm of the gradient.
        recipe: How masks come to be.
    """

    batch_size: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 2e-3
    weight_decay: float = 1e-2
    clip: float = 5.0
    recipe: Recipe = field(default_factory=Magnitude)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 < self.lr < math.inf:
            values = f"{self.batch_size} and {self.lr}"
            raise ValueError(f"Training: batch_size and lr must be positive, got {values}")

    def __call__(
        self,
        network: nn.Module,
        task: Task,
        budget: int,
        report: Report,
        seed: int = 0,
        start: State | None = None,
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Train in place for `budget` epochs, those behind `start` included.

        Returns:
            The last metrics, and what is needed to go on beside the weights.
        """
        run = _Run(self, network, task, budget, seed)
        return run.run(report, start), run.state()


class _Run:
    """One training at work."""

    def __init__(
        self, how: Training, network: nn.Module, task: Task, budget: int, seed: int
    ) -> None:
        self.how, self.network, self.task = how, network, task
        self.budget, self.seed = budget, seed
        self.device = next(network.parameters()).device
        whole, rest = divmod(len(task.train), how.batch_size)
        self.per_epoch = whole + (rest > 1 or not whole)  # batch norm cannot train on one sample
        self.step, self.last = 0, budget * self.per_epoch

    def run(self, report: Report, start: State | None) -> dict[str, float]:
        if start is None:
            self.how.recipe.start(self.network, torch.Generator().manual_seed(self.seed))
        self.optimizer = self._make_optimizer()
        if start is not None:
            self._continue(start.tensors)
        metrics: dict[str, float] = {}
        for epoch in range(self.step // self.per_epoch, self.budget):
            metrics = self._epoch(epoch)
            if not report(epoch + 1, metrics):
                break
        return metrics

    def state(self) -> dict[str, Tensor]:
        held = self.optimizer.state_dict()["state"]
        tensors = {
            f"optimizer#{i}#{k}": torch.as_tensor(v)
            for i, d in held.items()
            for k, v in d.items()
            if v is not None
        }
        return {
            "training#step": torch.tensor(self.step),
            "training#random": torch.get_rng_state(),
            **tensors,
        }

    def _make_optimizer(self) -> torch.optim.Optimizer:
        parameters, how = list(self.network.parameters()), self.how
        if how.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, how.lr, 0.9, weight_decay=how.weight_decay, fused=True
            )
        return torch.optim.AdamW(parameters, how.lr, weight_decay=how.weight_decay, fused=True)

    def _continue(self, tensors: Mapping[str, Tensor]) -> None:
        self.step = int(tensors["training#step"])
        torch.set_rng_state(tensors["training#random"])
        whole = self.optimizer.state_dict()
        for key, value in tensors.items():
            if key.startswith("optimizer#"):
                _, index, name = key.split("#")
                whole["state"].setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(whole)

    def _epoch(self, epoch: int) -> dict[str, float]:
        self.network.train()
        generator = torch.Generator().manual_seed(self.seed + 1 + epoch)
        total = torch.zeros((), device=self.device)
        batches = self.task.batches("train", self.how.batch_size, generator, self.device)
        for x, y in islice(batches, self.per_epoch):
            total += self._step(x, y)
        if epoch + 1 == self.budget:
            self.how.recipe.finish(self.network)
        judged = self.task.evaluate(self.network, device=self.device)
        return {"train_loss": float(total) / self.per_epoch, **judged}

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        lr = self.how.lr * 0.5 * (1 + math.cos(math.pi * self.step / self.last))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.how.recipe.step(self.network, self.step, self.last)
        loss = self.task.loss(self.network(x), y)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.how.clip)
        self.optimizer.step()
        self.step += 1
        return loss.detach()
