"""Measuring which kernel is the fastest for a packed weight: see `kernels.tune`."""

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import measured
from kernels.cuda import blob, clock, conv2d, linear, table
from kernels.cuda.blocks import CONV2D, Blocks
from kernels.cuda.rounding import bound
from kernels.window import Window

ROUNDS = 15
_CHECKED = 2048  # tokens or pixels at the beginning, and as many at the end
_log = logging.getLogger("kernels")


@dataclass(frozen=True)
class Problem:
    """A weight, and what it is applied to.

    Attributes:
        blocks: the weight.
        conv: whether it is that of a convolution which is more than a product.
        x: (tokens, channels), or (N, C, H, W).
        key: what it is looked up by.
        case: its name in `kernels.measured`.
        calls: by the name of a kernel, each of those that take it.
        true: gives the result in float64 for some x like this.
    """

    blocks: Blocks
    conv: bool
    x: Tensor
    key: Hashable
    case: str
    calls: Mapping[str, Callable[[], Tensor]]
    true: Callable[[Tensor], Tensor]


def tune(data: Tensor, x: Tensor, anew: bool = False, pairs: Any = ()) -> dict[str, float]:
    """See `kernels.tune`; `data` are the bytes of the packed weight, `pairs` a convolution's."""
    blocks = blob.read(data)
    linear.check("tune", x, blocks, None)
    wide = blocks.channels // blocks.form.taps * blocks.form.groups
    conv = blocks.form.operation == CONV2D
    if (
        not x.numel()
        or (x.dim() != 4 if conv else x.dim() < 1)
        or x.shape[1 if conv else -1] != wide
    ):
        law = f"(N, {wide}, H, W)" if conv else f"(..., {wide})"
        raise ValueError(f"tune: x must be {law}, not empty, got {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("tune: x must be finite, so that results can be checked")
    problem = (
        _convolution(blocks, x, Window(blocks.form.kernel, *pairs))
        if conv
        else _product(blocks, x)
    )
    times = measured.times(x.device)
    us = None if anew else times.of(problem.case, problem.calls)
    if us is None:
        here: Any = torch.cuda.device_of
        with here(x), torch.no_grad():
            us = _measure(problem)
        if us.keys() == problem.calls.keys():  # what failed is tried again by the next process
            times.put(problem.case, us)
            times.keep()
    if us:
        table.put(blocks, problem.key, min(us, key=us.__getitem__))
    return dict(us)


def _product(blocks: Blocks, x: Tensor) -> Problem:
    tokens = linear.aligned(x.reshape(-1, blocks.channels))
    names = [name for name in linear.KERNELS if linear.takes(name, blocks, tokens)]
    calls = {n: partial(linear.compute, n, blocks, tokens, None, "none") for n in names}
    case, weight = table.linear_case(blocks, len(tokens)), blob.unpack(blocks).double()
    key, true = table.bucket(len(tokens)), partial(F.linear, weight=weight)
    return Problem(blocks, False, tokens, key, case, calls, true)


def _convolution(blocks: Blocks, x: Tensor, window: Window) -> Problem:
    if conv2d.is_product(blocks, window):
        return _product(blocks, conv2d.pixels(x))
    last = x.contiguous(memory_format=torch.channels_last)
    out = conv2d.shape_of(blocks, last, window)
    calls = {
        name: partial(conv2d.compute, name, blocks, last, None, window, out)
        for name in conv2d.takers(blocks)
    }
    weight = blocks.form.weight(blob.unpack(blocks)).double()
    true = partial(_convolved, weight, window, blocks.form.groups)
    case = table.conv2d_case(blocks, tuple(x.shape), window)
    return Problem(blocks, True, last, conv2d.key(last, window), case, calls, true)


def _convolved(weight: Tensor, window: Window, groups: int, x: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, *window.pairs, groups)


def _measure(problem: Problem) -> dict[str, float]:
    """Microseconds of each kernel that takes this case and is right, each called by itself."""
    some, right = _some(problem), {}
    true = problem.true(some(problem.x).double())
    for kernel, call in problem.calls.items():
        try:
            _check(call, some, true, bound(problem.x.dtype, problem.conv))
            right[kernel] = call
        except Exception as error:  # a kernel that cannot run here, whatever the reason
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _log.warning("tune: %s is left out: %s", kernel, reason)
    del true
    return dict(zip(right, clock.in_turn_us(list(right.values()), ROUNDS), strict=True))


def _some(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Takes the first tokens or images and the last: in float64 all of them may be too many."""
    each = problem.x[0].numel() // problem.x.shape[1]
    count = max(1, _CHECKED // max(1, each))

    def some(x: Tensor) -> Tensor:
        return x if len(x) <= 2 * count else torch.cat([x[:count], x[-count:]])

    return some


def _check(
    call: Callable[[], Tensor], some: Callable[[Tensor], Tensor], true: Tensor, within: float
) -> None:
    first = call()  # lives on, so that its memory, and what is right in it, is nobody's
    poison = torch.full_like(first, float("nan"))
    del poison  # the allocator gives its memory to the result
    y = some(call()).double()
    apart, most = float((y - true).norm()), within * float(true.norm())
    if not apart <= most:  # nor if it is NaN
        raise ValueError(f"its result lies {apart:.3g} from the true one, {most:.3g} are allowed")
