"""The benchmark of networks on a GPU: small ones, on the CPU as if it were one."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from nas.masks import sparse_weights
from nas.packing import devices
from nas.packing.layer import Kernel
from scripts import bench_networks, networks_on_gpu, options
from tests.pack_models import prefer


class Small(nn.Sequential):
    """What a ResNet has: a first convolution, one of two blocks, one of many, a classifier."""

    def __init__(self) -> None:
        stem = (nn.Conv2d(3, 64, 3, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        body = (nn.Conv2d(64, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1))
        super().__init__(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(options, "has_driver", lambda: True)
    monkeypatch.setattr(networks_on_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(networks_on_gpu, "SECONDS", 0.01)
    case = networks_on_gpu.Case("resnet-50", Small, (3, 8, 8))
    monkeypatch.setattr(networks_on_gpu, "CASES", (case,))
    monkeypatch.setattr(devices, "of", lambda _: replace(devices.GPU, kind="cpu"))
    monkeypatch.setattr(devices, "_of_a_convolution", lambda *_: "implicit")

    def rank(kernel: Kernel) -> float:
        return 4.0 if kernel.name == "dense" else 2.0

    prefer(monkeypatch, rank)
    yield


def test_a_row_for_each_sparsity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    given = ["--device", "cuda", "--batch", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench_networks.py", *given])
    assert bench_networks.main() == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["sparsity"] for row in rows] == [0.8, 0.9]
    for row in rows:
        assert row["correct"] and row["apart"] < 0.02 and row["batch"] == 2
        assert row["kernels"] == {"dense": 2, "sparse_conv2d[implicit]": 2}
        assert row["ms"].keys() == row["iqr_ms"].keys() == {"packed", "twin", "eager"}
        assert len(row["layers"]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1].split()[:4] == ["resnet-50", "2", "0.90", "0.13"]


def test_a_weight_of_few_blocks_keeps_one_and_some_stay_dense() -> None:
    module = networks_on_gpu._masked(networks_on_gpu.CASES[0], 0.9)
    masks = {path: sparse.masks for path, sparse in sparse_weights(module).items()}
    assert {path: int(mask.sum()) // 64**2 for path, mask in masks.items()} == {
        "3.weight": 1,
        "5.weight": 4,
    }
    assert not sparse_weights(networks_on_gpu._masked(networks_on_gpu.CASES[0], 0.0))


def test_a_wrong_output_has_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(networks_on_gpu, "NEAR", 0.0)
    monkeypatch.setattr(networks_on_gpu, "FURTHER", 0.0)
    monkeypatch.setattr(sys, "argv", ["bench_networks.py", "--device", "cuda", "--batch", "2"])
    assert bench_networks.main() == 1
    assert "WRONG" in capsys.readouterr().out
