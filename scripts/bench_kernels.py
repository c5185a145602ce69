"""Times the sparse kernels against PyTorch's dense ones; a wrong result gets no time.

Each case is checked against a float64 reference. Then run in turn, round by round: the kernel in
a program, activations in the program's own layout, timed in the C core; the operator called from
Python on NCHW; PyTorch's dense (NCHW, channels-last, oneDNN's own layout; the fastest counts) and
its CSR product, and ONNX Runtime's dense layer where it is installed (pip install onnx
onnxruntime). The limit is the core's: the larger of the multiply-adds left over its peak and
the bytes of non-zeros and activations over the bandwidth of a buffer of that size. Prints a table
and each class's geometric means, and writes JSON with --json. One thread is timed by its processor
time, so that other programs take nothing from the truth but cache; several by the clock.
"""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernels
from kernels.limits import limits
from kernels.native.library import library
from kernels.network import Graph, Step, X, Y, lanes, step_s, write
from scripts import options
from scripts.kernel_peers import Layer

Call = Callable[[], Tensor]
Clock = Callable[[int], float]  # seconds of so many calls
ROUNDS, ROUND_S = 25, 0.001
MARKS = (0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Case:
    """One layer: a linear where size is 0, else a convolution on size x size pixels."""

    kind: str
    batch: int
    inputs: int
    outputs: int
    size: int = 0
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        if not self.size:
            return f"{self.inputs} -> {self.outputs}, batch {self.batch}"
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return f"{self.inputs} -> {self.outputs}, {self.size}^2{stride}, batch {self.batch}"


@dataclass(frozen=True)
class Row:
    """One measurement; times are medians in microseconds, spreads interquartile ranges.

    Attributes:
        us: of the kernel, inside the core.
        call_us: of the operator, called from Python on NCHW.
        float32_us: of the kernel with weights stored in float32, where `us` is that of bfloat16.
        csr_us: of PyTorch's CSR product, where there is one.
        onnxruntime_us: of ONNX Runtime's dense layer, where it is installed.
        limit_us: the least that one core could take.
        ratio: dense_us / us.
    """

    kind: str
    shape: str
    pattern: str
    sparsity: float
    correct: bool
    us: float | None = None
    iqr_us: float | None = None
    call_us: float | None = None
    dense_us: float | None = None
    dense_iqr_us: float | None = None
    float32_us: float | None = None
    csr_us: float | None = None
    onnxruntime_us: float | None = None
    limit_us: float | None = None
    ratio: float | None = None

    def as_json(self) -> dict[str, object]:
        """The row with its layer's kind under `class`."""
        fields = asdict(self)
        return {"class": fields.pop("kind"), **fields}


POINTWISE = ((64, 56), (128, 28), (256, 14), (512, 14))
CASES = (
    *(Case("conv 1x1", 1, c, c, s) for c, s in POINTWISE),
    *(Case("conv 1x1 of DARTS", 1, c, c, s) for c, s in ((36, 32), (72, 16), (144, 8))),
    *(Case("conv 3x3 large", 1, c, c, s, 3) for c, s in ((64, 56), (128, 28))),
    *(
        Case("conv 3x3 small", b, c, c, s, 3)
        for b in (8, 16)
        for c, s in ((16, 32), (32, 16), (64, 8))
    ),
    Case("conv 3x3 stride 2", 1, 64, 128, 56, 3, 2),
    *(
        Case("depthwise", n, c, c, s, k, 1, c)
        for k in (3, 5)
        for n, c, s in ((1, 144, 28), (8, 36, 32))
    ),
    *(Case("linear, batch 1", 1, c, c) for c in (512, 1024, 2048, 4096)),
    *(Case("linear, batch 16", 16, c, c) for c in (512, 1024, 2048)),
    *(Case("linear, batch 128", 128, c, c) for c in (512, 1024)),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every case and prints one row each; 1 if a result was wrong."""
    args = _parse(arguments)
    if args.device == "cuda":
        from scripts import kernels_on_gpu

        return kernels_on_gpu.run(args)
    torch.set_num_threads(args.threads)
    machine = _machine(args.threads)
    print("  ".join(f"{key} {value}" for key, value in machine.items()))
    print(HEAD)
    rows = []
    with torch.inference_mode():
        for case, pattern, sparsity in _plan(args.sparsity, args.only):
            rows.append(_measure(case, pattern, sparsity))
            print(_line(rows[-1]), flush=True)
    print(*means(rows), sep="\n")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine, "rows": [row.as_json() for row in rows]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row.correct for row in rows) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=options.device, choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sparsity", type=float, nargs="+", default=list(MARKS))
    parser.add_argument("--only", default="", help="cases whose name holds this")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--drawn", type=int, default=0, help="so many cases of any shape (cuda)")
    either.add_argument("--training", type=int, default=0, help="so many that train (cuda)")
    parser.add_argument(
        "--tuned", action="store_true", help="those drawn or that train, by measurement"
    )
    parser.add_argument("--ways", action="store_true", help="those that train by each way, too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    for name, count in (("--drawn", args.drawn), ("--training", args.training)):
        if count < 0:
            parser.error(f"{name} must not be negative, got {count}")
        if count and args.device != "cuda":
            parser.error(f"{name} goes with --device cuda")
    if args.tuned and not args.drawn and not args.training:
        parser.error("--tuned goes with --drawn or --training")
    if args.ways and not args.training:
        parser.error("--ways goes with --training")
    return args


def _plan(sparsities: Sequence[float], only: str) -> Iterator[tuple[Case, str, float]]:
    for case in CASES:
        if case.groups > 1:
            if only in f"{case.kind} {case} dense":
                yield case, "dense", 0.0
            continue
        stored = ("bfloat16",) if case.kind == "linear, batch 1" else ()
        for pattern in ("unstructured", "4x1", *stored):
            for sparsity in sparsities:
                if only in f"{case.kind} {case} {pattern}":
                    yield case, pattern, sparsity


def _machine(threads: int) -> dict[str, str | int]:
    lib, cpu = library(), platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), cpu)
    isa = "torch" if lib is None else lib.isa
    clock = "thread" if threads == 1 else "wall"
    return {
        "cpu": cpu,
        "threads": threads,
        "torch": torch.__version__,
        "isa": isa,
        "clock": clock,
    }


def _measure(case: Case, pattern: str, sparsity: float) -> Row:
    torch.manual_seed(0)
    x, weight, bias = _tensors(case, pattern, sparsity)
    stored = weight.bfloat16() if pattern == "bfloat16" else weight
    call, inside = _sparse(case, x, stored, bias), _inside(case, x, stored, bias)
    own = [] if stored is weight else [_inside(case, x, weight, bias).clock]
    layer = Layer(x, weight, bias, case.stride, case.groups)
    dense, csr, ort = layer.dense(), layer.csr(), layer.onnxruntime()
    results = [call(), inside.result()]
    if not all(_correct(case, x, weight, bias, y) for y in results):
        return Row(case.kind, str(case), pattern, sparsity, False)
    clocks = [inside.clock, _clock(call), *own, *map(_clock, [*csr, *ort, *dense])]
    times = [_median_iqr(series) for series in _interleave(clocks)]
    us, iqr = times[0]
    peers = iter(times[2:])
    own_us, csr_us, ort_us = (next(peers)[0] if them else None for them in (own, csr, ort))
    dense_us, dense_iqr = min(peers)
    found = {
        "us": us,
        "iqr_us": iqr,
        "call_us": times[1][0],
        "dense_us": dense_us,
        "dense_iqr_us": dense_iqr,
        "float32_us": own_us,
        "csr_us": csr_us,
        "onnxruntime_us": ort_us,
        "limit_us": _limit(case, stored, x, results[0]),
        "ratio": dense_us / us,
    }
    rounded = {k: None if v is None else round(v, 2) for k, v in found.items()}
    return Row(case.kind, str(case), pattern, sparsity, True, **rounded)


def _limit(case: Case, weight: Tensor, x: Tensor, y: Tensor) -> float | None:
    core = limits()
    if core is None:
        return None
    kept = int(torch.count_nonzero(weight))
    positions = y.numel() // case.outputs
    size = weight.element_size() * kept + 4.0 * (x.numel() + y.numel())
    return core.least_us(kept * positions, size)


class _Inside:
    """A layer inside a program, between two steps that bring its activations in and out."""

    def __init__(self, graph: Graph, x: Tensor, tail: list[int], parts: int = 0) -> None:
        self.program, self.x, self.tail = write(graph, parts), x, tail
        self.step = 1 if len(graph.steps) > 1 else 0

    def result(self) -> Tensor:
        """What the program gives."""
        return torch.ops.sparse_nas.sparse_chain(self.x, self.program, self.tail)

    def clock(self, count: int) -> float:
        """Seconds that the layer takes in so many calls."""
        return step_s(self.x, self.program, self.tail, count)[self.step]


def _inside(case: Case, x: Tensor, weight: Tensor, bias: Tensor) -> _Inside:
    if not case.size:
        packed = kernels.pack_linear(weight)
        step = Step("linear", X, Y, packed=packed, bias=bias)
        graph = Graph([(case.inputs, 1, 1), (case.outputs, 1, 1)], steps=[step])
        return _Inside(graph, x, [case.outputs])
    size = (case.size - 1) // case.stride + 1
    given, gives = (case.inputs, case.size, case.size), (case.outputs, size, size)
    packed, pair = kernels.pack_conv2d(weight, case.groups), (case.kernel, case.kernel)
    pad, stride = (case.kernel // 2,) * 2, (case.stride,) * 2
    walk: dict[str, Any] = {"kernel": pair, "padding": pad, "stride": stride}
    steps = [Step("map", X, 2), Step("conv2d", 2, 3, packed=packed, bias=bias, **walk)]
    graph = Graph([given, gives, given, gives], steps=[*steps, Step("map", 3, Y)])
    beside = lanes.PIXEL // min(lanes.PIXEL, case.batch)  # as many images as there are
    return _Inside(graph, x, list(gives), beside if case.batch >= 8 else 0)


def _tensors(case: Case, pattern: str, sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
    shape = (case.batch, case.inputs) + ((case.size,) * 2 if case.size else ())
    kernel = (case.kernel,) * 2 if case.size else ()
    weight = torch.randn(case.outputs, case.inputs // case.groups, *kernel)
    rows = 4 if pattern == "4x1" else 1
    mask = torch.rand(case.outputs // rows, 1, *weight.shape[1:]) >= sparsity
    weight *= mask.expand(-1, rows, *weight.shape[1:]).reshape(weight.shape)
    if pattern == "bfloat16":
        weight = weight.bfloat16().float()
    return torch.randn(shape), weight, torch.randn(case.outputs)


def _sparse(case: Case, x: Tensor, weight: Tensor, bias: Tensor) -> Call:
    """The operator, called from Python on NCHW."""
    if not case.size:
        data, linear = kernels.pack_linear(weight).data, torch.ops.sparse_nas.sparse_linear
        return lambda: linear(x, data, bias, case.outputs)
    data, conv = kernels.pack_conv2d(weight, case.groups).data, torch.ops.sparse_nas.sparse_conv2d
    pad, stride, sizes = (case.kernel // 2,) * 2, (case.stride,) * 2, (case.kernel,) * 2
    return lambda: conv(x, data, bias, case.outputs, sizes, stride, pad, (1, 1), case.groups)


def _correct(case: Case, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> bool:
    """Within 1e-5 of the float64 result, on the scale of the largest output."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    if case.size:
        true = F.conv2d(x, weight, bias, case.stride, case.kernel // 2, 1, case.groups)
    else:
        true = F.linear(x, weight, bias)
    return bool((y - true).abs().max() <= 1e-5 * true.abs().max().clamp(min=1))


def _clock(call: Call) -> Clock:
    return lambda count: _time(call, count)


def _interleave(clocks: Sequence[Clock]) -> list[list[float]]:
    """Microseconds a call, by contender and round."""
    repeats = [_repeats(clock) for clock in clocks]
    times: list[list[float]] = [[] for _ in clocks]
    gc.disable()
    for _ in range(ROUNDS):
        for clock, count, series in zip(clocks, repeats, times, strict=True):
            series.append(clock(count) / count * 1e6)
    gc.enable()
    return times


def _repeats(clock: Clock) -> int:
    clock(2)
    return max(1, round(ROUND_S / min(clock(2) / 2 for _ in range(3))))


def _time(call: Call, count: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(count):
        call()
    return clock() - start


def _median_iqr(series: Sequence[float]) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(series, n=4)
    return middle, high - low


HEAD = (
    f"{'layer':42} {'pattern':12} {'zeros':>5} {'us':>8} {'call us':>8} {'dense us':>9} "
    f"{'ratio':>6} {'csr us':>8} {'ort us':>8} {'of limit':>8}"
)


def _line(row: Row) -> str:
    name = f"{row.kind} {row.shape}"
    if not row.correct:
        return f"{name:42} {row.pattern:12} {row.sparsity:5.2f} WRONG RESULT, not timed"
    csr, ort = ("-" if us is None else f"{us:.1f}" for us in (row.csr_us, row.onnxruntime_us))
    share = "-" if row.limit_us is None else f"{row.limit_us / (row.us or 1):.0%}"
    return (
        f"{name:42} {row.pattern:12} {row.sparsity:5.2f} {row.us:8.1f} {row.call_us:8.1f} "
        f"{row.dense_us:9.1f} {row.ratio:5.2f}x {csr:>8} {ort:>8} {share:>8}"
    )


def means(rows: Sequence[Row]) -> list[str]:
    """For each class and pattern the geometric mean of its ratios, by sparsity."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row.ratio is not None:
            by = found.setdefault(f"{row.kind}, {row.pattern}", {})
            by.setdefault(row.sparsity, []).append(row.ratio)
        if row.float32_us is not None and row.us is not None:
            by = found.setdefault(f"{row.kind}, {row.pattern} over own float32", {})
            by.setdefault(row.sparsity, []).append(row.float32_us / row.us)
    return [
        f"{name:42} "
        + " / ".join(f"{statistics.geometric_mean(by[s]):.2f}" for s in sorted(by))
        + f" x at {' / '.join(f'{s:g}' for s in sorted(by))}"
        for name, by in found.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
