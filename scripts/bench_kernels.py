"""Times the sparse kernels against PyTorch's dense ones; a wrong result gets no time.

Each case is checked against a float64 reference, then sparse and dense (NCHW and channels-last,
the faster counts) run in turn, round by round. Prints a table, and writes JSON with --json.
One thread is timed by its processor time, so that other programs on the machine take nothing
from the truth but cache; several threads are timed by the clock on the wall.
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

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kernels
from kernels.native.library import library

Call = Callable[[], Tensor]
ROUNDS, ROUND_S = 25, 0.001


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
    """One measurement; times are medians in microseconds, spreads interquartile ranges."""

    kind: str
    shape: str
    pattern: str
    sparsity: float
    us: float | None
    iqr_us: float | None
    dense_us: float | None
    dense_iqr_us: float | None
    ratio: float | None
    correct: bool

    def as_json(self) -> dict[str, object]:
        """The row with its layer's kind under `class`."""
        fields = asdict(self)
        return {"class": fields.pop("kind"), **fields}


CASES = (
    *(Case("conv 1x1", 1, c, c, s) for c, s in ((64, 56), (128, 28), (256, 14), (512, 14))),
    *(Case("conv 1x1", 1, c, c, s) for c, s in ((36, 32), (72, 16), (144, 8))),
    Case("conv 1x1", 8, 64, 64, 32),
    *(Case("conv 3x3", 1, c, c, s, 3) for c, s in ((64, 56), (128, 28), (256, 14))),
    *(Case("conv 3x3", 8, c, c, s, 3) for c, s in ((16, 32), (32, 16), (64, 8))),
    Case("conv 3x3", 1, 64, 128, 56, 3, 2),
    *(Case("depthwise 3x3", n, c, c, s, 3, 1, c) for n, c, s in ((1, 144, 28), (8, 36, 32))),
    *(Case("linear", 1, c, c) for c in (512, 1024)),
    *(Case("linear", b, c, c) for b, c in ((4, 512), (16, 512), (64, 512), (128, 1024))),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every case and prints one row each; 1 if a result was wrong."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    machine = _machine(args.threads)
    print("  ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"{'layer':38} {'pattern':12} {'zeros':>5} {'us':>8} {'dense us':>9} {'ratio':>6}")
    rows = []
    with torch.inference_mode():
        for case, pattern, sparsity in _plan(args.sparsity, args.only):
            rows.append(_measure(case, pattern, sparsity))
            print(_line(rows[-1]), flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine, "rows": [row.as_json() for row in rows]}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(row.correct for row in rows) else 1


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def _plan(sparsities: Sequence[float], only: str) -> Iterator[tuple[Case, str, float]]:
    for case in CASES:
        for pattern in ("unstructured", "4x1") if case.groups == 1 else ("unstructured",):
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
    sparse, dense = _contenders(case, x, weight, bias)
    correct = _correct(case, x, weight, bias, sparse())
    if not correct:
        return Row(case.kind, str(case), pattern, sparsity, None, None, None, None, None, False)
    times = _interleave([sparse, *dense])
    us, iqr = _median_iqr(times[0])
    dense_us, dense_iqr = min(_median_iqr(series) for series in times[1:])
    us, iqr, dense_us, dense_iqr = (round(v, 2) for v in (us, iqr, dense_us, dense_iqr))
    ratio = round(dense_us / us, 2)
    return Row(
        case.kind, str(case), pattern, sparsity, us, iqr, dense_us, dense_iqr, ratio, correct
    )


def _tensors(case: Case, pattern: str, sparsity: float) -> tuple[Tensor, Tensor, Tensor]:
    shape = (case.batch, case.inputs) + ((case.size,) * 2 if case.size else ())
    kernel = (case.kernel,) * 2 if case.size else ()
    weight = torch.randn(case.outputs, case.inputs // case.groups, *kernel)
    rows = 4 if pattern == "4x1" else 1
    mask = torch.rand(case.outputs // rows, 1, *weight.shape[1:]) >= sparsity
    weight *= mask.expand(-1, rows, *weight.shape[1:]).reshape(weight.shape)
    return torch.randn(shape), weight, torch.randn(case.outputs)


def _contenders(case: Case, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Call, list[Call]]:
    if not case.size:
        data, linear = kernels.pack_linear(weight).data, torch.ops.sparse_nas.sparse_linear
        return lambda: linear(x, data, bias, case.outputs), [lambda: F.linear(x, weight, bias)]
    data, conv = kernels.pack_conv2d(weight, case.groups).data, torch.ops.sparse_nas.sparse_conv2d
    pad = (case.kernel // 2,) * 2
    stride, sizes = (case.stride,) * 2, (case.kernel,) * 2
    last = torch.channels_last
    xs = (x, x.to(memory_format=last))
    weights = (weight, weight.to(memory_format=last))

    def sparse() -> Tensor:
        return conv(x, data, bias, case.outputs, sizes, stride, pad, (1, 1), case.groups)

    def dense(i: int) -> Call:
        return lambda: F.conv2d(xs[i], weights[i], bias, stride, pad, 1, case.groups)

    return sparse, [dense(0), dense(1)]


def _correct(case: Case, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor) -> bool:
    """Within 1e-5 of the float64 result, on the scale of the largest output."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    if case.size:
        true = F.conv2d(x, weight, bias, case.stride, case.kernel // 2, 1, case.groups)
    else:
        true = F.linear(x, weight, bias)
    return bool((y - true).abs().max() <= 1e-5 * true.abs().max().clamp(min=1))


def _interleave(calls: Sequence[Call]) -> list[list[float]]:
    """Microseconds a call, by contender and round."""
    repeats = [_repeats(call) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    gc.disable()
    for _ in range(ROUNDS):
        for call, count, series in zip(calls, repeats, times, strict=True):
            series.append(_time(call, count) / count * 1e6)
    gc.enable()
    return times


def _repeats(call: Call) -> int:
    _time(call, 2)
    return max(1, round(ROUND_S / min(_time(call, 2) / 2 for _ in range(3))))


def _time(call: Call, count: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(count):
        call()
    return clock() - start


def _median_iqr(series: Sequence[float]) -> tuple[float, float]:
    low, middle, high = statistics.quantiles(series, n=4)
    return middle, high - low


def _line(row: Row) -> str:
    name = f"{row.kind} {row.shape}"
    if not row.correct:
        return f"{name:38} {row.pattern:12} {row.sparsity:5.2f} WRONG RESULT, not timed"
    return (
        f"{name:38} {row.pattern:12} {row.sparsity:5.2f} {row.us:8.1f} "
        f"{row.dense_us:9.1f} {row.ratio:5.2f}x"
    )


if __name__ == "__main__":
    sys.exit(main())
