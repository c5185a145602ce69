from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import measured

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Times are kept, in a folder of the test's own."""
    monkeypatch.setenv("SPARSE_NAS_MEASURED", "on")
    monkeypatch.setenv("SPARSE_NAS_CACHE", str(tmp_path))
    monkeypatch.setattr(measured, "_cpu", lambda: "A CPU, some vectors")
    measured._times.cache_clear()
    yield tmp_path
    measured._times.cache_clear()


def in_another_process() -> measured.Times:
    measured._times.cache_clear()
    return measured.times(CPU)


def file(folder: Path) -> Path:
    (path,) = folder.glob("measured-*.json")
    return path


def test_what_was_measured_is_known_to_the_next_process(folder: Path) -> None:
    times = measured.times(CPU)
    times.put("a case", {"dense": 3.5, "sparse": 1.25})
    assert times.of("a case") == {"dense": 3.5, "sparse": 1.25}
    assert not list(folder.iterdir())
    times.keep()
    assert in_another_process().of("a case") == {"dense": 3.5, "sparse": 1.25}
    assert file(folder).name.startswith("measured-a-cpu-some-vectors-")


def test_a_case_is_known_only_with_all_kernels_that_take_turns() -> None:
    times = measured.times(CPU)
    times.put("a case", {"dense": 3.5})
    assert times.of("a case", ["dense"]) is not None
    assert times.of("a case", ["dense", "sparse"]) is None
    assert times.of("another") is None


def test_what_two_processes_measured_is_merged() -> None:
    one, other = measured.times(CPU), in_another_process()
    assert one is not other
    one.put("a", {"dense": 1.0})
    one.put("both", {"dense": 1.0})
    one.keep()
    other.put("b", {"dense": 2.0})
    other.put("both", {"dense": 2.0})
    other.keep()
    found = in_another_process().known
    assert found == {"a": {"dense": 1.0}, "b": {"dense": 2.0}, "both": {"dense": 2.0}}


@pytest.mark.parametrize("what", ["torch", "sparse-nas", "kernels"])
def test_times_of_other_versions_are_as_if_there_were_none(what: str, folder: Path) -> None:
    times = measured.times(CPU)
    times.put("a case", {"dense": 3.5})
    times.keep()
    content = json.loads(file(folder).read_text())
    content["versions"][what] += "1"
    file(folder).write_text(json.dumps(content))
    times = in_another_process()
    assert times.known == {}
    times.put("another", {"dense": 1.0})
    times.keep()
    assert in_another_process().known == {"another": {"dense": 1.0}}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: "\x00",
        lambda text: text.replace("3.5", '"soon"'),
        lambda text: text.replace("3.5", "-3.5"),
        lambda text: text.replace("3.5", "NaN"),
        lambda text: text.replace('"us"', '"ms"'),
    ],
)
def test_a_spoiled_file_is_said_and_replaced(
    spoil: type[str], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times = measured.times(CPU)
    times.put("a case", {"dense": 3.5})
    times.keep()
    path = file(folder)
    path.write_text(spoil(path.read_text()))
    with caplog.at_level(logging.WARNING, logger="kernels"):
        times = in_another_process()
    assert times.known == {} and path.name in caplog.text and len(caplog.records) == 1
    times.put("a case", {"dense": 4.5})
    times.keep()
    assert in_another_process().of("a case") == {"dense": 4.5}


def test_a_folder_that_cannot_be_written_is_said_once_and_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setenv("SPARSE_NAS_CACHE", str(blocked))
    times = in_another_process()
    times.put("a case", {"dense": 3.5})
    with caplog.at_level(logging.WARNING, logger="kernels"):
        times.keep()
        times.keep()
    assert ["not kept" in record.getMessage() for record in caplog.records] == [True]
    assert times.of("a case") == {"dense": 3.5}


def test_switched_off_nothing_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_NAS_MEASURED", "off")
    times = measured.times(CPU)
    times.put("a case", {"dense": 3.5})
    times.keep()
    assert times.of("a case") is None and not list(folder.iterdir())
    monkeypatch.setenv("SPARSE_NAS_MEASURED", "maybe")
    with pytest.raises(ValueError, match="SPARSE_NAS_MEASURED must be on or off, got 'maybe'"):
        measured.times(CPU)


def test_devices_have_files_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("A CPU, some vectors", "A CPU, other vectors", "A CPU: some vectors"):
        monkeypatch.setattr(measured, "_cpu", lambda name=name: name)
        times = measured.times(CPU)
        assert times.known == {}
        times.put("a case", {"dense": 1.0})
        times.keep()
    assert len(list(folder.glob("measured-*.json"))) == 3


def test_processes_that_write_at_once_lose_nothing(folder: Path) -> None:
    code = (
        "import sys, torch; from kernels import measured; "
        "times = measured.times(torch.device('cpu')); "
        "[(times.put(f'{sys.argv[1]} {i}', {'dense': 1.0}), times.keep()) for i in range(20)]"
    )
    started = [subprocess.Popen([sys.executable, "-c", code, str(n)]) for n in range(2)]
    assert [process.wait() for process in started] == [0, 0]
    assert len(json.loads(file(folder).read_text())["us"]) == 40


@pytest.mark.parametrize(("kept", "name"), [(1000, "1"), (101, "0.1"), (12, "0.012")])
def test_shares_that_are_about_the_same_are_one_case(kept: int, name: str) -> None:
    assert measured.share(kept, 1000) == name
    assert measured.share(0, 0) == "0"
