"""The activations that the operators fuse, plainly."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
}


def activate(y: Tensor, activation: str) -> Tensor:
    """The activation of a name, of any float type."""
    return ACTIVATIONS[activation](y)
