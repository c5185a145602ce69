"""Draw a run: its front, and the best architecture (of a cell space: its cells).

python scripts/draw.py RUN --out DIR          # DIR/front.png and DIR/architecture.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    """Write the pictures; 2 for wrong input."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a search")
    parser.add_argument("--data", type=Path, help="data folder (default: the variable NAS_DATA)")
    parser.add_argument("--out", type=Path, default=Path(), help="where pictures go (here)")
    given = parser.parse_args()
    try:
        draw(given.run, given.out, given.data)
    except (ValueError, OSError) as error:
        print(f"draw.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def draw(folder: Path, out: Path, data: Path | None = None) -> None:
    """The architecture needs no data; the front needs the task that the run was made with."""
    from nas.pictures import architecture_picture, front_picture
    from nas.reopen import open_run
    from nas.run import make_space

    out.mkdir(parents=True, exist_ok=True)
    best = json.loads((folder / "best" / "architecture.json").read_text())
    space = make_space(best["space"]["origin"])
    _save(architecture_picture(space, best["picks"], best["details"]), out / "architecture.png")
    _save(front_picture(open_run(folder, data=data)), out / "front.png")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
