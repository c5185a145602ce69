"""Draw how many times faster than dense each class of kernels is, against its sparsity.

python scripts/bench_kernels.py --sparsity 0.2 0.4 0.6 0.8 0.9 0.95 --json FILE
python scripts/draw_kernels.py FILE --out docs/pictures/kernels.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATTERNS = ("unstructured", "4x1")


def main() -> None:
    """Read the rows of a benchmark and draw one panel for each pattern."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("file", type=Path, help="JSON of bench_kernels.py")
    p.add_argument("--out", type=Path, default=Path("kernels.png"))
    given = p.parse_args()
    rows = [row for row in json.loads(given.file.read_text())["rows"] if row["ratio"]]
    figure, axes = plt.subplots(1, len(PATTERNS), figsize=(11, 4.4), sharey=True)
    for axis, pattern in zip(axes, PATTERNS, strict=True):
        draw(axis, pattern, [row for row in rows if row["pattern"] == pattern])
    axes[0].set_ylabel("times faster than PyTorch's fastest dense")
    axes[-1].legend(fontsize=8, frameon=False, loc="upper left")
    figure.tight_layout()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=110)


def draw(axis: Any, pattern: str, rows: Iterable[dict[str, Any]]) -> None:
    """One line for each class: the geometric mean of its layers, against the share of zeros."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        found.setdefault(row["class"], {}).setdefault(row["sparsity"], []).append(row["ratio"])
    for name, by in found.items():
        zeros = sorted(by)
        axis.plot(zeros, [geometric_mean(by[z]) for z in zeros], marker="o", ms=3, label=name)
    axis.axhline(1, color="0.6", lw=0.8)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_title(pattern, fontsize=10)
    axis.set_xlabel("share of zeros")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
