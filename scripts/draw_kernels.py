"""Draw how many times faster than dense each class of kernels is, against its sparsity.

python scripts/bench_kernels.py --sparsity 0.2 0.4 0.6 0.8 0.9 0.95 --json FILE
python scripts/draw_kernels.py FILE --out docs/pictures/kernels.png

Of a GPU likewise (`--device cuda`); the rows of several files are drawn together.
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
TRAINING = ("weight gradient", "forward and backward")


def main() -> None:
    """Read the rows of benchmarks and draw them in panels."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("files", type=Path, nargs="+", help="JSON of bench_kernels.py")
    p.add_argument("--out", type=Path, default=Path("kernels.png"))
    given = p.parse_args()
    found = [row for file in given.files for row in json.loads(file.read_text())["rows"]]
    rows = [row for row in found if row["ratio"]]
    panels = on_cpu(rows) if "class" in rows[0] else on_gpu(rows)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.6), sharey=True)
    for axis, (title, named) in zip(axes, panels.items(), strict=True):
        draw(axis, title, named)
    axes[0].set_ylabel("times faster than PyTorch's fastest dense")
    figure.tight_layout()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=110)


def on_cpu(rows: Iterable[dict[str, Any]]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """A panel for each pattern; its rows with the name of their line."""
    return {p: [(row["class"], row) for row in rows if row["pattern"] == p] for p in PATTERNS}


def on_gpu(rows: Iterable[dict[str, Any]]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Few tokens, many tokens, convolutions, parts of training; rows with their line's name."""
    names = ("few tokens", "many tokens", "convolutions", *TRAINING)
    panels: dict[str, list[tuple[str, dict[str, Any]]]] = {name: [] for name in names}
    for row in rows:
        shape, pattern = row["shape"], row["pattern"]
        few = shape.startswith(("1 ", "16 "))
        if row["operation"] in TRAINING:
            panels[row["operation"]].append((f"{shape}, {pattern}", row))
        elif row["operation"] == "conv2d":
            panels["convolutions"].append((f"{shape}, {pattern}", row))
        elif pattern != "2:4":
            panels["few tokens" if few else "many tokens"].append((f"{shape}, {pattern}", row))
    return panels


def draw(axis: Any, title: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """One line for each name: the geometric mean of its rows, against the share of zeros."""
    found: dict[str, dict[float, list[float]]] = {}
    for name, row in rows:
        found.setdefault(name, {}).setdefault(row["sparsity"], []).append(row["ratio"])
    for name, by in found.items():
        zeros = sorted(by)
        axis.plot(zeros, [geometric_mean(by[z]) for z in zeros], marker="o", ms=3, label=name)
    axis.axhline(1, color="0.6", lw=0.8)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("share of zeros")
    axis.legend(fontsize=7, frameon=False, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
