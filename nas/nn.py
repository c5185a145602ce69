"""Sparse layers: `nn.Conv2d` and `nn.Linear` with one more argument.

The weight is masked when it is read (see `nas.masks`), at first by the magnitudes it is born with.
In `state_dict()` a sparse weight is `parametrizations.weight.original` (unmasked) beside
`parametrizations.weight.0.masks`; `nas.masks.weights` gives plain keys and masked values. With
`Dense()` the layer is an ordinary one, keys included.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from nas.masks import attach, bake
from nas.sparsity import DENSE, Sparsity, check


class SparseConv2d(nn.Conv2d):
    """`nn.Conv2d` with a sparse weight of shape (out, in / groups, kH, kW).

    Takes the arguments of `nn.Conv2d` and the keyword `sparsity`.

    Raises:
        ValueError: the weight's shape does not admit the sparsity.
    """

    def __init__(self, *args: Any, sparsity: Sparsity = DENSE, **kwargs: Any) -> None:
        self.sparsity = sparsity
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Draws a new weight and masks it by magnitude."""
        bake(self)
        super().reset_parameters()
        _mask_weight(self, self.sparsity, "SparseConv2d")


class SparseLinear(nn.Linear):
    """`nn.Linear` with a sparse weight of shape (out, in).

    Takes the arguments of `nn.Linear` and the keyword `sparsity`.

    Raises:
        ValueError: the weight's shape does not admit the sparsity.
    """

    def __init__(self, *args: Any, sparsity: Sparsity = DENSE, **kwargs: Any) -> None:
        self.sparsity = sparsity
        super().__init__(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Draws a new weight and masks it by magnitude."""
        bake(self)
        super().reset_parameters()
        _mask_weight(self, self.sparsity, "SparseLinear")


def _mask_weight(layer: nn.Conv2d | nn.Linear, sparsity: Sparsity, who: str) -> None:
    check(sparsity, layer.weight.shape, who)
    if sparsity != DENSE:
        attach(layer, "weight", (sparsity,))
