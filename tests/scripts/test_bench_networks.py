import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from nas.packing import pack
from scripts import bench_networks
from tests.pack_models import Mlp, ResNet, masked, prefer_sparse


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The script sets torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_row_tells_what_a_call_takes_beside_the_core(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefer_sparse(monkeypatch, runs=True)
    file = tmp_path / "found.json"
    options = ["--only", "tiny", "--sparsity", "0.8", "--no-compile", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench_networks.py", *options])
    assert bench_networks.main() == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["kernels"] == ["sparse_chain"] and row["ms"].keys() == {"packed", "twin", "eager"}
    assert min(row["core_us"], row["overhead_iqr_us"]) > 0
    head, line = capsys.readouterr().out.splitlines()[-2:]
    assert head.split()[-2:] == ["overhead", "us"]
    assert line.startswith("tiny") and f"{row['overhead_us']:.1f} +- " in line


def test_only_a_network_of_one_program_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_sparse(monkeypatch, runs=True)
    x = torch.randn(1, 3, 9, 11)
    one = pack(masked(ResNet()), x)
    found = bench_networks.only_program(one)
    assert found is not None and found[1] == [5, 1, 1]
    y = torch.ops.sparse_nas.sparse_chain(x, *found)
    torch.testing.assert_close(y.flatten(1), one(x))
    more = pack(masked(nn.Sequential(Mlp(), nn.Softmax(1))), torch.randn(1, 33))
    assert bench_networks.only_program(more) is None
    assert bench_networks.overhead(more, torch.randn(1, 33)) == {}
