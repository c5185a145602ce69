"""Recipes: how the masks of a network come to be. Frozen plain values that act on a module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor, prod
from typing import Any, Protocol

import torch
from torch import nn

from nas.allocation import allocate
from nas.masks import SparseWeight, pairs, sparse_weights
from nas.sparsity import NM, Block, Channel, Dense, Sparsity, Unstructured, kept

FreeRatio = Unstructured | Block | Channel


class Recipe(Protocol):
    """What brings the masks of the sparse weights of a module.

    `start` is called once before training, `step` before each optimiser step, `finish` after the
    last. Schedules are functions of the step and the last step only, so that a larger budget
    continues what a smaller one began.
    """

    def start(self, module: nn.Module, generator: torch.Generator) -> None:
        """Sets the first masks; all randomness comes from `generator`, a CPU generator."""

    def step(self, module: nn.Module, step: int, last: int) -> None:
        """Sets the masks for `step`, counted from 0; quick where nothing changes."""

    def finish(self, module: nn.Module) -> None:
        """Leaves every mask at its own sparsity."""


@dataclass(frozen=True)
class Magnitude:
    """Gradual magnitude pruning (Zhu & Gupta 2017, 1710.01878).

    The ratio of zeros goes from 0 to the target as 1 - (1 - t)^3, with t from 0 at `begin` to 1 at
    `end`; from there on the masks stay. N:M goes the same way by lowering N from M, rounded. In
    an open weight every option follows its own ratio.

    Attributes:
        begin: where it begins, as a fraction of the training.
        end: where it ends, as a fraction of the training.
        every: the fraction of the training between two changes of the masks.
    """

    begin: float = 0.0
    end: float = 0.75
    every: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.begin < self.end <= 1 or not 0 < self.every <= 1:
            raise ValueError(
                f"Magnitude: needs 0 <= begin < end <= 1 and 0 < every <= 1, got "
                f"begin={self.begin}, end={self.end}, every={self.every}"
            )

    def start(self, module: nn.Module, generator: torch.Generator) -> None:
        """Opens every mask."""
        _prune(module, 0.0)

    def step(self, module: nn.Module, step: int, last: int) -> None:
        """Masks by the present magnitudes where the schedule's level changes."""
        level = self._level(step, last)
        if step == 0 or level != self._level(step - 1, last):
            _prune(module, 1 - (1 - level) ** 3)

    def finish(self, module: nn.Module) -> None:
        """Prunes what a short training left above its target; other masks stay."""
        for weight, dense in pairs(module):
            if not _at_target(weight):
                weight.set_scores(dense.detach().abs())

    def _level(self, step: int, last: int) -> float:
        """How far the schedule is, in [0, 1], in stairs of about `every`."""
        stairs = ceil((self.end - self.begin) / self.every)
        time = step / last if last else 1.0
        progress = (time - self.begin) / (self.end - self.begin)
        stair = floor(progress * stairs + 1e-9)  # 12.999... is stair 13
        return min(max(stair / stairs, 0.0), 1.0)


@dataclass(frozen=True)
class OneShot:
    """Masks by the magnitudes that the weights have at the start."""

    def start(self, module: nn.Module, generator: torch.Generator) -> None:
        """Sets the masks."""
        _prune(module, 1.0)

    def step(self, module: nn.Module, step: int, last: int) -> None:
        """Changes nothing."""

    def finish(self, module: nn.Module) -> None:
        """Changes nothing."""


@dataclass(frozen=True)
class RandomMask:
    """Random masks that stay as they are drawn.

    Attributes:
        allocation: None leaves every weight its own ratio; `uniform` or `erk` spread anew what the
            weights with a free ratio keep in total. It is for closed weights.
    """

    allocation: str | None = None

    def __post_init__(self) -> None:
        if self.allocation not in (None, "uniform", "erk"):
            raise ValueError(
                f"RandomMask: needs allocation uniform, erk or None, got {self.allocation!r}"
            )

    def start(self, module: nn.Module, generator: torch.Generator) -> None:
        """Draws the masks; with an allocation, weights get its ratios as their own."""
        weights = sparse_weights(module)
        if self.allocation:
            _reallocate(self.allocation, weights)
        for weight in weights.values():
            weight.set_scores(torch.rand(weight.masks.shape[1:], generator=generator))

    def step(self, module: nn.Module, step: int, last: int) -> None:
        """Changes nothing."""

    def finish(self, module: nn.Module) -> None:
        """Changes nothing."""


@dataclass(frozen=True)
class LearnedScores:
    """Masks by scores that are trained beside the weights, straight through.

    Edge-popup (Ramanujan et al. 2020, 1911.13299) with the first scores of HYDRA (Sehwag et al.
    2020, 2002.10509).
    """

    def start(self, module: nn.Module, generator: torch.Generator) -> None:
        """Gives every sparse weight scores: make the optimiser after it."""
        for weight, dense in pairs(module):
            weight.learn(dense)

    def step(self, module: nn.Module, step: int, last: int) -> None:
        """Changes nothing: the optimiser changes the scores."""

    def finish(self, module: nn.Module) -> None:
        """Fixes the masks; the scores stay, so that a larger budget can go on from them."""
        for weight in sparse_weights(module).values():
            weight.freeze()


RECIPES: dict[str, type[Recipe]] = {
    "magnitude": Magnitude,
    "one_shot": OneShot,
    "random": RandomMask,
    "learned_scores": LearnedScores,
}


def recipe_from(name: str, **fields: Any) -> Recipe:
    """The recipe of this name with these fields; ValueError where there is none."""
    if name not in RECIPES:
        raise ValueError(f"recipe: needs one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name](**fields)


def to_json(recipe: Recipe) -> dict[str, Any]:
    """The name and fields of a recipe: `recipe_from(**to_json(recipe)) == recipe`."""
    names = {kind: name for name, kind in RECIPES.items()}
    if type(recipe) not in names:
        raise ValueError(f"recipe: needs a kind of RECIPES, got {recipe!r}")
    return {"name": names[type(recipe)], **vars(recipe)}


@torch.no_grad()
def _prune(module: nn.Module, progress: float) -> None:
    """Masks by magnitude at this part of each target ratio."""
    for weight, dense in pairs(module):
        weight.set_scores(dense.abs(), [_towards(t, progress) for t in weight.sparsities])


def _towards(target: Sparsity, progress: float) -> Sparsity:
    ratio = progress * target.ratio
    match target:
        case Dense():
            return target
        case NM(n, m):
            return NM(max(n, round((1 - ratio) * m)), m)
        case _:
            return replace(target, ratio=ratio)


def _at_target(weight: SparseWeight) -> bool:
    shape = weight.masks.shape[1:]
    counts = weight.masks.flatten(1).sum(1).tolist()
    return counts == [kept(target, shape) for target in weight.sparsities]


def _reallocate(allocation: str, weights: dict[str, SparseWeight]) -> None:
    opened = [path for path, weight in weights.items() if weight.open]
    if opened:
        raise ValueError(f"RandomMask: allocation needs closed weights, got open {opened}")
    free = {
        path: sparsity
        for path, weight in weights.items()
        if isinstance(sparsity := weight.sparsities[0], FreeRatio)
    }
    shapes = {path: weights[path].masks.shape[1:] for path in free}
    keep = sum(kept(sparsity, shapes[path]) for path, sparsity in free.items())
    ratio = 1 - keep / max(1, sum(map(prod, shapes.values())))
    for path, share in allocate(allocation, shapes, ratio).items():
        weights[path].sparsities = (replace(free[path], ratio=share),)
