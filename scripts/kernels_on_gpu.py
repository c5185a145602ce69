"""The GPU half of bench_kernels.py: sparse kernels against PyTorch's dense and sparse ones."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.cuda import blob, conv2d, linear
from kernels.window import Window
from scripts import training_on_gpu
from scripts.gpu_timing import (
    HEAD,
    Call,
    Make,
    Row,
    Work,
    block_mask,
    card,
    close,
    line,
    milliseconds,
    rotated,
    settled,
)

MANY, PIXELS = 8, 20  # calls in a graph where copies are not rotated, of a convolution
ANYWHERE, TWO_OF_FOUR = 1, -4  # instead of the side of blocks
BLOCKS = (ANYWHERE, 16, 32, 64, 128)
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
WIDTHS = (256, 512, 768, 1024, 2048, 3072, 4096, 5120, 8192, 11008)  # drawn
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096, 8192)
CHANNELS, SIZES = (64, 128, 256, 512), (7, 14, 28, 56)


@dataclass(frozen=True)
class Linear:
    """A linear layer in bfloat16."""

    tokens: int
    rows: int
    columns: int
    block: int
    sparsity: float
    with_peers: bool = True
    tuned: bool = False

    def __str__(self) -> str:
        return f"linear {self.tokens} tokens {self.rows}x{self.columns} {pattern(self.block)}"

    def work(self) -> Work:
        """Packs, checks and says what is timed."""
        weight = self._weight()
        x = torch.randn(self.tokens, self.columns, device="cuda").bfloat16()
        packed, pack_ms = milliseconds(lambda: kernels.pack_linear(weight))
        if self.tuned:
            kernels.tune(packed, x)
        ours: Call = partial(torch.ops.sparse_nas.sparse_linear, x, packed.data, None, self.rows)
        y = ours()
        kept = int(weight.count_nonzero())
        return Work(
            "linear",
            f"{self.tokens} tokens, {self.rows}x{self.columns}",
            pattern(self.block),
            self.sparsity,
            close(y, F.linear(x.double(), weight.double())),
            linear.chosen(blob.read(packed.data), x),
            weight,
            rotated(weight) if self.tokens <= 64 else MANY,
            lambda _: partial(_linear, x, packed.data.clone()),
            lambda w: partial(F.linear, x, w),
            self._peers(x) if self.with_peers else {},
            2 * kept + x.nbytes + y.nbytes,
            2.0 * kept * self.tokens,
            pack_ms,
        )

    def _weight(self) -> Tensor:
        shape = (self.rows, self.columns)
        weight = torch.randn(shape, device="cuda").bfloat16()
        if self.block == TWO_OF_FOUR:
            order = torch.rand(self.rows, self.columns // 4, 4, device="cuda").argsort(2)
            return weight * (order < 2).view(shape)
        return weight * block_mask(shape, self.block, self.sparsity)

    def _peers(self, x: Tensor) -> dict[str, Make]:
        side = self.block
        if side == TWO_OF_FOUR:
            return {
                "2:4": lambda w: partial(F.linear, x, torch.sparse.to_sparse_semi_structured(w))
            }
        if side == ANYWHERE:
            return {"csr": lambda w: partial(_product, w.to_sparse_csr(), x)}
        return {"bsr": lambda w: partial(_product, w.to_sparse_bsr((side, side)), x)}


@dataclass(frozen=True)
class Conv2d:
    """A convolution in bfloat16, channels last, of as many channels out as in."""

    images: int
    channels: int
    size: int
    kernel: int
    stride: int
    block: int
    sparsity: float
    tuned: bool = False

    @property
    def shape(self) -> str:
        """As rows of the table name it."""
        stride = f" /{self.stride}" if self.stride > 1 else ""
        kernel = f"{self.kernel}x{self.kernel}"
        return f"{kernel} {self.channels} ch {self.size}^2{stride}, batch {self.images}"

    def __str__(self) -> str:
        return f"conv2d {self.shape} {pattern(self.block)}"

    def work(self) -> Work:
        """Packs, checks and says what is timed."""
        n, kernel = self.channels, (self.kernel, self.kernel)
        mask = block_mask((n, n, *kernel), self.block, self.sparsity)
        weight = (torch.randn(n, n, *kernel, device="cuda") * mask).bfloat16()
        weight = weight.contiguous(memory_format=torch.channels_last)
        x = torch.randn(self.images, n, self.size, self.size, device="cuda").bfloat16()
        x = x.contiguous(memory_format=torch.channels_last)
        packed, pack_ms = milliseconds(lambda: kernels.pack_conv2d(weight))
        walk: Any = ((self.stride,) * 2, (self.kernel // 2,) * 2)
        if self.tuned:
            kernels.tune(packed, x, stride=walk[0], padding=walk[1])
        window = Window(kernel, walk[0], walk[1], (1, 1))
        ours: Make = lambda _: partial(_conv2d, x, packed.data.clone(), walk)  # noqa: E731
        y, kept = ours(weight)(), int(weight.count_nonzero())
        true = F.conv2d(x[:8].double(), weight.double(), None, *walk)
        return Work(
            "conv2d",
            self.shape,
            pattern(self.block),
            self.sparsity,
            close(y[:8], true),
            conv2d.name(blob.read(packed.data), x, tuple(y.shape), window),
            weight,
            PIXELS,
            ours,
            lambda w: partial(F.conv2d, x, w, None, *walk),
            {},
            2 * kept + x.nbytes / (self.stride**2 if self.kernel == 1 else 1) + y.nbytes,
            2.0 * kept * y.numel() / n,
            pack_ms,
        )


def pattern(block: int) -> str:
    """As rows of the table name it."""
    return {ANYWHERE: "unstructured", TWO_OF_FOUR: "2:4"}.get(block, f"{block}x{block}")


def cases(sparsities: Sequence[float]) -> Iterator[Linear | Conv2d]:
    """Those of docs/kernels.md, each at these sparsities."""
    shapes = [(t, n, b) for n in (4096, 8192) for t in (1, 16) for b in (64, ANYWHERE)]
    shapes += [(8192, n, b) for n in (4096, 8192) for b in (64, 128)]
    shapes += [(2048, 4096, 64), (2048, 4096, 128)]
    for tokens, size, block in shapes:
        for sparsity in sparsities:
            yield Linear(tokens, size, size, block, sparsity)
    for tokens, size in ((1, 4096), (16, 4096), (2048, 4096), (8192, 4096), (8192, 8192)):
        yield Linear(tokens, size, size, TWO_OF_FOUR, 0.5)
    walks = [(256, 28, 3, 1), (256, 14, 3, 1), (256, 28, 3, 2), (512, 28, 1, 1), (512, 28, 1, 2)]
    for channels, size, kernel, stride in walks:
        for sparsity in sparsities:
            yield Conv2d(64, channels, size, kernel, stride, 64, sparsity)


def drawn(count: int, tuned: bool) -> Iterator[Linear | Conv2d]:
    """Cases of any shape and share, the same in every run, without peers.

    Args:
        count: how many.
        tuned: whether kernels are measured first (`kernels.tune`), not taken by a rule of thumb.
    """
    draw = random.Random(0)
    for _ in range(count):
        block, sparsity = draw.choice(BLOCKS), draw.choice(SHARES)
        if draw.random() < 0.3:
            wide = [channels for channels in CHANNELS if channels % block == 0]
            walk = draw.choice(SIZES), draw.choice((1, 3)), draw.choice((1, 2))
            yield Conv2d(64, draw.choice(wide), *walk, block, sparsity, tuned)
        else:
            shape = draw.choice(WIDTHS), draw.choice(WIDTHS)
            yield Linear(draw.choice(TOKENS), *shape, block, sparsity, False, tuned)


def run(args: argparse.Namespace) -> int:
    """Measures every case and prints one row each; 1 if a result was wrong."""
    if not args.tuned:
        os.environ["SPARSE_NAS_MEASURED"] = "off"  # what others measured here is no rule of thumb
    warnings.filterwarnings("ignore")  # torch's sparse kernels say that they are in beta
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    gc.freeze()  # what is there by now: garbage is collected before every capture
    on, rows = card(), list[Row]()
    named: Any = chain(cases(args.sparsity), training_on_gpu.cases(args.sparsity))
    chosen: Any = drawn(args.drawn, args.tuned) if args.drawn else named
    if args.training:
        chosen = training_on_gpu.drawn(args.training, WIDTHS, SHARES, args.tuned, args.ways)
    print(on, HEAD, sep="\n", flush=True)
    with torch.no_grad():
        for case in chosen:
            if args.only in str(case):
                rows.append(settled(case.work, on))
                print(line(rows[-1]), flush=True)
                if args.json:  # after every row: time on such a machine may end
                    found = {"card": asdict(on), "rows": [asdict(row) for row in rows]}
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    args.json.write_text(json.dumps(found, indent=1) + "\n")
    ratios = sorted(row.ratio for row in rows if row.ratio)
    if (args.drawn or args.training) and ratios:
        slowest = ", ".join(f"{ratio:.3f}" for ratio in ratios[:3])
        print(f"{len(ratios)} drawn: slowest {slowest}, median {statistics.median(ratios):.2f}")
    if args.ways and ratios:
        longer = [_longer(row.us, row.peers_us) for row in rows if row.us and row.peers_us]
        mean, most = statistics.mean(longer), max(longer)
        print(f"{mean:.3f} times as long as by the fastest way, {most:.3f} at most")
    return 0 if all(row.correct for row in rows) else 1


def _longer(us: float, ways_us: Mapping[str, float]) -> float:
    """How many times as long as by the fastest way a step took."""
    return us / min(us, *ways_us.values())


def _linear(x: Tensor, data: Tensor) -> Tensor:
    return torch.ops.sparse_nas.sparse_linear(x, data, None, blob.read(data).rows)


def _conv2d(x: Tensor, data: Tensor, walk: Any) -> Tensor:
    found = blob.read(data)
    rest = (found.rows, found.form.kernel, *walk, (1, 1), 1)
    return torch.ops.sparse_nas.sparse_conv2d(x, data, None, *rest)


def _product(weight: Tensor, x: Tensor) -> Tensor:
    return torch.mm(weight, x.t())
