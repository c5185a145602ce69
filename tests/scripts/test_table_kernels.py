import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import table_kernels


def row(sparsity: float, us: float, **rest: Any) -> dict[str, Any]:
    named = {"operation": "linear", "shape": "1 tokens, 8x8", "pattern": "4x4", "kernel": "few"}
    times = {"us": us, "dense_us": 10.0, "ratio": 10 / us, "limit_us": 1.0, "peers_us": {}}
    return {**named, "sparsity": sparsity, **times, **rest}


def test_a_case_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    high, low = tmp_path / "high.json", tmp_path / "low.json"
    rows = [row(0.8, 4.0, peers_us={"csr": 20.0}), row(0.9, 2.0, dense_us=11.0, kernel="many")]
    high.write_text(json.dumps({"rows": [*rows, row(0.9, 5.0, operation="conv2d")]}))
    low.write_text(json.dumps({"rows": [row(0.5, 8.0)]}))
    monkeypatch.setattr(sys, "argv", ["", str(high), str(low)])
    table_kernels.main()
    found = capsys.readouterr().out.splitlines()[2:]
    assert found == [
        "| linear | 1 tokens, 8x8 | 4x4 | few, many | 4 / 2 | 11 | 2.50 / 5.00 | 0.50 / - | "
        "25% / 50% | 1.25 | 0.5 |",
        "| conv2d | 1 tokens, 8x8 | 4x4 | few | 5 | 10 | 2.00 | - | 20% |  | 0.9 |",
    ]


def test_ahead_from_where_all_of_more_zeros_are() -> None:
    rows = [row(0.5, 9.0), row(0.7, 10.0), row(0.8, 5.0), row(0.9, 2.0)]
    assert table_kernels.ahead_from(rows) == "0.8"
    assert table_kernels.ahead_from([row(0.9, 9.9)]) == "-"
    assert table_kernels.ahead_from([row(0.8, 9.0, kernel="dense"), row(0.9, 5.0)]) == "0.9"
