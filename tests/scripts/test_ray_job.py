"""The search script as a job of a Ray cluster, the way the README has it."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.executor_helpers import left_running, told

pytestmark = pytest.mark.ray
pytest.importorskip("aiohttp", reason="the job server needs ray[default]")

BIN = Path(sys.executable).parent
PROJECT = Path(__file__).parents[2]
PORTS = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port")
START = f"{BIN}/ray start --head --block --num-cpus 2"
SEARCH = (
    "python scripts/search.py --space mlp --strategy random --task digits --trials 2 --epochs 1 "
    "--objectives error parameters --executor ray"
)


def test_a_job_searches_on_the_cluster_that_it_was_sent_to(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with cluster() as (address, environment):
        submit = f"{BIN}/ray job submit --address {address} --working-dir . --"
        job = subprocess.run(
            [*submit.split(), *SEARCH.split(), "--out", str(out)],
            cwd=PROJECT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert job.returncode == 0, job.stdout + job.stderr
    assert [event["status"] for event in told(out).values()] == ["ok", "ok"]
    assert json.loads((out / "pareto.json").read_text())
    assert left_running(f"MARK={environment['MARK']}") == []


@contextmanager
def cluster() -> Iterator[tuple[str, dict[str, str]]]:
    """A cluster of this machine with a token of its own; its job server, and what to call it in.

    `ray stop` would end every cluster of this machine; a blocking `ray start` ends its own.
    """
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    options = [f"--{name}={port}" for name, port in ports.items()]
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
        "MARK": uuid.uuid4().hex,
    }
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        subprocess.Popen(
            [*START.split(), "--temp-dir", folder, *options],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as head,
    ):
        try:
            wait_for("block forever", head)
            yield f"http://127.0.0.1:{ports['dashboard-port']}", environment
        finally:
            head.terminate()
            head.communicate(timeout=60)


def wait_for(text: str, process: subprocess.Popen[str]) -> None:
    said = []
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if text in line:
            return
    raise AssertionError("".join(said))


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
