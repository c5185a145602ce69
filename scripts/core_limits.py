"""What one core can do at most: multiply-adds a second, and bytes read from buffers of a size."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from kernels.native.build import LANES, arguments, compiler, supported

_SOURCE = r"""
#define SHOWN extern "C" __attribute__((visibility("default")))
#define UNROLL _Pragma("GCC unroll 16")
typedef float vf __attribute__((vector_size(SN_LANES * 4)));
SHOWN float multiply_adds(long rounds) {
  vf a[12], b, c;
  for (int i = 0; i < SN_LANES; ++i) b[i] = 1.0f + 1e-7f * i, c[i] = 1e-7f * i;
  for (int k = 0; k < 12; ++k) a[k] = b * (float)(k + 1);
  for (long r = 0; r < rounds; ++r)
    UNROLL for (int k = 0; k < 12; ++k) a[k] = a[k] * b + c;
  vf sum = a[0];
  for (int k = 1; k < 12; ++k) sum += a[k];
  return sum[3];
}
SHOWN float reads(const float* p, long vectors, long rounds) {
  vf s[8] = {};
  for (long r = 0; r < rounds; ++r)
    for (long i = 0; i + 8 <= vectors; i += 8)
      UNROLL for (int k = 0; k < 8; ++k) s[k] += *(const vf*)(p + SN_LANES * (i + k));
  vf sum = s[0];
  for (int k = 1; k < 8; ++k) sum += s[k];
  return sum[5];
}
"""
_CHAINS, _SECONDS, _TRIES = 12, 0.02, 5


@dataclass(frozen=True)
class Limits:
    """The limits of one core, measured.

    Attributes:
        multiply_adds: a second, float32.
        reads: reads so many vectors at an address, so often.
    """

    multiply_adds: float
    reads: Callable[[int, int, int], float]

    def bandwidth(self, size: float) -> float:
        """Bytes a second when a buffer of `size` bytes is read again and again."""
        return _bandwidth(1 << max(12, round(np.log2(max(1.0, size)))))

    def least_us(self, multiply_adds: float, size: float) -> float:
        """The least microseconds that work of this kind can take."""
        return 1e6 * max(multiply_adds / self.multiply_adds, size / self.bandwidth(size))


@cache
def limits() -> Limits:
    """Measures the core; compiles a few lines of C++.

    Raises:
        BuildError: there is no compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "limits.cpp", Path(folder) / "limits.so"
        source.write_text(_SOURCE)
        flags = arguments(supported()[0])
        subprocess.run([*compiler(), *flags, str(source), "-o", str(made)], check=True)
        core = ctypes.CDLL(str(made))
    core.multiply_adds.argtypes, core.reads.argtypes = (
        [ctypes.c_long],
        [ctypes.c_void_p, ctypes.c_long, ctypes.c_long],
    )
    rate = _best(core.multiply_adds) * LANES[supported()[0]] * _CHAINS
    return Limits(rate, core.reads)


@cache
def _bandwidth(size: int) -> float:
    reads = limits().reads
    buffer = np.ones(size + 64, np.uint8)  # written: pages of their own
    start, vector = buffer.ctypes.data + -buffer.ctypes.data % 64, 4 * LANES[supported()[0]]
    return _best(lambda rounds: reads(start, size // vector, rounds)) * size


def _best(work: Callable[[int], Any]) -> float:
    """Rounds a second, the best of some tries."""
    rounds = 1
    while _seconds(work, rounds) < _SECONDS:
        rounds *= 2
    return rounds / min(_seconds(work, rounds) for _ in range(_TRIES))


def _seconds(work: Callable[[int], Any], rounds: int) -> float:
    begun = time.perf_counter()
    work(rounds)
    return time.perf_counter() - begun
