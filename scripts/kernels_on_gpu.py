"""The GPU half of bench_kernels.py: sparse linear against PyTorch's dense and sparse kernels."""

from __future__ import annotations

import argparse
import json
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.cuda import blob
from kernels.cuda.linear import chosen

Call = Callable[[], Tensor]
Make = Callable[[Tensor], Call]  # from a copy of the masked weight
ROTATED = 240e6  # bytes of copies of a weight that run in turn, so that each comes from memory
ROUNDS, REPLAYS = 11, 4
WRONG = 1e-2  # bfloat16 rounds to 4e-3
HEAD = (
    f"{'tokens':>6} {'weight':>11} {'pattern':12} {'zeros':>5} {'us':>8} {'dense us':>8} "
    f"{'ratio':>6} {'bsr us':>8} {'2:4 us':>8} {'csr us':>8} {'limit':>6} {'TB/s':>5} TFLOP/s"
)


@dataclass(frozen=True)
class Case:
    """A square linear layer in bfloat16; block 0: unstructured, -4: two of four are kept."""

    tokens: int
    size: int
    block: int
    sparsity: float

    @property
    def pattern(self) -> str:
        """As rows of the table name it."""
        names = {0: "unstructured", -4: "2:4"}
        return names.get(self.block, f"{self.block}x{self.block}")


@dataclass(frozen=True)
class Row:
    """A case and what was measured, microseconds a call in a replayed graph."""

    tokens: int
    size: int
    pattern: str
    sparsity: float
    correct: bool
    kernel: str = ""
    us: float | None = None
    dense_us: float | None = None
    bsr_us: float | None = None
    two_of_four_us: float | None = None
    csr_us: float | None = None
    limit_us: float | None = None
    ratio: float | None = None
    bytes_per_s: float | None = None
    flop_per_s: float | None = None
    pack_ms: float | None = None


@dataclass(frozen=True)
class Card:
    """What the card reached: a copy of 1 GiB, a product of 8192^3, a kernel that does nothing."""

    name: str
    copy_bytes_per_s: float
    matrix_flop_per_s: float
    empty_us: float
    torch: str


def cases(sparsities: Sequence[float]) -> Iterator[Case]:
    """Those of docs/kernels.md, each at these sparsities."""
    shapes = [(t, n, b) for n in (4096, 8192) for t in (1, 16) for b in (64, 0)]
    shapes += [(8192, n, b) for n in (4096, 8192) for b in (64, 128)]
    shapes += [(2048, 4096, 64), (2048, 4096, 128)]
    for tokens, size, block in shapes:
        for sparsity in sparsities:
            yield Case(tokens, size, block, sparsity)
    for tokens, size in ((1, 4096), (16, 4096), (2048, 4096), (8192, 4096), (8192, 8192)):
        yield Case(tokens, size, -4, 0.5)


def run(args: argparse.Namespace) -> int:
    """Measures every case and prints one row each; 1 if a result was wrong."""
    from scripts import training_on_gpu  # which measures by what is here

    warnings.filterwarnings("ignore")  # torch's sparse kernels say that they are in beta
    torch.manual_seed(0)
    card, rows = _card(), list[Row]()
    print(card, HEAD, sep="\n", flush=True)
    for row in chain(_products(args, card), training_on_gpu.rows(args, card)):
        rows.append(row)
        print(_line(row), flush=True)
        if args.json:  # after every row: time on such a machine may end
            found = {"card": asdict(card), "rows": [asdict(row) for row in rows]}
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row.correct for row in rows) else 1


def _products(args: argparse.Namespace, card: Card) -> Iterator[Row]:
    for case in cases(args.sparsity):
        if args.only in f"{case.tokens} {case.size} {case.pattern}":
            with torch.inference_mode():
                row = _measure(case, card)
            yield row


def _card() -> Card:
    copied, matrix = torch.randn(2**28, device="cuda"), torch.randn(8192, 8192, device="cuda")
    to, matrix = torch.empty_like(copied), matrix.bfloat16()
    nothing = torch.empty(1, device="cuda")
    copy = median_us([graph_of([lambda: to.copy_(copied)])])[0]
    product = median_us([graph_of([lambda: matrix @ matrix])])[0]
    empty = median_us([graph_of([nothing.zero_ for _ in range(100)])])[0] / 100
    rates = 2 * copied.nbytes / copy * 1e6, 2 * 8192**3 / product * 1e6
    return Card(torch.cuda.get_device_name(), *rates, empty, torch.__version__)


def _measure(case: Case, card: Card) -> Row:
    weight = _weight(case)
    x = torch.randn(case.tokens, case.size, device="cuda").bfloat16()
    begun, ended = _events()
    begun.record()
    packed = kernels.pack_linear(weight)
    ended.record()
    ended.synchronize()
    y = torch.ops.sparse_nas.sparse_linear(x, packed.data, None, case.size)
    true = F.linear(x.double(), weight.double())
    correct = bool((y.double() - true).norm() <= WRONG * true.norm())
    named = (case.tokens, case.size, case.pattern, case.sparsity, correct)
    if not correct:
        return Row(*named)
    contenders = _contenders(case, x, packed.data)
    turns = [_in_turn(make, weight, x, case.tokens) for make in contenders]
    times = iter(median_us([turn[0] for turn in turns if turn]))
    us, dense, bsr, two_of_four, csr = (next(times) / t[1] if t else None for t in turns)
    assert us is not None and dense is not None
    kept = int(weight.count_nonzero())
    size, flop = 2 * kept + x.nbytes + y.nbytes, 2.0 * kept * case.tokens
    least = max(size / card.copy_bytes_per_s, flop / card.matrix_flop_per_s) * 1e6
    return Row(
        *named,
        chosen(blob.read(packed.data), x),
        us,
        dense,
        bsr,
        two_of_four,
        csr,
        card.empty_us + least,
        dense / us,
        size / us * 1e6,
        flop / us * 1e6,
        begun.elapsed_time(ended),
    )


def _weight(case: Case) -> Tensor:
    n = case.size
    weight = torch.randn(n, n, device="cuda").bfloat16()
    if case.block == -4:
        order = torch.rand(n, n // 4, 4, device="cuda").argsort(2)
        return weight * (order < 2).view(n, n)
    side = max(1, case.block)
    mask = torch.rand(n // side, n // side, device="cuda") >= case.sparsity
    return weight * mask.repeat_interleave(side, 0).repeat_interleave(side, 1)


def _contenders(case: Case, x: Tensor, packed: Tensor) -> list[Make | None]:
    """Ours, dense, block-sparse, two of four, compressed rows; None: does not apply."""
    bsr = case.block if case.block > 0 else 0
    return [
        lambda _: partial(_ours, x, packed.clone()),
        lambda w: partial(F.linear, x, w),
        (lambda w: partial(_product, w.to_sparse_bsr((bsr, bsr)), x)) if bsr else None,
        (lambda w: partial(F.linear, x, torch.sparse.to_sparse_semi_structured(w)))
        if case.block == -4
        else None,
        (lambda w: partial(_product, w.to_sparse_csr(), x)) if case.block == 0 else None,
    ]


def _ours(x: Tensor, data: Tensor) -> Tensor:
    return torch.ops.sparse_nas.sparse_linear(x, data, None, blob.read(data).rows)


def _product(weight: Tensor, x: Tensor) -> Tensor:
    return torch.mm(weight, x.t())


def _in_turn(make: Make | None, weight: Tensor, x: Tensor, tokens: int) -> Any:
    """A graph of calls on copies of the weight in turn, how many, and the calls; or None."""
    if make is None:
        return None
    try:
        first = make(weight)
        first()
        kept = int(weight.count_nonzero()) * 2
        count = max(2, int(ROTATED / kept)) if tokens <= 64 else 1
        calls = [first, *(make(weight.clone()) for _ in range(count - 1))]
        return graph_of(calls), count, calls  # a graph reads the copies, so that they must live on
    except (RuntimeError, NotImplementedError, ValueError) as error:
        print(f"  left out: {str(error).splitlines()[0][:90]}")
        torch.cuda.synchronize()
        return None


def graph_of(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph of calls one after another, replayed once."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def median_us(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[float]:
    """Median microseconds of a replay of each, in turn."""
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(ROUNDS):
        for series, graph in zip(times, graphs, strict=True):
            begun, ended = _events()
            begun.record()
            for _ in range(REPLAYS):
                graph.replay()
            ended.record()
            ended.synchronize()
            series.append(begun.elapsed_time(ended) * 1e3 / REPLAYS)
    return [statistics.median(series) for series in times]


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    event: Any = torch.cuda.Event
    return event(enable_timing=True), event(enable_timing=True)


def _line(row: Row) -> str:
    name = f"{row.tokens:6} {row.size:5}x{row.size:<5} {row.pattern:12} {row.sparsity:5.2f} "
    if row.us is None or row.limit_us is None:
        return f"{name} WRONG"
    peers = (row.bsr_us, row.two_of_four_us, row.csr_us)
    shown = " ".join(f"{'-' if us is None else format(us, '.1f'):>8}" for us in peers)
    return (
        f"{name}{row.us:8.2f} {row.dense_us:8.1f} {row.ratio:5.2f}x {shown} "
        f"{row.limit_us / row.us:6.0%} {(row.bytes_per_s or 0) / 1e12:5.2f} "
        f"{(row.flop_per_s or 0) / 1e12:7.0f} {row.kernel}"
    )
