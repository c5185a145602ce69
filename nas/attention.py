"""Attention without its fused dense path, in which products are hidden."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def slow_attention() -> Iterator[None]:
    """Keep `nn.MultiheadAttention` and `nn.TransformerEncoder` off the fused path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
