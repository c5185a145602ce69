"""Every kernel test runs on every instruction set of this machine, with poisoned memory."""

from collections.abc import Iterator

import pytest
import torch

from kernels.native.build import supported
from kernels.native.library import library


@pytest.fixture(scope="module", params=[*supported(), "torch"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces one variant; what a kernel leaves unwritten, or reads unwritten, is NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSE_NAS_ISA", request.param)
        library.cache_clear()
        lib, threads = library(), torch.get_num_threads()
        torch.set_num_threads(1)  # a second team would only spin beside other tests
        torch.use_deterministic_algorithms(True)
        if lib is not None:
            assert lib.isa == request.param
            lib.poison(True)
        yield request.param
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        if lib is not None:
            lib.poison(False)
    library.cache_clear()


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library is loaded anew in the test, and again after it."""
    monkeypatch.delenv("SPARSE_NAS_ISA", raising=False)
    library.cache_clear()
    yield
    library.cache_clear()
