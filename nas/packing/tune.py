"""Choosing the kernel of a layer among all that compute the same, by times measured once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels import measured
from nas.latency import interleaved
from nas.packing import devices
from nas.packing.layer import Kernel, Layer, dense_kernel, sparse_kernel

WORTH_PACKING = 0.1
SECONDS = 0.006
ROUNDS = 7
LINE = 160  # characters of a reason


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
        earlier: whether the times were not taken now but earlier, of a layer like this one.
    """

    layer: Layer
    shape: tuple[int, ...]
    kernel: Kernel
    us: float
    dense_us: float
    sparse: Kernel | None = None
    sparse_us: float | None = None
    note: str = ""
    earlier: bool = False


def choose(layer: Layer, x: Tensor, sparse: bool, anew: bool = False) -> Choice:
    """The fastest kernel for `layer` on `x`, the sparse one checked each time.

    Args:
        layer: the layer.
        x: its input.
        sparse: whether its sparse kernel is tried, where its weight is worth it.
        anew: whether kernels are timed although they were, on this device for such a layer.
    """
    dense = dense_kernel(layer, x.dim())
    if not sparse or layer.sparsity < WORTH_PACKING:
        (us,), earlier = _timed(layer, [dense], x, anew)
        return Choice(layer, tuple(x.shape), dense, us, us, earlier=earlier)
    device, wrong = devices.of(x), ""
    try:
        candidate = device.offered(sparse_kernel(layer), layer, x, anew)
        if candidate is not None:
            wrong = device.difference(layer, x, candidate(x))
    except Exception as error:  # whatever a kernel cannot do, dense can; a note says why
        candidate, wrong = None, f"refused: {_briefly(error)}"
    if candidate is None or wrong:
        note = f"{layer.name}: sparse kernel {wrong}" if wrong else ""
        return replace(choose(layer, x, False, anew), note=note)
    (dense_us, sparse_us), earlier = _timed(layer, [dense, candidate], x, anew)
    fastest, us = (candidate, sparse_us) if sparse_us < dense_us else (dense, dense_us)
    both = (dense_us, candidate, sparse_us)
    return Choice(layer, tuple(x.shape), fastest, us, *both, earlier=earlier)


def as_dense(choice: Choice) -> Choice:
    """`choice` with the dense kernel instead."""
    dense = dense_kernel(choice.layer, len(choice.shape))
    return replace(choice, kernel=dense, us=choice.dense_us)


def _timed(
    layer: Layer, candidates: list[Kernel], x: Tensor, anew: bool
) -> tuple[list[float], bool]:
    """Microseconds of each candidate, and whether they were measured earlier."""
    names, times = [kernel.name for kernel in candidates], measured.times(x.device)
    case = layer.case(x, packed=len(candidates) > 1)
    known = None if anew else times.of(case, names)
    if known is not None:
        return [known[name] for name in names], True
    us = time_us(candidates, x)
    times.put(case, dict(zip(names, us, strict=True)))
    return us, False


def time_us(candidates: list[Kernel], x: Tensor, seconds: float = SECONDS) -> list[float]:
    """Median microseconds of each candidate on `x`, timed turn by turn for so long."""
    calls = [lambda kernel=kernel: kernel(x) for kernel in candidates]
    device = devices.of(x)
    times = interleaved(calls, seconds, ROUNDS, device.kind, device.cold)
    return [taken * 1e6 for taken in times]


def _briefly(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if len(line) <= LINE else f"{line[: LINE - 3]}..."


def close(result: Tensor, expected: Tensor) -> bool:
    """Whether two results of many layers agree within float32 rounding."""
    if result.shape != expected.shape:
        return False
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return torch.allclose(result, expected, rtol=1e-4, atol=1e-4 * scale)
