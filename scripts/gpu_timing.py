"""What the GPU benchmarks share: replayed graphs in turn, rows, and what the card can do."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nas.latency import no_gc

Call = Callable[[], Any]
Make = Callable[[Tensor], Call]  # from a copy of the masked weight
ROTATED = 240e6  # bytes of copies of a weight that run in turn, so that each comes from memory
MOST = 256  # copies
ROUNDS, REPLAYS = 11, 4
BEHIND = 0.97  # times dense
PEER_CALLS = 4  # of another's kernel in a graph: some are a hundred times slower
HEAD = (
    f"{'operation':24} {'shape':30} {'pattern':12} {'zeros':>5} {'us':>8} {'dense us':>8} "
    f"{'ratio':>6} {'limit':>6} {'TB/s':>5} {'TFLOP/s':>7}  kernel, peers in us"
)


@dataclass(frozen=True)
class Card:
    """What the card reached: a copy of 1 GiB, a product of 8192^3, a kernel that does nothing."""

    name: str
    copy_bytes_per_s: float
    matrix_flop_per_s: float
    empty_us: float
    torch: str


@dataclass(frozen=True)
class Work:
    """A case, checked and ready to be timed.

    Attributes:
        operation: `linear`, `conv2d`, ...
        shape: in words.
        pattern: of the zeros.
        sparsity: asked for.
        correct: whether the result was right.
        kernel: that the operator takes.
        weight: masked and dense, of which the contenders are made.
        calls: a graph's calls for each contender, each on a copy of its own.
        ours: makes our call.
        dense: makes PyTorch's.
        peers: others, by name.
        bytes: of weights and activations that are left.
        flop: two for a multiply-add that is left.
        pack_ms: how long packing took.
        peer_calls: a graph's calls for each peer.
    """

    operation: str
    shape: str
    pattern: str
    sparsity: float
    correct: bool
    kernel: str
    weight: Tensor
    calls: int
    ours: Make
    dense: Make
    peers: dict[str, Make]
    bytes: float
    flop: float
    pack_ms: float | None = None
    peer_calls: int = PEER_CALLS


@dataclass(frozen=True)
class Row:
    """A case and what was measured, microseconds a call in a replayed graph.

    Of several measurements the middle one; `ratios` are those of all.
    """

    operation: str
    shape: str
    pattern: str
    sparsity: float
    correct: bool
    kernel: str = ""
    us: float | None = None
    dense_us: float | None = None
    peers_us: dict[str, float] | None = None
    limit_us: float | None = None
    ratio: float | None = None
    bytes_per_s: float | None = None
    flop_per_s: float | None = None
    pack_ms: float | None = None
    ratios: tuple[float, ...] = ()


def card() -> Card:
    """Measures the card."""
    copied, matrix = torch.randn(2**28, device="cuda"), torch.randn(8192, 8192, device="cuda")
    to, matrix = torch.empty_like(copied), matrix.bfloat16()
    nothing = torch.empty(1, device="cuda")
    copies = graph([lambda: to.copy_(copied)]), graph([lambda: torch.add(copied, 1, out=to)])
    product, *ways = us([graph([lambda: matrix @ matrix]), *copies])
    copy = min(ways)
    empty = us([graph([nothing.zero_ for _ in range(100)])])[0] / 100
    rates = 2 * copied.nbytes / copy * 1e6, 2 * 8192**3 / product * 1e6
    return Card(torch.cuda.get_device_name(), *rates, empty, torch.__version__)


def measure(work: Work, on: Card) -> Row:
    """Times a case against dense and its peers; a wrong result gets no time."""
    named = (work.operation, work.shape, work.pattern, work.sparsity, work.correct)
    if not work.correct:
        return Row(*named)
    makes = {"ours": work.ours, "dense": work.dense, **work.peers}
    most = {name: work.calls if name in ("ours", "dense") else work.peer_calls for name in makes}
    like = _alone(work.ours(work.weight)())
    turns = {n: turn for n, make in makes.items() if (turn := _turn(make, work, most[n], like))}
    times = us([turn[0] for turn in turns.values()])
    each = {n: t / len(turns[n][1]) for n, t in zip(turns, times, strict=True)}
    ours, dense = each.pop("ours"), each.pop("dense")
    least = max(work.bytes / on.copy_bytes_per_s, work.flop / on.matrix_flop_per_s) * 1e6
    return Row(
        *named,
        work.kernel,
        ours,
        dense,
        each,
        on.empty_us + least,
        dense / ours,
        work.bytes / ours * 1e6,
        work.flop / ours * 1e6,
        work.pack_ms,
    )


def settled(make: Callable[[], Work], on: Card) -> Row:
    """Times a case; where it seems to be behind dense twice more, made anew: their middle.

    One in a hundred that are as fast as dense seems behind: where copies lie counts by 3 %.
    """
    rows = [measure(make(), on)]
    if (rows[0].ratio or 1) < BEHIND:
        rows += [measure(make(), on) for _ in range(2)]
    wrong = [row for row in rows if row.ratio is None]
    ratios = tuple(row.ratio for row in rows if row.ratio is not None)
    found = sorted(rows, key=lambda row: row.ratio or 0)[len(rows) // 2]
    return wrong[0] if wrong else replace(found, ratios=ratios)


def _turn(make: Make, work: Work, most: int, like: Tensor | None) -> Any:
    """A graph of calls on copies of the weight in turn, and the calls; None: it has no time."""
    try:
        first = make(work.weight)
        if like is not None and not _agree(first(), like):
            raise ValueError("it gives another result")
        calls = [first, *(make(work.weight.clone()) for _ in range(min(work.calls, most) - 1))]
        return graph(calls), calls  # a graph reads the copies, so that they must live on
    except (RuntimeError, NotImplementedError, ValueError) as error:
        print(f"  left out: {str(error).splitlines()[0][:90]}")
        torch.cuda.synchronize()
        return None


def _alone(result: Any) -> Tensor | None:
    """What others are compared with; None of a training step, whose graph must not be kept."""
    return result if isinstance(result, Tensor) else None


def _agree(found: Tensor, like: Tensor) -> bool:
    """Whether results are the same, perhaps transposed."""
    ways = (way for way in (found, found.mT) if way.shape == like.shape)
    return any(close(way, like.double()) for way in ways)


def rotated(weight: Tensor) -> int:
    """How many copies of a masked weight of two bytes do not fit into a cache together.

    Of a weight so small that it is `MOST` only, which may stay there.
    """
    return min(MOST, max(2, int(ROTATED / (2 * int(weight.count_nonzero()) + 1))))


def graph(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of these calls, replayed once."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    gc.collect()
    made = torch.cuda.CUDAGraph()
    with no_gc(), torch.cuda.graph(made):  # another graph among the garbage would end this one
        for call in calls:
            call()
    made.replay()
    torch.cuda.synchronize()
    return made


def us(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Median microseconds of a replay of each, in turn, behind one that is not timed.

    So that what ran before counts alike: behind a slow peer all are 1 % slower.
    """
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(ROUNDS):
        for series, made in zip(times, graphs, strict=True):
            begun, ended = events()
            made.replay()
            begun.record()
            for _ in range(REPLAYS):
                made.replay()
            ended.record()
            ended.synchronize()
            series.append(begun.elapsed_time(ended) * 1e3 / REPLAYS)
    return [statistics.median(series) for series in times]


def events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Two that take times."""
    event: Any = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)


def milliseconds(call: Call) -> tuple[Any, float]:
    """What a call gives, and how long the GPU was at it."""
    begun, ended = events()
    begun.record()
    result = call()
    ended.record()
    ended.synchronize()
    return result, begun.elapsed_time(ended)


def line(row: Row) -> str:
    """A row of the printed table."""
    name = f"{row.operation:24} {row.shape:30} {row.pattern:12} {row.sparsity:5.2f} "
    if row.us is None or row.limit_us is None:
        return f"{name} WRONG"
    peers = ", ".join(f"{name} {us:.1f}" for name, us in (row.peers_us or {}).items())
    return (
        f"{name}{row.us:8.2f} {row.dense_us:8.1f} {row.ratio:5.2f}x {row.limit_us / row.us:6.0%} "
        f"{(row.bytes_per_s or 0) / 1e12:5.2f} {(row.flop_per_s or 0) / 1e12:7.0f}  "
        f"{row.kernel}; {peers}"
    )


def close(y: Tensor, true: Tensor) -> bool:
    """Whether a bfloat16 result is right: rounding is 4e-3."""
    return bool((y.double() - true).norm() <= 1e-2 * true.norm())


def block_mask(shape: tuple[int, ...], side: int, sparsity: float) -> Tensor:
    """A mask of square blocks of (out, in), at each kernel position."""
    drawn = torch.rand(shape[0] // side, shape[1] // side, *shape[2:], device="cuda")
    kept = round((1 - sparsity) * drawn.numel())
    chosen = drawn.flatten().argsort()[:kept]
    grid = torch.zeros_like(drawn, dtype=torch.bool).flatten().index_fill_(0, chosen, True)
    grid = grid.view(drawn.shape)
    return grid.repeat_interleave(side, 0).repeat_interleave(side, 1)
