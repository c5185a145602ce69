"""Measuring which kernel is the fastest for a packed weight: see `kernels.tune`."""

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import measured
from kernels.cuda import blob, clock, linear, table

BOUND = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}  # of the norm
ROUNDS = 15
_CHECKED = 2048  # tokens at the beginning, and as many at the end
_log = logging.getLogger("kernels")


def tune(data: Tensor, x: Tensor, anew: bool = False) -> dict[str, float]:
    """See `kernels.tune`; `data` are the bytes of the packed weight."""
    blocks = blob.read(data)
    linear.check("tune", x, blocks, None)
    if not x.numel() or x.shape[-1] != blocks.channels:
        shape = tuple(x.shape)
        raise ValueError(f"tune: x must be (..., {blocks.channels}), not empty, got {shape}")
    tokens, times = linear.aligned(x.reshape(-1, blocks.channels)), measured.times(x.device)
    case = table.case(blocks, len(tokens))
    us = None if anew else times.of(case)
    if us is None:
        here: Any = torch.cuda.device_of
        with here(x), torch.no_grad():
            us = _measure(blocks, tokens)
        times.put(case, us)
        times.keep()
    if us:
        table.of(blocks)[table.bucket(len(tokens))] = min(us, key=us.__getitem__)
    return dict(us)


def _measure(blocks: blob.Blocks, x: Tensor) -> dict[str, float]:
    """Microseconds of each kernel that takes this case and is right, each called by itself."""
    right, true = {}, F.linear(_some(x).double(), blob.unpack(blocks).double())
    for kernel in linear.KERNELS:
        if linear.takes(kernel, blocks, x):
            call = partial(linear.compute, kernel, blocks, x, None, "none")
            try:
                _check(call, true)
                right[kernel] = call
            except Exception as error:  # a kernel that cannot run here, whatever the reason
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                _log.warning("tune: %s is left out: %s", kernel, reason)
    del true
    return dict(zip(right, clock.in_turn_us(list(right.values()), ROUNDS), strict=True))


def _some(x: Tensor) -> Tensor:
    """The first tokens and the last: in float64 all of them may be too many."""
    return x if len(x) <= 2 * _CHECKED else torch.cat([x[:_CHECKED], x[-_CHECKED:]])


def _check(call: partial[Tensor], true: Tensor) -> None:
    x = call.args[2]
    poison = x.new_full((len(x), true.shape[1]), float("nan"))
    del poison  # the allocator gives its memory to the result
    y = _some(call()).double()
    apart, bound = float((y - true).norm()), BOUND[x.dtype] * float(true.norm())
    if not apart <= bound:  # nor if it is NaN
        raise ValueError(f"its result lies {apart:.3g} from the true one, {bound:.3g} are allowed")
