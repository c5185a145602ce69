"""Look at a run's TensorBoard in a browser: python scripts/look.py RUN --out DIR.

Starts TensorBoard on a free port, opens each tab in headless Chromium, waits for what must be on
it, and saves a screenshot of each. Needs chromium, its driver and selenium.
"""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAIT_S = 60.0
READ = """
const words = [];
const visit = (node) => {
  if (node.nodeType === Node.TEXT_NODE) words.push(node.textContent.trim());
  if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.nodeName)) return;
  if (node.shadowRoot) visit(node.shadowRoot);
  node.childNodes.forEach(visit);
};
visit(document.body);
return words.filter(Boolean).join('\\n');
"""
ACTUAL_SIZE = """
const visit = (node) => {
  const box = node.nodeName === 'PAPER-CHECKBOX' && node.textContent.includes('actual image size');
  if (box && !node.checked) node.click();
  if (node.shadowRoot) visit(node.shadowRoot);
  node.childNodes.forEach(visit);
};
visit(document.body);
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was seen; 1 where something was missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--out", type=Path, required=True, help="where screenshots go")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    expected = expectations(options.run)
    seen = look(options.run / "tensorboard", expected, options.out)
    for tab, text in seen.items():
        gone = [e for e in expected[tab] if e not in text]
        print(f"{tab}: {options.out / tab}.png, {f'missing {gone}' if gone else 'all there'}")
    return int(any(e not in seen[tab] for tab in seen for e in expected[tab]))


def expectations(run: Path) -> dict[str, list[str]]:
    """Texts that each tab must show, by `run.json`."""
    described = json.loads((run / "run.json").read_text())
    objectives = [o["name"] for o in described["objectives"]]
    choices = [c["name"] for c in described["choices"][:3]]
    return {
        "timeseries": ["search", "best", *objectives],
        "scalars": ["search", "trials/0000", *(f"best/{name}" for name in objectives)],
        "images": ["front", "best_architecture"],
        "hparams": [*choices, *objectives],
        "text": ["run", described["space"]["fingerprint"], *choices],
    }


def look(
    folder: Path, expected: Mapping[str, Sequence[str]], out: Path | None = None
) -> dict[str, str]:
    """The text on each tab, once all that is expected is there or a minute has passed.

    Args:
        folder: What TensorBoard is started on.
        expected: Texts to wait for, by tab.
        out: Where a screenshot of each tab is saved.
    """
    with tensorboard(folder) as address, browser() as driver:
        seen = {}
        for tab, texts in expected.items():
            seen[tab] = read(driver, f"{address}/?tab={tab}#{tab}", texts)
            if out is not None:
                driver.save_screenshot(str(out / f"{tab}.png"))
        return seen


def read(driver: Any, address: str, texts: Sequence[str]) -> str:
    """The text of a page when it holds these, or as it is after a minute."""
    driver.get(address)
    until, found = time.monotonic() + WAIT_S, ""
    while time.monotonic() < until and not (found and all(t in found for t in texts)):
        time.sleep(0.5)
        found = driver.execute_script(READ)
    driver.execute_script(ACTUAL_SIZE)
    time.sleep(1.5)  # what is drawn fades in
    return found


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """TensorBoard at work on a folder; yields its address once it knows a run."""
    port = free_port()
    options = ["--logdir", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "tensorboard.main", *options, "--reload_interval", "1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield _answering(f"http://127.0.0.1:{port}", server)
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answering(address: str, server: subprocess.Popen[bytes]) -> str:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/data/runs", timeout=5) as answer:
                if json.load(answer):
                    return address
        except OSError:
            pass  # it does not listen yet
        time.sleep(0.3)
    raise RuntimeError(f"tensorboard: no run known at {address}, exit code {server.poll()}")


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium. Raises RuntimeError if it or its driver is not installed."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    places = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in places.values():
        raise RuntimeError(f"look: needs chromium and chromedriver, found {places}")
    options = ChromeOptions()
    options.binary_location = str(places["chromium"])
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_argument("--window-size=1700,1500")
    driver = Chrome(options, ChromeService(str(places["chromedriver"])))
    try:
        yield driver
    finally:
        driver.quit()


if __name__ == "__main__":
    raise SystemExit(main())
