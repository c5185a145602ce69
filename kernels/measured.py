"""Times of kernels, measured once on a device: a table in memory, and a file for later processes.

A file belongs to one device, and to the versions of torch, of this package and of the sources of
its kernels; with others it is as if empty. `SPARSE_NAS_MEASURED=off` neither reads nor writes any.
"""

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from kernels.native.build import cache_folder, processor
from kernels.native.library import library

FORMAT = 1
Us = Mapping[str, float]  # microseconds, by the names of kernels that took turns
_SOURCES = (".py", ".h", ".cpp", ".cu", ".cuh")
_log = logging.getLogger("kernels")


@dataclass
class Times:
    """What was measured on one device.

    Attributes:
        device: its description.
        path: the file, or None where nothing is kept.
        known: by case, what was in the file when it was read, and what was measured since.
        fresh: what is not in the file yet.
    """

    device: str
    path: Path | None
    known: dict[str, Us] = field(default_factory=dict)
    fresh: dict[str, Us] = field(default_factory=dict)

    def of(self, case: str, names: Iterable[str] = ()) -> Us | None:
        """The times of a case; None where it was not measured, or not with all these kernels."""
        found = self.known.get(case)
        return found if found is not None and found.keys() >= set(names) else None

    def put(self, case: str, us: Us) -> None:
        """Remember what was measured."""
        if self.path is not None:
            self.known[case] = self.fresh[case] = dict(us)

    def keep(self) -> None:
        """Write what is new to the file, beside what others have written since it was read."""
        if self.path is None or not self.fresh:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                merged = _read(self.path, self.device) | self.fresh
                _write(self.path, {**_made_by(self.device), "us": merged})
        except OSError as error:
            _log.warning("measured times are not kept: %s", error)
        self.fresh.clear()


def times(device: torch.device) -> Times:
    """What is known of a device; its file is read once for a process.

    Raises:
        ValueError: `SPARSE_NAS_MEASURED` is neither "on", as it is when not set, nor "off".
    """
    switch = os.environ.get("SPARSE_NAS_MEASURED") or "on"
    if switch not in ("on", "off"):
        raise ValueError(f"SPARSE_NAS_MEASURED must be on or off, got {switch!r}")
    named = _gpu(device.index or 0) if device.type == "cuda" else _cpu()
    return _times(named, cache_folder()) if switch == "on" else Times(named, None)


def _cpu() -> str:
    core = library()  # its vectors are part of what a CPU is here
    return f"{processor()}, {'torch' if core is None else core.isa}"


@cache
def _gpu(index: int) -> str:
    found: Any = torch.cuda.get_device_properties(index)
    return f"{found.name}, {found.multi_processor_count} processors, CUDA {torch.version.cuda}"


def share(kept: float, of: float) -> str:
    """A kept share as cases name it: masks that keep about as much are one case."""
    return f"{kept / of if of else 0:.2g}"


@cache
def _times(device: str, folder: Path) -> Times:
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")[:60]
    digest = hashlib.sha256(device.encode()).hexdigest()[:8]
    path = folder / f"measured-{words}-{digest}.json"
    return Times(device, path, _read(path, device))


def _read(path: Path, device: str) -> dict[str, Us]:
    try:
        content = json.loads(path.read_bytes())
        if any(content[key] != value for key, value in _made_by(device).items()):
            return {}
        return {case: _checked(us) for case, us in content["us"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("measured times are taken anew, %s cannot be read: %r", path, error)
        return {}


def _checked(us: Any) -> Us:
    found = {str(name): float(taken) for name, taken in us.items()}
    if not all(math.isfinite(taken) and taken > 0 for taken in found.values()):
        raise ValueError(f"times must be positive, got {found}")
    return found


def _write(path: Path, content: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        made.write_text(json.dumps(content, indent=1))
        made.replace(path)


def _made_by(device: str) -> dict[str, Any]:
    try:
        own = version("sparse-nas")
    except PackageNotFoundError:  # run from its folder
        own = ""
    versions = {"torch": torch.__version__, "sparse-nas": own, "kernels": _sources()}
    if "CUDA" in device:
        with suppress(PackageNotFoundError):
            versions["triton"] = version("triton")
    return {"format": FORMAT, "device": device, "versions": versions}


@cache
def _sources() -> str:
    digest, root = hashlib.sha256(), Path(__file__).parent
    for source in sorted(path for path in root.rglob("*") if path.suffix in _SOURCES):
        digest.update(str(source.relative_to(root)).encode() + source.read_bytes())
    return digest.hexdigest()[:16]
