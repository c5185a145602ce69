"""Compiles the C core with the system's compiler, once, into a cache. Imports nothing heavy.

`python kernels/native/build.py` builds ahead for this machine; it is quick when that was done.
"""

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent
LANES = {"avx512": 16, "avx2": 8, "scalar": 4}
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fvisibility=hidden")
_ISA_FLAGS = {
    "avx512": (
        "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx2 -mfma -mprefer-vector-width=512"
    ).split(),
    "avx2": ["-mavx2", "-mfma"],
    "scalar": [],
}
_NEEDS = {
    "avx512": {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx2", "fma"},
    "avx2": {"avx2", "fma"},
    "scalar": set[str](),
}


class BuildError(Exception):
    """The C core could not be compiled; says why."""


@cache
def supported() -> tuple[str, ...]:
    """Instruction sets that this machine runs, the best first."""
    flags = _cpu_flags()
    return tuple(isa for isa, needs in _NEEDS.items() if needs <= flags)


def processor() -> str:
    """The processor's name as the system gives it."""
    return _cpu_says("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set(_cpu_says("flags").split())


def _cpu_says(word: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    said = (line.partition(":")[2].strip() for line in lines if line.startswith(word))
    return next(said, "")


def compiler() -> list[str]:
    """The command of the C++ compiler: `CXX`, or the first of g++, clang++ and c++.

    Raises:
        BuildError: there is none.
    """
    if named := os.environ.get("CXX"):
        return shlex.split(named)
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler: neither CXX is set nor is g++, clang++ or c++ on the path")


def cache_folder() -> Path:
    """Where compiled libraries lie: `SPARSE_NAS_CACHE`, or ~/.cache/sparse-nas."""
    return Path(os.environ.get("SPARSE_NAS_CACHE") or Path.home() / ".cache" / "sparse-nas")


def library_path(isa: str) -> Path:
    """The file of this source, compiled by this compiler with these flags for this machine."""
    command = compiler()
    version = _run([*command, "--version"])
    digest = hashlib.sha256("\n".join([*command, version, *arguments(isa)]).encode())
    digest.update(platform.machine().encode())
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.name.encode() + source.read_bytes())
    return cache_folder() / f"sparse_nas-{isa}-{digest.hexdigest()[:16]}.so"


def build(isa: str) -> Path:
    """The compiled library, made where it is not there yet.

    Args:
        isa: "avx512", "avx2" or "scalar".

    Raises:
        BuildError: no compiler, it failed, or the cache cannot be written.
    """
    path = library_path(isa)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(isa, path)
    except OSError as error:
        raise BuildError(f"cannot write the cache: {error}") from error
    return path


def _compile(isa: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        _run([*compiler(), *arguments(isa), str(SOURCES / "sparse_nas.cpp"), "-o", str(made)])
        made.replace(path)


def arguments(isa: str) -> list[str]:
    """The compiler's flags for an instruction set."""
    return [*_FLAGS, *_ISA_FLAGS[isa], f"-DSN_LANES={LANES[isa]}"]


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{shlex.join(command)} failed:\n{error.stderr[:2000]}") from error


if __name__ == "__main__":
    try:
        print(build(supported()[0]))
    except BuildError as error:
        raise SystemExit(f"sparse kernels will run as plain PyTorch: {error}") from None
