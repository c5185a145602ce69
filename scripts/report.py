"""Report on a finished search: its front beside dense twins, the dense parent and random networks.

python scripts/report.py runs/NAME                         # some minutes; RUN/report/report.md
python scripts/report.py runs/NAME --seeds 2 --no-baseline --no-compile
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nas.store import read_json, read_tensors

if TYPE_CHECKING:
    from nas.run import Run
    from nas.space import Space


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print where it lies and what it comes to."""
    given = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return _report(given)
    except (ValueError, OSError, ImportError) as error:
        print(f"report.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """What the command line understands."""
    made = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("run", type=Path, help="folder of the search")
    made.add_argument("--data", type=Path, help="data folder (default: the variable NAS_DATA)")
    made.add_argument("--seeds", type=int, default=5, help="trainings of each network")
    made.add_argument("--baseline-networks", type=int, default=5, help="random networks")
    made.add_argument("--baseline-seeds", type=int, default=3, help="trainings of each of them")
    made.add_argument("--no-baseline", action="store_true", help="no random networks")
    made.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="batches to time")
    made.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    made.add_argument("--model", help="module:factory of your own model or space")
    return made


def _report(given: argparse.Namespace) -> int:
    from nas.reporting import Plan, make_report, summary, write_report

    networks = 0 if given.no_baseline else given.baseline_networks
    batches, compiled = tuple(given.batches), not given.no_compile
    plan = Plan(given.seeds, networks, given.baseline_seeds, batches, compiled)
    run = _open(given)
    report = make_report(run, plan)
    print(write_report(run, report))
    print(*(f"- {line}" for line in summary(report)), sep="\n")
    return 0


def _open(given: argparse.Namespace) -> Run:
    from nas.reopen import open_run
    from nas.space import Space

    if given.model is None:
        return open_run(given.run, space=_sparsified(given.run), data=given.data)
    module, _, function = given.model.partition(":")
    factory = getattr(import_module(module), function, None)
    if factory is None:
        raise ValueError(f"--model {given.model}: {module} has no function {function!r}")
    made = factory()
    if isinstance(made, Space):
        return open_run(given.run, space=made, data=given.data)
    return open_run(given.run, model=factory, data=given.data)


def _sparsified(folder: Path) -> Space | None:
    """The space of `search.py --space sparsify`, from the weights that its search began with."""
    described = folder / "run.json"
    arguments = read_json(described)["arguments"] if described.exists() else {}
    if arguments.get("space") != "sparsify":
        return None
    from scripts.search import make_space

    weights = Path(arguments["weights"] or folder / "parent.safetensors")
    return make_space(arguments, weights=read_tensors(weights))


if __name__ == "__main__":
    sys.exit(main())
