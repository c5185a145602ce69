import numpy as np
import pytest

from kernels.limits import Limits, limits
from kernels.native.library import library


def test_a_core_has_limits_that_stay(isa: str) -> None:
    core = limits()
    if isa == "torch":
        assert core is None
        return
    assert core is not None and core.multiply_adds > 0
    sizes = (0, 1 << 12, 40_000, 1 << 20)
    first = [core.bandwidth(size) for size in sizes]
    again = limits()
    assert again is not None and again.multiply_adds == core.multiply_adds
    assert [again.bandwidth(size) for size in sizes] == first
    assert min(first) > 0


def test_sizes_between_and_beyond_are_those_of_the_nearest_power(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kernels.limits._bandwidth", lambda core, power: float(power))
    core = Limits(None)  # type: ignore[arg-type]
    sizes = (0, 1, 1 << 12, 40_000, 1 << 20, 3 << 20, 1 << 26, 1 << 40)
    assert [core.bandwidth(size) for size in sizes] == [12, 12, 12, 15, 20, 22, 26, 26]


def test_the_least_time_is_that_of_what_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.limits._bandwidth", lambda core, power: 1e9)
    monkeypatch.setattr("kernels.limits._multiply_adds", lambda core: 1e10)
    core = Limits(None)  # type: ignore[arg-type]
    assert core.least_us(1e6, 1e4) == pytest.approx(100.0)
    assert core.least_us(1e4, 1e6) == pytest.approx(1000.0)


def test_all_of_a_buffer_is_read_so_often(isa: str) -> None:
    core = library()
    if core is None:
        pytest.skip("nothing is compiled")
    lanes = {"avx512": 16, "avx2": 8, "scalar": 4}[isa]
    buffer = np.ones(1024, np.float32)
    assert core.reads(buffer.ctypes.data, 1024, 3) == 3 * 1024 / lanes
    buffer[-1] = 2.0  # in the last lane, which is the one that comes back
    assert core.reads(buffer.ctypes.data, 1024, 3) == 3 * 1024 / lanes + 3


def test_multiply_adds_are_done(isa: str) -> None:
    core = library()
    if core is None:
        pytest.skip("nothing is compiled")
    few, many = core.multiply_adds(192), core.multiply_adds(192 * 10_000)
    assert 12 * 13 / 2 < few < many < 1000
