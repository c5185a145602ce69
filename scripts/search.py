"""Search a sparse network for a task and a device.

python scripts/search.py                                   # digits, a few minutes
python scripts/search.py --dry-run                         # what would it take?
python scripts/search.py --task fashion-mnist --data DIR --limit latency_ms=0.5
python scripts/search.py --space cell --strategy darts --task cifar10 --device cuda
python scripts/search.py --executor ray --workers 4
python scripts/search.py --resume runs/NAME                # go on after an interruption
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from dataclasses import fields
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nas.costs import COSTS
from nas.data import TASKS, check_data
from nas.problem import Direction, check_limits, make_problem
from nas.store import read_json, read_tensors
from scripts.options import check_known, has_driver, pairs

if TYPE_CHECKING:
    from nas.evaluate import Evaluate
    from nas.run import Run
    from nas.space import Space
    from nas.trial import Strategy

SPACES = {
    "mlp": "search_spaces.mlp:mlp",
    "cell": "search_spaces.cell:cell",
    "sparsify": "search_spaces.sparsified:sparsified",
}
WITHOUT_TORCH = {**SPACES, "sparsify": "search_spaces.sparsified:resnet"}
STRATEGIES = {
    "random": "strategies.random_search:RandomSearch",
    "evolution": "strategies.evolution:Evolution",
    "darts": "strategies.darts:Darts",
    "optuna": "strategies.optuna_search:OptunaSearch",
}
DEFAULTS = {
    "space": "mlp",
    "strategy": "evolution",
    "task": "digits",
    "trials": 16,
    "epochs": 6,
    "objectives": ["error", "latency_ms"],
    "limit": [],
    "seed": 0,
    "device": "cpu",
    "executor": "local",
    "workers": 1,
    "space_option": [],
    "strategy_option": [],
    "recipe": "magnitude",
    "lr": 2e-3,
    "batch_size": 128,
    "parent_epochs": 10,
    "data": None,
    "weights": None,
    "ray_address": None,
    "time_limit": None,
}
METRICS: dict[str, Direction] = {"error": "minimize", "loss": "minimize"}
RECIPES = ("magnitude", "one_shot", "random", "learned_scores")
FREE = "trials executor workers ray_address data out resume dry_run limit".split()


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        raise ValueError(message.removeprefix("argument "))


def parser() -> Parser:
    """The options; what is not given is absent, so that a resumed run keeps its own."""
    p = Parser(
        prog="search.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    what = p.add_argument_group("what to search")
    add = what.add_argument
    add("--space", choices=SPACES, help="search space (mlp)")
    add("--space-option", action="append", metavar="NAME=VALUE", help="of the space: cells=4")
    add("--task", choices=TASKS, help="what networks are to do (digits)")
    add("--data", type=Path, metavar="DIR", help="where data sets lie (environment: NAS_DATA)")
    add("--weights", type=Path, metavar="FILE", help="sparsify: safetensors to start from")
    add("--parent-epochs", type=int, metavar="N", help="sparsify without weights: epochs (10)")
    how = p.add_argument_group("how to search")
    add = how.add_argument
    add("--strategy", choices=STRATEGIES, help="who proposes architectures (evolution)")
    add("--strategy-option", action="append", metavar="NAME=VALUE", help="such as population=10")
    add("--objectives", nargs="+", metavar="NAME", help="metrics and costs (error latency_ms)")
    add("--limit", action="append", metavar="COST=VALUE", help="such as latency_ms=2; repeatable")
    add("--trials", type=int, metavar="N", help="networks to train (16)")
    add("--epochs", type=int, metavar="N", help="epochs of each (6)")
    add("--recipe", choices=RECIPES, help="how masks come to be (magnitude)")
    add("--lr", type=float, metavar="RATE", help="learning rate (0.002)")
    add("--batch-size", type=int, metavar="N", help="samples in a step (128)")
    add("--seed", type=int, metavar="N", help="of everything (0)")
    where = p.add_argument_group("where to run")
    add = where.add_argument
    add("--device", choices=("cpu", "cuda"), help="where networks train and are measured (cpu)")
    add("--executor", choices=("local", "ray"), help="which processes train (local)")
    add("--ray-address", metavar="ADDRESS", help="of a Ray cluster; otherwise one is started")
    add("--workers", type=int, metavar="N", help="trials at a time (1)")
    add("--time-limit", type=float, metavar="SECONDS", help="after which a trial is given up")
    add("--out", type=Path, metavar="DIR", help="the run's folder (runs/TIME-SPACE-STRATEGY)")
    add("--resume", type=Path, metavar="DIR", help="go on with the run in this folder")
    add("--dry-run", action="store_true", help="sizes, costs and one trial timed; no search")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the script; 2 for wrong input, 130 after Ctrl-C."""
    try:
        arguments = settings(vars(parser().parse_args(argv)))
        check_options(arguments)
        strategy, space = make_strategy(arguments), make_space(arguments, WITHOUT_TORCH)
        check(arguments, space, strategy)
        if arguments["space"] == "sparsify":
            space = make_space(arguments, weights=parent(arguments, space))
        check_resumed(arguments, space)
        return run(arguments, space, strategy)
    except (ValueError, OSError) as error:
        print(f"search.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside of the search, which ends by itself
        print("search.py: interrupted", file=sys.stderr)
        return 130


def settings(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults, under what a resumed run was started with, under what is given now."""
    held: dict[str, Any] = {}
    if "resume" in given:
        if "out" in given:
            raise ValueError("--resume names the run's folder: leave --out away")
        held = _described(given["resume"])["arguments"]
        changed = [k for k in given if k in held and k not in FREE and given[k] != held[k]]
        if changed:
            name = changed[0]
            raise ValueError(
                f"--resume {given['resume']}: --{name.replace('_', '-')} was {held[name]}, "
                f"is {given[name]}; leave it away or start a new run"
            )
    arguments = {**DEFAULTS, **held, **given}
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{arguments['space']}-{arguments['strategy']}"
    arguments.setdefault("out", arguments.get("resume") or Path("runs") / name)
    return arguments


def _described(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    if not path.exists():
        raise ValueError(f"{folder}: holds no run to resume")
    described = read_json(path)
    if not described.get("arguments"):
        raise ValueError(f"{folder}: was not started by this script")
    return described


def make_space(
    arguments: dict[str, Any], spaces: dict[str, str] = SPACES, weights: Any = None
) -> Space:
    """The space, for the task's inputs and outputs; `weights` are those to sparsify."""
    options = pairs(arguments["space_option"])
    make = _imported(spaces[arguments["space"]])
    known = {n: p.default for n, p in list(signature(make).parameters.items())[2:]}
    known.pop("weights", None)
    check_known("--space-option", options, known)
    if weights is not None:
        options["weights"] = weights
    return make(TASKS[arguments["task"]], 10, **options)


def make_strategy(arguments: dict[str, Any]) -> Strategy:
    """The strategy with its options."""
    make = _imported(STRATEGIES[arguments["strategy"]])
    options = pairs(arguments["strategy_option"])
    known = {f.name: f.default for f in fields(make) if f.init and f.name != "seed"}
    check_known(f"--strategy {arguments['strategy']}: --strategy-option", options, known)
    return make(seed=arguments["seed"], **options)


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def limits(arguments: dict[str, Any]) -> dict[str, float]:
    """Limits by cost."""
    found = pairs(arguments["limit"])
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"--limit {name}={value}: needs a number")
    return found


def costs(arguments: dict[str, Any]) -> list[Any]:
    """Every analytic cost, and those measured ones that are asked for."""
    wanted = {*arguments["objectives"], *limits(arguments)}
    made = [make() for name, make in COSTS.items() if name != "latency_ms"]
    if "latency_ms" in wanted:
        made.append(COSTS["latency_ms"](device=arguments["device"]))
    return made


def check_options(arguments: dict[str, Any]) -> None:
    """What can be wrong whatever the space."""
    check_data(arguments["task"], arguments["data"])
    check_limits(limits(arguments), COSTS)
    for name in arguments["objectives"]:
        if name not in {**METRICS, **COSTS}:
            raise ValueError(f"objective {name!r} is none of {sorted({**METRICS, **COSTS})}")
    if arguments["weights"] and not arguments["weights"].exists():
        raise ValueError(f"--weights {arguments['weights']}: no such file")
    if arguments["device"] == "cuda" and not has_driver():
        raise ValueError("--device cuda: there is no NVIDIA driver on this machine")
    for name in ("workers", "parent_epochs", "batch_size", "lr", "time_limit"):
        value = arguments[name]
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    if arguments["seed"] < 0:
        raise ValueError(f"--seed must be at least 0, got {arguments['seed']}")
    if arguments["ray_address"] and arguments["executor"] != "ray":
        raise ValueError("--ray-address goes with --executor ray")


def check(arguments: dict[str, Any], space: Space, strategy: Strategy) -> None:
    """What can be wrong with this space; needs no torch to see."""
    problem = make_problem(
        space,
        arguments["objectives"],
        limits(arguments),
        arguments["trials"],
        arguments["epochs"],
        metrics=METRICS,
        costs=costs(arguments),
    )
    strategy.start(problem)
    out = arguments["out"]
    if "resume" not in arguments and (out / "run.json").exists():
        raise ValueError(f"{out}: holds a run already; --resume it, or choose another folder")


def check_resumed(arguments: dict[str, Any], space: Space) -> None:
    """Raise ValueError for a resumed run whose space is another by now."""
    if "resume" in arguments:
        before = _described(arguments["resume"])["space"]["fingerprint"]
        if before != space.fingerprint:
            raise ValueError(
                f"{arguments['out']}: a run of space {before}, this one is {space.fingerprint}"
            )


def parent(arguments: dict[str, Any], space: Space) -> Any:
    """Trained weights for `sparsify`: those given, or of a dense network trained first."""
    import torch
    from safetensors.torch import save_file

    place = arguments["weights"] or arguments["out"] / "parent.safetensors"
    if place.exists() or arguments["weights"]:
        return read_tensors(place)
    from nas.masks import weights
    from nas.tasks import load_task
    from nas.training import Training

    task = load_task(arguments["task"], arguments["data"], arguments["seed"])
    torch.manual_seed(arguments["seed"])
    model = space.build(space.largest(), masked=False)
    print(f"training the dense parent for {arguments['parent_epochs']} epochs ...", flush=True)
    training = Training(arguments["batch_size"], lr=arguments["lr"])
    metrics, _ = training(
        model.to(arguments["device"]),
        task,
        arguments["parent_epochs"],
        lambda *_: True,
        arguments["seed"],
    )
    print(f"dense parent: validation error {metrics['error']:.4f}")
    trained = weights(model.cpu())
    if not arguments.get("dry_run"):
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(trained, place)
    return trained


def make_evaluate(arguments: dict[str, Any]) -> Evaluate:
    """How a trial is trained and what it costs."""
    from nas.evaluate import Evaluate
    from nas.recipes import recipe_from
    from nas.tasks import load_task
    from nas.training import Training

    recipe = recipe_from(arguments["recipe"])
    training = Training(arguments["batch_size"], lr=arguments["lr"], recipe=recipe)
    return Evaluate(
        load_task(arguments["task"], arguments["data"], arguments["seed"]),
        costs=costs(arguments),
        training=training,
        device=arguments["device"],
        time_limit_s=arguments["time_limit"],
    )


def make_executor(arguments: dict[str, Any]) -> Any:
    """Where trials train."""
    if arguments["executor"] == "ray":
        from nas.executors.ray_tune import RayTune

        return RayTune(arguments["workers"], arguments["ray_address"])
    if arguments["workers"] > 1:
        from nas.executors.processes import Processes

        return Processes(arguments["workers"])
    from nas.executors import InProcess

    return InProcess()


def run(arguments: dict[str, Any], space: Space, strategy: Strategy) -> int:
    """Search, and print what was found."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    evaluate = make_evaluate(arguments)
    if arguments.get("dry_run"):
        from nas.dry_run import dry_run

        print(f"space {arguments['space']}: {space.size():,} architectures")
        plan = (arguments["trials"], arguments["epochs"], arguments["workers"])
        for line in dry_run(space, evaluate, arguments["seed"], *plan):
            print(line, flush=True)
        return 0
    from nas.console import Progress, pareto_table
    from nas.executors import NoWorkers
    from nas.loop import search
    from nas.tensorboard import TensorBoard

    try:
        done = search(
            space,
            strategy,
            evaluate,
            out=arguments["out"],
            objectives=arguments["objectives"],
            limits=limits(arguments),
            trials=arguments["trials"],
            epochs=arguments["epochs"],
            executor=make_executor(arguments),
            callbacks=[Progress(), TensorBoard()],
            resume="resume" in arguments,
            arguments=kept(arguments),
        )
    except NoWorkers as error:
        print(f"search.py: {error}", file=sys.stderr)
        return 1
    print(pareto_table(done))
    return finished(done)


def kept(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as plain JSON, for `run.json`; not where it lies or is resumed from."""
    held = {k: v for k, v in arguments.items() if k not in ("out", "resume", "dry_run")}
    return json.loads(json.dumps(held, default=lambda path: str(Path(path).resolve())))


def finished(done: Run) -> int:
    """Say how the search ended; its exit code."""
    if done.note:
        print(done.note)
    if done.interrupted:
        print(f"interrupted; go on with: python scripts/search.py --resume {done.folder}")
        return 130
    return 0 if done.usable() else 1


if __name__ == "__main__":
    sys.exit(main())
