import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kernels
from kernels.native import build as native_build
from kernels.native import library as native
from tests.kernels import draws

ROOT = Path(kernels.__file__).parents[1]
ops = torch.ops.sparse_nas


def several_results() -> list[Tensor]:
    """Results of every path through the core: few and many samples, in place, padded."""
    results = []
    for batch in (1, 8, 9, 150):
        data = kernels.pack_linear(draws.weight(0, (300, 500), 0.3, 1)).data
        results.append(ops.sparse_linear(draws.numbers(1, batch, 500), data, None, 300, "gelu"))
    cases = [
        draws.Conv(3, 1, 40, 64, (21, 20), (1, 1), (1, 1), (0, 0), (1, 1)),
        draws.Conv(1, 1, 40, 64, (32, 32), (1, 1), (1, 1), (0, 0), (1, 1)),
        draws.Conv(5, 1, 40, 64, (21, 20), (3, 3), (1, 1), (1, 1), (1, 1)),
        draws.Conv(1, 2, 20, 32, (41, 40), (3, 3), (2, 2), (1, 1), (1, 1)),
        draws.Conv(2, 64, 1, 1, (31, 32), (5, 5), (1, 1), (2, 2), (1, 1)),
        draws.Conv(2, 150, 1, 1, (25, 24), (3, 3), (1, 1), (1, 1), (1, 1)),
    ]
    for case in cases:
        for rows in (0, 1, 4):
            data = kernels.pack_conv2d(
                draws.weight(0, case.weight_shape, 0.4, rows), case.groups
            ).data
            where = (case.kernel, case.stride, case.padding, case.dilation, case.groups)
            x, out = draws.numbers(0, *case.x_shape), case.weight_shape[0]
            results.append(ops.sparse_conv2d(x, data, None, out, *where, "silu"))
    return results


@pytest.mark.usefixtures("threads")
def test_results_are_equal_bit_by_bit_for_any_threads(isa: str) -> None:
    if isa == "torch":
        pytest.skip("PyTorch's own kernels promise no such thing")
    torch.set_num_threads(1)
    alone = several_results()
    for count in (2, 3):
        torch.set_num_threads(count)
        for one, other in zip(alone, several_results(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.usefixtures("isa")
def test_a_sample_s_result_is_the_same_each_time() -> None:
    for one, other in zip(several_results(), several_results(), strict=True):
        assert torch.equal(one, other)


def test_only_one_openmp_runtime_is_loaded() -> None:
    code = (
        "from pathlib import Path; from tests.kernels.test_native import several_results; "
        "several_results(); "
        "maps = Path('/proc/self/maps').read_text().splitlines(); "
        "files = {Path(line.split()[-1]).name for line in maps}; "
        "print(*(f for f in files if f.startswith(('libgomp', 'libomp', 'libiomp'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 1


@pytest.mark.usefixtures("fresh_library")
def test_the_best_instruction_set_is_taken() -> None:
    lib = native.library()
    assert lib is not None
    assert lib.isa == native_build.supported()[0]


@pytest.mark.usefixtures("fresh_library")
def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_NAS_ISA", "mmx")
    with pytest.raises(ValueError, match=r"one of avx512, avx2, scalar, torch.*got 'mmx'"):
        native.library()


@pytest.mark.usefixtures("fresh_library")
def test_without_a_compiler_pytorch_runs_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SPARSE_NAS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    weight, x = draws.weight(0, (5, 7), 0.5, 1), draws.numbers(0, 3, 7)
    data = kernels.pack_linear(weight).data
    with caplog.at_level(logging.WARNING, logger="kernels"):
        for _ in range(3):
            torch.testing.assert_close(ops.sparse_linear(x, data, None, 5), x @ weight.T)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "plain PyTorch" in said[0] and "no-such-compiler" in said[0]


@pytest.mark.usefixtures("fresh_library")
def test_a_cache_that_cannot_be_written_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSE_NAS_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="kernels"):
        assert native.library() is None
    assert "cannot write the cache" in caplog.text


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native_build.BuildError, match="no C\\+\\+ compiler"):
        native_build.compiler()


def test_a_failing_compiler_s_words_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "cxx"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho it broke >&2\nexit 1\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("SPARSE_NAS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(native_build.BuildError, match="it broke"):
        native_build.build("scalar")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_the_library_s_name_depends_on_flags_and_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = {native_build.library_path(isa).name.split("-")[-1] for isa in native_build.LANES}
    assert len(names) == 3
    fake = tmp_path / "cxx"
    fake.write_text("#!/bin/sh\necho a newer version\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    assert native_build.library_path("scalar").name.split("-")[-1] not in names


def test_building_ahead_compiles_once_and_imports_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path[:0] = [sys.argv[1]]; sys.modules['torch'] = None\n"
        "import build; print(build.build('scalar'))"
    )
    command = [sys.executable, "-c", script, str(ROOT / "kernels" / "native")]
    environment = {**os.environ, "SPARSE_NAS_CACHE": str(tmp_path)}
    outputs = [
        subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        for _ in range(2)
    ]
    made = list(tmp_path.glob("*.so"))
    assert [Path(output.stdout.strip()) for output in outputs] == made * 2


def test_processes_that_build_at_once_make_one_library(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "kernels" / "native" / "build.py")]
    environment = {**os.environ, "SPARSE_NAS_CACHE": str(tmp_path)}
    started = [subprocess.Popen(command, env=environment, text=True) for _ in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".lock", ".so"]
