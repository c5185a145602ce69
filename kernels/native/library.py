"""The C core as Python sees it: loaded once, its functions bound."""

import ctypes
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

OK, MALFORMED, MISMATCH, UNCHECKED = range(4)
_POINTER, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_FLOAT = ctypes.c_float
_WEIGHT = [_POINTER, _INT64, _POINTER]
_LINEAR = [_POINTER, _INT64, _INT64, *_WEIGHT, _POINTER, _INT64, _INT, _INT]
_CONV2D = [_POINTER, _POINTER, *_WEIGHT, _POINTER, _INT, _INT]
_CHAIN = [_POINTER, _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _INT, _POINTER]


@dataclass(frozen=True, eq=False)
class Library:
    """The C functions; `linear`, `conv2d` and `chain` return a status.

    `multiply_adds(count)` and `reads(address, floats, times)` do that and nothing else.
    """

    isa: str
    linear: Callable[..., int]
    conv2d: Callable[..., int]
    chain: Callable[..., int]
    mark_checked: Callable[[int, int], None]
    poison: Callable[[bool], None]
    multiply_adds: Callable[[int], float]
    reads: Callable[[int, int, int], float]


@cache
def library() -> Library | None:
    """The library for this machine; None where the plain PyTorch path is to be taken.

    `SPARSE_NAS_ISA` forces "avx512", "avx2", "scalar" or "torch".

    Raises:
        ValueError: `SPARSE_NAS_ISA` names none of these, or one that this machine lacks.
    """
    # not at the top: `python -m kernels.native.build` imports this module first
    from kernels.native.build import LANES, BuildError, build, supported

    isa = os.environ.get("SPARSE_NAS_ISA") or supported()[0]
    if isa == "torch":
        return None
    if isa not in supported():
        known = ", ".join([*LANES, "torch"])
        here = ", ".join([*supported(), "torch"])
        raise ValueError(f"SPARSE_NAS_ISA must be one of {known}, here of {here}; got {isa!r}")
    try:
        return _load(isa, build(isa))
    except (BuildError, OSError) as error:
        logging.getLogger("kernels").warning("sparse kernels run as plain PyTorch: %s", error)
        return None


def _load(isa: str, path: Path) -> Library:
    core = ctypes.CDLL(str(path))
    core.sn_threads.argtypes = [_POINTER] * 3
    core.sn_threads(*_openmp())
    return Library(
        isa,
        _bind(core.sn_linear, _INT, _LINEAR),
        _bind(core.sn_conv2d, _INT, _CONV2D),
        _bind(core.sn_program, _INT, _CHAIN),
        _bind(core.sn_checked, None, [_POINTER, _INT64]),
        _bind(core.sn_poison, None, [_INT]),
        _bind(core.sn_multiply_adds, _FLOAT, [_INT64]),
        _bind(core.sn_reads, _FLOAT, [_POINTER, _INT64, _INT64]),
    )


def _bind(function: Any, result: Any, arguments: list[Any]) -> Any:
    function.restype, function.argtypes = result, arguments
    return function


def _openmp() -> tuple[Any, Any, Any]:
    """Entry points of the OpenMP runtime that torch has loaded, so that there is one team only."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    for path in (None, *_loaded("omp")):
        runtime = ctypes.CDLL(path)
        if all(hasattr(runtime, name) for name in names):
            first, second, third = (ctypes.cast(getattr(runtime, n), _POINTER) for n in names)
            return first, second, third
    return None, None, None


def _loaded(word: str) -> list[str]:
    """Libraries mapped into this process whose file name holds a word."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    files = {line.split()[-1] for line in lines if "/" in line}
    return sorted(file for file in files if word in Path(file).name and ".so" in file)
