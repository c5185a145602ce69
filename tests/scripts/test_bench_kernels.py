import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import bench_kernels


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The script sets torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SMALL = ["--sparsity", "0.9", "--only", "144 -> 144, 8^2, batch 1 unstructured"]


def test_a_measured_row_names_layer_machine_and_spread(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "found.json"
    assert bench_kernels.main([*SMALL, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["machine"].keys() == {"cpu", "threads", "torch", "isa", "clock"}
    (row,) = found["rows"]
    kind, pattern = row["class"], row["pattern"]
    assert (kind, pattern, row["sparsity"]) == ("conv 1x1 of DARTS", "unstructured", 0.9)
    assert row["correct"] and row["us"] > 0 and row["iqr_us"] >= 0
    assert row["ratio"] == pytest.approx(row["dense_us"] / row["us"], rel=0.01)  # all rounded


def test_a_wrong_result_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bench_kernels._sparse

    def wrong(*arguments: Any) -> bench_kernels.Call:
        call = right(*arguments)
        return lambda: call() * 1.001

    monkeypatch.setattr(bench_kernels, "_sparse", wrong)
    assert bench_kernels.main(SMALL) == 1
    assert "WRONG RESULT, not timed" in capsys.readouterr().out
