"""Measuring by which way a layer of blocks trains the fastest: see `BlockLayer.tune`."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from kernels import measured
from kernels.block_index import BlockIndex, gather, is_whole, scatter, whole_of
from kernels.block_layer import BlockLayer
from kernels.cuda import clock, ways, whole_grad
from kernels.cuda.blocks import DTYPES
from kernels.cuda.rounding import bound
from kernels.cuda.ways import WAYS, Case, Way

ROUNDS = 21  # ways are often within a few per cent of each other
_LONG, _MOST = 4e10, 32  # FLOP of a product of which one step is measured; more of fewer
_LOCK = threading.Lock()  # steps are forced to go a way while they are captured
_log = logging.getLogger("kernels")


@dataclass(frozen=True)
class Problem:
    """A layer and a step of its training.

    Attributes:
        layer: of blocks.
        case: what its times go by.
        x: an input that takes a gradient.
        grad: of the output.
        forms: the values as blocks (False) and whole (True).
        names: of the ways that there are.
    """

    layer: BlockLayer
    case: Case
    x: Tensor
    grad: Tensor
    forms: Mapping[bool, Tensor]
    names: Sequence[str]

    def step(self, way: Way) -> list[Tensor]:
        """The output, and gradients of x and of the values."""
        with ways.forced(self.case, way):
            return _step(self.layer, self.forms[way.whole], self.x, self.grad)


def tune(layer: BlockLayer, x: Tensor, anew: bool) -> tuple[Tensor, dict[str, float]]:
    """See `BlockLayer.tune`; gives the values too, as the fastest way holds them."""
    if not x.numel() or not bool(x.isfinite().all()):
        raise ValueError(
            "tune: x must not be empty, and finite, so that results can be checked, got "
            f"{tuple(x.shape)}"
        )
    here: Any = torch.cuda.device_of
    with _LOCK, torch.inference_mode(False), here(x):
        problem = problem_of(layer, x.clone() if x.is_inference() else x)
        case, us = problem.case, ways.times(problem.case)
        if anew or us.keys() != set(problem.names):  # what failed is tried again
            us = _measure(problem)
            ways.put(case, us)
            if us.keys() == set(problem.names):
                kept = measured.times(x.device)
                kept.put(case.name(), us)
                kept.keep()
        way = ways.fastest(case)
        whole = is_whole(layer.values) if way is None else way.whole
        return problem.forms[whole], dict(us)


def problem_of(layer: BlockLayer, x: Tensor) -> Problem:
    """A step of a layer with such an input; raises as `BlockLayer.tune`."""
    index, window = layer.index, getattr(layer, "window", None)
    with torch.no_grad():
        y = layer(x)
        kept = gather(scatter(layer.values, index), index)
        forms = {False: kept, True: whole_of(kept, index)}
    if y.dtype not in DTYPES:
        raise ValueError(f"tune: what is multiplied must be one of {[*DTYPES]}, got {y.dtype}")
    case = ways.case_of(index, y.dtype, y.numel() // index.out_features, window)
    names = [name for name, way in WAYS.items() if _takes(way, index, case)]
    draw = torch.Generator(y.device).manual_seed(0)
    grad = torch.empty_like(y).normal_(0, case.tokens**-0.5, generator=draw)  # sums stay small
    return Problem(layer, case, x.detach().requires_grad_(), grad, forms, names)


def _takes(way: Way, index: BlockIndex, case: Case) -> bool:
    """Whether there is such a way."""
    if way.searched:
        return case.window is not None and case.dtype.itemsize == 2
    one = case.window is None and whole_grad.takes(index, case.dtype)  # kernel that gives zeros
    return one or not (way.fused or way.joined)


def _measure(problem: Problem) -> dict[str, float]:
    """Microseconds of a step by each way that is right."""
    wide = [part.detach().double() for part in (problem.forms[False], problem.x, problem.grad)]
    true = _step(problem.layer, wide[0], wide[1].requires_grad_(), wide[2])
    flop = 2.0 * problem.case.tokens * problem.case.rows * problem.case.columns
    count, pool, replays = min(_MOST, 1 + int(_LONG / flop)), clock.shared(), {}
    for name in problem.names:
        try:
            replays[name] = _replay(problem, WAYS[name], count, pool, true)
        except Exception as error:  # a way that cannot run here, whatever the reason
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _log.warning("tune: %s is left out: %s", name, reason)
    del true, wide
    us = clock.replays_us(list(replays.values()), ROUNDS, cold=False)
    return {name: taken / count for name, taken in zip(replays, us, strict=True)}


def _replay(
    problem: Problem, way: Way, count: int, pool: Any, true: Sequence[Tensor]
) -> Callable[[], object]:
    """Replays so many steps; raises where they cannot be captured, or the last one is wrong."""
    held: list[Tensor] = []

    def steps() -> None:
        for _ in range(count):
            held[:] = problem.step(way)

    replay = clock.replayed(steps, pool)
    if replay is steps:
        raise ValueError("no graph captures it")
    for part in held:
        part.fill_(float("nan"))
    replay()
    whole = is_whole(held[2])
    wanted = [*true[:2], whole_of(true[2], problem.layer.index) if whole else true[2]]
    for part, is_true in zip(held, wanted, strict=True):
        within = bound(problem.case.dtype, problem.case.window is not None)
        apart, most = float((part - is_true).norm()), within * float(is_true.norm())
        if not apart <= most:  # nor if it is NaN
            raise ValueError(f"a result lies {apart:.3g} from the true one, {most:.3g} allowed")
    return replay


def _step(layer: BlockLayer, values: Tensor, x: Tensor, grad: Tensor) -> list[Tensor]:
    given = values.detach().requires_grad_()
    held = {"values": given}
    if layer.bias is not None:
        held["bias"] = layer.bias.detach().to(x.dtype)
    with torch.enable_grad():
        y = functional_call(layer, held, (x,))
        return [y.detach(), *torch.autograd.grad(y, [x, given], grad)]
