"""Choosing the kernel of a layer by checking and timing all that compute the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nas.latency import interleaved
from nas.packing.layer import (
    Kernel,
    Layer,
    dense_kernel,
    rounding_bound,
    sparse_kernel,
)

WORTH_PACKING = 0.1
SECONDS = 0.006
ROUNDS = 7


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for one layer at one input shape, and what that rests on.

    Attributes:
        layer: the layer.
        shape: the shape of the input that was measured.
        kernel: the fastest kernel that computes the same.
        us: its median time, microseconds.
        dense_us: the dense kernel's median time in the same rounds, microseconds.
        sparse: the sparse kernel, right and timed, whether chosen or not; or None.
        sparse_us: its time, or None.
        note: why no sparse kernel could be used although it was worth trying, or "".
    """

    layer: Layer
    shape: tuple[int, ...]
    kernel: Kernel
    us: float
    dense_us: float
    sparse: Kernel | None = None
    sparse_us: float | None = None
    note: str = ""


def choose(layer: Layer, x: Tensor, sparse: bool) -> Choice:
    """Time the kernels for `layer` on `x`; only the dense one if not `sparse` or hardly sparse."""
    dense = dense_kernel(layer)
    if not sparse or layer.sparsity < WORTH_PACKING:
        (us,) = time_us([dense], x)
        return Choice(layer, tuple(x.shape), dense, us, us)
    try:
        candidate = sparse_kernel(layer)
        wrong = difference(layer, x, dense(x), candidate(x))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        wrong = f"refused: {error}"
    if wrong:
        return replace(choose(layer, x, False), note=f"{layer.name}: sparse kernel {wrong}")
    dense_us, sparse_us = time_us([dense, candidate], x)
    fastest, us = (candidate, sparse_us) if sparse_us < dense_us else (dense, dense_us)
    return Choice(layer, tuple(x.shape), fastest, us, dense_us, candidate, sparse_us)


def as_dense(choice: Choice) -> Choice:
    """`choice` with the dense kernel instead."""
    return replace(choice, kernel=dense_kernel(choice.layer), us=choice.dense_us)


def time_us(candidates: list[Kernel], x: Tensor, seconds: float = SECONDS) -> list[float]:
    """Median microseconds of each candidate on `x`, timed turn by turn for so long."""
    calls = [lambda kernel=kernel: kernel(x) for kernel in candidates]
    return [taken * 1e6 for taken in interleaved(calls, seconds, ROUNDS)]


def difference(layer: Layer, x: Tensor, expected: Tensor, result: Tensor) -> str:
    """Why `result` is not `expected` within float32 rounding, or "" where it is."""
    if result.shape != expected.shape:
        return f"gave shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    excess = (result - expected).abs() - rounding_bound(layer, x)
    if bool((excess <= 0).all()):
        return ""
    return f"differs from dense by up to {float((result - expected).abs().max()):.3g}"


def close(result: Tensor, expected: Tensor) -> bool:
    """Whether two results of many layers agree within float32 rounding."""
    if result.shape != expected.shape:
        return False
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(result, expected, rtol=1e-4, atol=1e-4 * scale)
