"""Set up a virtual environment: torch first and alone, then this project, then its kernels.

usage: python set_up.py FOLDER TORCH    (TORCH: a requirement such as torch==2.13.0)

Run by `make`; needs nothing but Python. A torch of at least 2.11 that the environment or this
Python already has is kept.
"""

import subprocess
import sys
from pathlib import Path

LEAST = (2, 11)
FIND = f"""
from importlib.metadata import PackageNotFoundError, version
try:
    found = tuple(int(part) for part in version("torch").split("+")[0].split(".")[:2])
except PackageNotFoundError:
    found = (0, 0)
raise SystemExit(found < {LEAST})
"""


def main(folder: Path, torch: str) -> None:
    """Make what is missing."""
    python = folder / "bin" / "python"
    if not python.exists():
        inherit = ["--system-site-packages"] if has_torch(Path(sys.executable)) else []
        run(sys.executable, "-m", "venv", *inherit, str(folder))
    if not has_torch(python):
        run(str(python), "-m", "pip", "install", "--quiet", torch)
    run(str(python), "-m", "pip", "install", "--quiet", "--editable", ".[test]")
    run(str(python), "kernels/native/build.py")


def has_torch(python: Path) -> bool:
    """Whether an interpreter has a torch that is recent enough."""
    return subprocess.run([str(python), "-c", FIND], check=False).returncode == 0


def run(*command: str) -> None:
    """Run a command, shown first; stop where it fails."""
    print("$", *command, flush=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
