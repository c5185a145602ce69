"""How a global ratio of zeros is spread over the weights of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from nas.sparsity import Unstructured, mask

Shapes = Mapping[str, Sequence[int]]

ALLOCATIONS = ("uniform", "erk", "global", "lamp")


def allocate(
    name: str, shapes: Shapes, ratio: float, weights: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """The ratio of zeros of each weight, so that the total kept is (1 - ratio) of all elements.

    The total holds up to the rounding of each weight's own kept count. `uniform` gives every
    weight the same ratio; `erk` is Erdos-Renyi-Kernel (Evci et al. 2020, 1911.11134); `global`
    keeps the largest magnitudes of the whole network, `lamp` the largest layer-adaptive ones (Lee
    et al. 2021, 2010.07611), each of them at least one element per weight.

    Args:
        name: one of `ALLOCATIONS`.
        shapes: (out, in / groups, *kernel) of each weight.
        ratio: the global fraction of zeros, in [0, 1).
        weights: the values, of these shapes; needed by `global` and `lamp`.

    Raises:
        ValueError: unknown name, bad ratio, or weights that do not fit the shapes or the budget.
    """
    Unstructured(ratio)
    if name == "uniform":
        return dict.fromkeys(shapes, ratio)
    if name == "erk":
        return _erk(shapes, ratio)
    if name not in ALLOCATIONS:
        raise ValueError(f"allocation: needs one of {', '.join(ALLOCATIONS)}, got {name!r}")
    return _by_scores(name, _fitting(name, shapes, weights), ratio)


def _erk(shapes: Shapes, ratio: float) -> dict[str, float]:
    """Density proportional to sum(shape) / prod(shape); what exceeds 1 goes to the others."""
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    budget = (1 - ratio) * sum(sizes.values())
    densities: dict[str, float] = {}
    while len(densities) < len(sizes):
        rest = [name for name in sizes if name not in densities]
        left = budget - sum(sizes[name] for name in densities)
        scale = left / sum(sum(shapes[name]) for name in rest)
        wanted = {name: scale * sum(shapes[name]) / sizes[name] for name in rest}
        full = [name for name in rest if wanted[name] > 1]
        densities |= dict.fromkeys(full, 1.0) if full else wanted
    return {name: 1 - densities[name] for name in sizes}


def _fitting(
    name: str, shapes: Shapes, weights: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor]:
    if weights is None:
        raise ValueError(f"allocation {name!r}: needs the weights, got None")
    for key, shape in shapes.items():
        found = tuple(weights[key].shape) if key in weights else None
        if found != tuple(shape):
            raise ValueError(
                f"allocation {name!r}: needs {key} of shape {tuple(shape)}, got {found}"
            )
    return {key: weights[key].detach() for key in shapes}


def _by_scores(name: str, weights: Mapping[str, Tensor], ratio: float) -> dict[str, float]:
    scorer = _lamp_scores if name == "lamp" else _magnitudes
    scores = {key: _with_one_safe(scorer(weight)) for key, weight in weights.items()}
    everything = torch.cat(list(scores.values()))
    if round((1 - ratio) * len(everything)) < len(scores):
        raise ValueError(
            f"allocation {name!r}: needs a budget of one element for each of {len(scores)} "
            f"weights, got ratio {ratio} of {len(everything)} elements"
        )
    keep = mask(everything, Unstructured(ratio))
    parts = torch.split(keep, [len(part) for part in scores.values()])
    return {key: 1 - int(part.sum()) / len(part) for key, part in zip(scores, parts, strict=True)}


def _magnitudes(weight: Tensor) -> Tensor:
    return weight.abs().flatten().double()


def _lamp_scores(weight: Tensor) -> Tensor:
    """w^2 over the sum of the squares of all weights of the layer that are not smaller."""
    squares, order = _magnitudes(weight).square().sort(descending=True, stable=True)
    scores = squares / squares.cumsum(0).clamp_min(torch.finfo(squares.dtype).tiny)
    return torch.empty_like(scores).scatter_(0, order, scores)


def _with_one_safe(scores: Tensor) -> Tensor:
    return scores.index_fill(0, scores.argmax(), torch.inf)
