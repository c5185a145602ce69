import sys
from types import ModuleType

import pytest

from scripts import bench_kernels, bench_networks, bench_supernet, options


@pytest.mark.parametrize("script", [bench_kernels, bench_networks, bench_supernet])
def test_a_gpu_that_is_not_there_is_refused(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "has_driver", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert "no NVIDIA driver" in capsys.readouterr().err


def test_a_driver_that_is_there_lets_cuda_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "has_driver", lambda: True)
    assert options.device("cuda") == "cuda"
    assert options.device("cpu") == "cpu"
