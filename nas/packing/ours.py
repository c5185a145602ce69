"""Whether the package named `kernels` is this project's."""

from importlib.util import find_spec
from pathlib import Path


def check_kernels() -> None:
    """Raise ImportError, in one line, where another package named `kernels` is found first."""
    spec = find_spec("kernels")
    origin = spec.origin if spec else None
    if origin is None or not (Path(origin).parent / "native" / "build.py").exists():
        raise ImportError(
            f"the package named kernels is not this project's but {origin}: see "
            "'Another package named kernels' in the README"
        )
