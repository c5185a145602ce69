"""What several files of tests compare with."""

from typing import Any

import pytest

from nas.executors import InProcess, cores
from tests.executor_helpers import run_search, told


@pytest.fixture(scope="session")
def found_here(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What `run_search` tells in this process, on one thread, by trial."""
    folder = tmp_path_factory.mktemp("here")
    with cores.on(cores.available()[:1]):
        run_search(folder, InProcess())
    return told(folder)
