"""Print the GPU rows of bench_kernels.py as the table of docs/kernels.md.

python scripts/table_kernels.py benchmarks/results/kernels_h200.json [FILE_OF_FEWER_ZEROS]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIDDLE = 0.9  # of the zeros, whose dense time is shown
AHEAD = 1.03  # times dense: more than what is measured differs by
US = "us at"  # what follows: the most zeros
AT = "times faster at"  # the fewer zeros
HALF = "2:4"  # a pattern of one share of zeros, a half
HEADS = (
    "work", "shape", "pattern", "kernel", US, f"dense us at {MIDDLE:g}", "times faster",
    "peer, times dense", "limit", AT, "ahead from",
)  # fmt: skip


def main() -> None:
    """Read the rows of benchmarks, the second file's of fewer zeros, and print them."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("file", type=Path, help="JSON of bench_kernels.py --device cuda")
    p.add_argument("low", type=Path, nargs="?", help="the same of fewer zeros")
    given = p.parse_args()
    cases, low = (cases_of(file) for file in (given.file, given.low))
    shares = {US: f"{shares_of(cases)} ({HALF}: 0.5)", AT: shares_of(low)}
    heads = [f"{head} {shares[head]}" if head in shares else head for head in HEADS]
    print("| " + " | ".join(heads) + " |", "|---" * len(HEADS) + "|", sep="\n")
    for name, rows in cases.items():
        print("| " + " | ".join(line(name, rows, low.get(name, []))) + " |")


def cases_of(file: Path | None) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """The rows by operation, shape and pattern, each case's by its zeros."""
    cases: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in json.loads(file.read_text())["rows"] if file else ():
        cases.setdefault((row["operation"], row["shape"], row["pattern"]), []).append(row)
    return cases


def shares_of(cases: dict[tuple[str, str, str], list[dict[str, Any]]]) -> str:
    """The shares of zeros of all but 2:4."""
    rows = [row for name, rows in cases.items() if name[2] != HALF for row in rows]
    return listed([f"{share:g}" for share in sorted({row["sparsity"] for row in rows})])


def line(
    name: Sequence[str], rows: Sequence[dict[str, Any]], low: Sequence[dict[str, Any]]
) -> list[str]:
    """The cells of a case."""
    middle = min(rows, key=lambda row: abs(float(row["sparsity"]) - MIDDLE))
    kernels = dict.fromkeys(row["kernel"] for row in rows)
    peers = [row["dense_us"] / min(row["peers_us"].values(), default=math.inf) for row in rows]
    return [
        *name,
        ", ".join(kernels),
        listed([number(row["us"]) for row in rows]),
        number(middle["dense_us"]),
        listed([f"{row['ratio']:.2f}" for row in rows]),
        listed([f"{times:.2f}" if times else "-" for times in peers]) if any(peers) else "-",
        listed([f"{row['limit_us'] / row['us']:.0%}" for row in rows]),
        listed([f"{row['ratio']:.2f}" for row in low]),
        ahead_from([*low, *rows]),
    ]


def ahead_from(rows: Sequence[dict[str, Any]]) -> str:
    """The fewest zeros measured from which on it is faster than dense; `-`: not even at most."""
    dense = [row["kernel"] == "dense" or row["ratio"] < AHEAD for row in rows]
    behind = [row["sparsity"] for row, same in zip(rows, dense, strict=True) if same]
    ahead = [row["sparsity"] for row in rows if row["sparsity"] > max(behind, default=0)]
    return f"{min(ahead):g}" if ahead else "-"


def listed(cells: Sequence[str]) -> str:
    """Cells of several shares of zeros in one."""
    return " / ".join(cells)


def number(us: float) -> str:
    """Three digits."""
    return f"{us:.3g}" if us < 1000 else f"{us:.0f}"


if __name__ == "__main__":
    main()
