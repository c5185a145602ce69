"""How long calls take on a GPU: graphs that are replayed, between two events."""

import gc
import logging
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
_log = logging.getLogger("kernels")
_FLUSHED = 2**28  # bytes that are read so that nothing else is left in the caches


def replayed(call: Call, pool: Any = None) -> Call:
    """A call that replays a graph of what `call` does; `call` itself where none can be captured.

    The graph reads what `call` read where it was then: hold on to `call` as long.

    Args:
        call: what is captured.
        pool: memory that it shares with other graphs (`shared`), which write over its results.
    """
    here, side = torch.cuda.current_stream(), _side(torch.cuda.current_device())
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(2):  # kernels are loaded, and what PyTorch keeps for a stream is made
            call()
        torch.cuda.synchronize()
        graph = _captured(call, pool)
    here.wait_stream(side)
    return call if graph is None else graph.replay


def seconds(call: Call, repeat: int, cold: bool = False) -> float:
    """Mean seconds of so many calls; `cold`: none finds anything in the caches.

    Cold is how a layer finds its weight where the other layers' are more than the caches hold.
    """
    if cold:
        return sum(_between(call, 1, _flush) for _ in range(repeat)) / repeat
    return _between(call, repeat, torch.cuda.synchronize) / repeat


def shared() -> Any:
    """Memory that graphs may share, as none is replayed beside another."""
    return torch.cuda.graph_pool_handle()


def in_turn_us(calls: Sequence[Call], rounds: int) -> list[float]:
    """See `replays_us`, of graphs of these calls, cold."""
    return replays_us([replayed(call) for call in calls], rounds, cold=True)


def replays_us(replays: Sequence[Call], rounds: int, cold: bool) -> list[float]:
    """Median microseconds of each replay in so many rounds of all of them.

    Args:
        replays: what is timed.
        rounds: an odd number, so that a median is one of them.
        cold: whether caches hold nothing of it; else each comes behind itself.
    """
    for replay in replays:
        seconds(replay, 1, cold=True)
    times: list[list[float]] = [[] for _ in replays]
    for _ in range(rounds):
        for series, replay in zip(times, replays, strict=True):
            series.append(_between(replay, 1, _flush if cold else replay) * 1e6)
    return [statistics.median(series) for series in times]


def _captured(call: Call, pool: Any) -> torch.cuda.CUDAGraph | None:
    """A graph of the call on this stream, which is not the default one; None where it cannot be.

    As `torch.cuda.graph` does, which first collects garbage and empties PyTorch's cache: a tenth
    of a second for each layer. No garbage is collected meanwhile: another graph among it would end
    this one.
    """
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()
    try:
        graph.capture_begin(pool, capture_error_mode="thread_local")
        call()
        graph.capture_end()
    except Exception as error:  # whatever it is, the call by itself will say it, or run
        _log.warning("timed call by call, no graph captures it: %s", error)
        for end in (graph.capture_end, torch.cuda.synchronize):
            with suppress(RuntimeError):
                end()
        return None
    finally:
        if collects:
            gc.enable()
    return graph


def _between(call: Call, repeat: int, before: Call) -> float:
    event: Any = torch.cuda.Event
    begun, ended = event(enable_timing=True), event(enable_timing=True)
    before()
    begun.record()
    for _ in range(repeat):
        call()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3


def _flush() -> None:
    """Also keeps the GPU busy until what is timed was asked for.

    It reads: lines that were written would have to go back to memory while what is timed runs.
    """
    _scratch(torch.cuda.current_device()).sum()


@cache
def _scratch(device: int) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode
        return torch.zeros(_FLUSHED // 4, device=f"cuda:{device}")


@cache
def _side(device: int) -> Any:
    stream: Any = torch.cuda.Stream
    return stream(device)
