"""A run's folder: the log that is the truth, the states of trials, and one driver at a time.

`trials.jsonl` is append-only, its order is the order of events, every line is on the disk before
the search goes on, and a torn last line is dropped. States are safetensors and JSON.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1


@dataclass(frozen=True)
class State:
    """What a trial leaves: tensors by name, and plain values.

    Args:
        tensors: Weights, masks, scores, optimiser and random state.
        meta: Steps done, open choices and mixture weights.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `state.safetensors` and `state.json`; whole or not at all."""
        from safetensors.torch import save_file

        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file(self.tensors, part / "state.safetensors")
        (part / "state.json").write_text(json.dumps({"version": VERSION, **self.meta}) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)

    @staticmethod
    def load(folder: Path) -> State:
        """Read what `save` wrote."""
        return State(read_tensors(folder / "state.safetensors"), read_json(folder / "state.json"))


class Store:
    """The folder of a run, held by one driver.

    Args:
        folder: Made if it is not there.

    Raises:
        ValueError: Another driver holds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder / ".lock")
        self._log: IO[str] | None = None

    def events(self) -> list[dict[str, Any]]:
        """The log's lines so far, in order; a torn last line is cut off the file."""
        path = self.folder / "trials.jsonl"
        if not path.exists():
            return []
        whole, _, torn = path.read_bytes().rpartition(b"\n")
        if torn:
            os.truncate(path, len(whole) + (1 if whole else 0))
        return [_event(line, i + 1) for i, line in enumerate(whole.splitlines())]

    def append(self, event: str, fields: Mapping[str, Any]) -> None:
        """Write one line to the log; it is on the disk when this returns."""
        if self._log is None:
            self._log = (self.folder / "trials.jsonl").open("a")
        line = {"version": VERSION, "event": event, **_finite(fields)}
        self._log.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
        self._log.flush()
        os.fsync(self._log.fileno())

    def write(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, whole or not at all."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
        part.rename(path)

    def read(self, name: str) -> Any:
        """A JSON file of the run, None if it is not there."""
        path = self.folder / name
        return read_json(path) if path.exists() else None

    def checkpoint(self, number: int) -> Path:
        """Where the state of a trial lies."""
        return self.folder / "checkpoints" / str(number)

    def kept(self) -> Iterator[int]:
        """Numbers of the trials whose state lies here."""
        places = (self.folder / "checkpoints").glob("*")
        return (int(place.name) for place in places if place.name.isdigit())

    def forget(self, number: int) -> None:
        """Remove the state of a trial."""
        shutil.rmtree(self.checkpoint(number), ignore_errors=True)

    def close(self) -> None:
        """Let go of the folder."""
        if self._log is not None:
            self._log.close()
        self._lock.close()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a run; raises ValueError for one that is damaged or of another format."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    found = value.get("version") if isinstance(value, dict) else None
    if found != VERSION:
        raise ValueError(f"{path}: format {found}, this version reads {VERSION}")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file; raises ValueError for one that is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not safetensors: {error}") from None


def check_order(events: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for a report or the end of a trial that is not out."""
    out: set[Any] = set()
    for line, (event, trial) in enumerate(((e.get("event"), e.get("trial")) for e in events), 1):
        if event == "ask" and trial is not None:
            out.add(trial)
        elif trial not in out or event not in ("report", "tell"):
            raise ValueError(f"trials.jsonl:{line}: {event} of trial {trial}, which is not out")
        elif event == "tell":
            out.remove(trial)


def _lock(path: Path) -> IO[str]:
    handle = path.open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise ValueError(f"{path.parent}: another search is writing to this folder") from None
    return handle


def _event(line: bytes, number: int) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        shown = line[:80].decode(errors="replace")
        raise ValueError(f"trials.jsonl:{number}: not a line of JSON: {shown!r}") from None
    found = event.get("version") if isinstance(event, dict) else None
    if found != VERSION:
        raise ValueError(f"trials.jsonl:{number}: format {found}, this version reads {VERSION}")
    return event


def _finite(value: Any) -> Any:
    """Plain JSON with null where a number is not finite."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
