"""Whether a packed network gives what its module gives, on other batches too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nas.attention import slow_attention
from nas.packing import devices
from nas.packing.network import PackedNetwork
from nas.packing.trace import Untraceable, batch_of, batched

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the largest output
FLOAT32 = 1e-3
FURTHER = 4.0  # than the module lies from the truth a packed network may lie from the module
SAME = 0.9  # of what is no float, where floats are narrow: two that are close may change places


def call(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Call `module` on clones (it may write into its inputs), attention not fused."""
    with slow_attention():
        return module(*(tensor.clone() for tensor in inputs))


def verify(network: PackedNetwork, plain: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Raise Untraceable where the graph does not hold for other batches than the traced one."""
    dtype = next((x.dtype for x in example if x.is_floating_point()), torch.float32)
    wide = devices.of(example[0]).wider(plain, dtype)
    for inputs in _batches(example):
        try:
            expected = tree_leaves(call(plain, inputs))
        except Exception:  # the module itself refuses this batch: then nothing is to be matched
            continue
        apart = [None] * len(expected) if wide is None else _apart(wide, inputs, expected)
        results = tree_leaves(call(network, inputs))
        for result, right, further in zip(results, expected, apart, strict=True):
            if not _same(result, right, further):
                batch = batch_of(inputs)
                raise Untraceable(f"the traced graph gives another output at batch {batch}")


def _batches(example: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    yield example
    carries = batched(example)
    parts = list(zip(example, carries, strict=True))
    if batch_of(example) > 1:
        yield tuple(x[:1] if carried else x for x, carried in parts)
    yield tuple(torch.cat([x, x[:1]]) if carried else x for x, carried in parts)


def _apart(wide: nn.Module, inputs: tuple[Tensor, ...], expected: list[Any]) -> list[float | None]:
    """How far each output lies from that of a more precise module; 0 where that cannot be told."""
    dtype = next((p.dtype for p in wide.parameters() if p.is_floating_point()), torch.float64)
    given = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    try:
        true = tree_leaves(call(wide, given))
    except Exception:  # it insists on its dtype
        return [0.0] * len(expected)
    return [_furthest(*pair) for pair in zip(expected, true, strict=True)]


def _furthest(result: Any, right: Any) -> float:
    if not isinstance(result, Tensor) or not result.is_floating_point() or not result.numel():
        return 0.0
    apart = (result.double() - right.double()).abs()
    return float(apart.nan_to_num(0.0, 0.0, 0.0).max())


def _same(result: Any, right: Any, apart: float | None) -> bool:
    """Whether `result` is `right`, which lies so far from the truth; None: as float32 does."""
    if not isinstance(right, Tensor):
        return bool(result == right)
    if (result.shape, result.dtype) != (right.shape, right.dtype):
        return False
    if apart is not None and not right.is_floating_point():
        return int((result == right).sum()) >= SAME * right.numel()
    return _close(result, right, FURTHER * (apart or 0.0))


def _close(result: Tensor, right: Tensor, slack: float) -> bool:
    tolerance = TOLERANCE.get(right.dtype, FLOAT32)
    result, right = result.double(), right.double()
    finite = right[right.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    within = max(tolerance * scale, slack)
    return torch.allclose(result, right, tolerance, within, equal_nan=True)
