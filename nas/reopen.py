"""Opening a finished run again, to read what it found: nothing is asked, trained or written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.costs import COSTS, Cost
from nas.data import TASKS
from nas.evaluate import Evaluate
from nas.recipes import RECIPES, recipe_from
from nas.run import Record, Run, make_space
from nas.space import Space
from nas.sparsity import DENSE, Unstructured
from nas.store import Store, check_order
from nas.tasks import load_task
from nas.training import Training
from nas.trial import Objective, Problem, Report, Result, Trial

if TYPE_CHECKING:
    from torch import nn

    from nas.tasks import Task


@dataclass(frozen=True)
class PastFit:
    """What the log keeps of a strategy's own training: its name and its plain values."""

    description: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of its class."""
        return str(self.description["name"])

    def fit(self, network: nn.Module, task: Task, budget: int, report: Report) -> dict[str, float]:
        """Refuse: it is read from a log, and the strategy alone can make it again."""
        raise ValueError(f"{self.name}: a training read from a log cannot be run")


def open_run(
    folder: str | Path,
    evaluate: Evaluate | None = None,
    space: Space | None = None,
    *,
    model: Callable[[], nn.Module] | None = None,
    data: Path | None = None,
) -> Run:
    """Open the folder of a search for reading; the search may have been interrupted.

    Args:
        folder: The run's folder.
        evaluate: How it trained and measured; by default made again from `run.json`.
        space: Where it searched; by default made again by `search_spaces`.
        model: For a space that `sparsify` made of your own module: the function that makes the
            module. Give `space` where `sparsify` was called with `per="model"` and `skip`.
        data: The data folder of its task; None takes the run's own, then the environment variable
            NAS_DATA.

    Returns:
        The run with the records of every trial that ended.

    Raises:
        ValueError: No run lies there, another process is writing to it, or it cannot be made
            again without `evaluate`, `space` or `model`.
        FileNotFoundError: The data of its task are not in the data folder.
    """
    folder = Path(folder)
    if not (folder / "run.json").exists():
        raise ValueError(f"{folder}: holds no run (no run.json)")
    store = Store(folder)
    try:
        described, events = store.read("run.json"), store.events()
        check_order(events)
    finally:
        store.close()
    evaluate = evaluate or _evaluate(described, data)
    if model is not None:
        space = _sparsified(model, evaluate, described["choices"])
    run = Run(store, _problem(_same_space(space, described["space"]), described), evaluate)
    run.records = _records(events)
    _add_test_metrics(run)
    return run


def _sparsified(
    model: Callable[[], nn.Module], evaluate: Evaluate, choices: Sequence[Mapping[str, Any]]
) -> Space:
    """What `sparsify` made of a module, from the choices that it gave."""
    from nas.module_space import sparsify

    if evaluate.task is None:
        raise ValueError("open_run: model= needs a run with a task; give it the space instead")
    example, labels = evaluate.task.example_input(), {c["name"]: c["labels"] for c in choices}
    if "ratio" in labels:
        options = [Unstructured(ratio) if ratio else DENSE for ratio in labels["ratio"]]
        return sparsify(model, example, options, per="model")
    levels = _merged(labels.values())
    tensors = sparsify(model, example, levels).tensors
    skip = [path for path in tensors if f"{path.replace('.', '/')}/sparsity" not in labels]
    return sparsify(model, example, levels, skip=skip)


def _merged(series: Iterable[Sequence[str]]) -> list[str]:
    """One order of labels that each series, which may leave some out, agrees with."""
    merged: list[str] = []
    for labels in series:
        place = 0
        for label in labels:
            if label not in merged:
                merged.insert(place, label)
            place = merged.index(label) + 1
    return merged


def _same_space(space: Space | None, described: Mapping[str, Any]) -> Space:
    found: Space = make_space(described["origin"]) if space is None else space
    if found.fingerprint != described["fingerprint"]:
        raise ValueError(
            f"run.json: the run's space is {described['fingerprint']}, got {found.fingerprint}"
        )
    return found


def _problem(space: Space, described: Mapping[str, Any]) -> Problem:
    objectives = tuple(Objective(**o) for o in described["objectives"])
    return Problem(
        space, objectives, described["limits"], described["trials"], described["epochs"]
    )


def _evaluate(described: Mapping[str, Any], data: Path | None) -> Evaluate:
    name = described["task"]
    if name not in TASKS:
        raise ValueError(
            f"run.json: task {name!r} is none of {', '.join(TASKS)}; give open_run an evaluate="
        )
    given = described["arguments"]  # of scripts/search.py, whose seed splits the data too
    task = load_task(name, data or _path(given.get("data")), given.get("seed", 0))
    costs = [_cost(**cost) for cost in described["costs"]]
    return Evaluate(task, costs=costs, training=_training(described["training"]))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _cost(name: str, **settings: Any) -> Cost:
    if name not in COSTS:
        raise ValueError(f"run.json: cost {name!r} is your own; give open_run an evaluate=")
    return COSTS[name](**settings)


def _training(described: Mapping[str, Any]) -> Training:
    names = {kind.__name__: name for name, kind in RECIPES.items()}
    settings: dict[str, Any] = dict(described["recipe"])
    kind = str(settings.pop("name"))
    recipe = recipe_from(names.get(kind, kind), **settings)
    return Training(**{**described, "recipe": recipe})


def _records(events: Sequence[Mapping[str, Any]]) -> dict[int, Record]:
    asked = {event["trial"]: _trial(event) for event in events if event["event"] == "ask"}
    told = [event for event in events if event["event"] == "tell"]
    return {event["trial"]: Record(asked[event["trial"]], _result(event)) for event in told}


def _trial(event: Mapping[str, Any]) -> Trial:
    fit = PastFit(event["fit"]) if event["fit"] else None
    return Trial(event["trial"], event["picks"], event["budget"], event["parent"], fit)


def _result(event: Mapping[str, Any]) -> Result:
    return Result(**{f.name: event[f.name] for f in fields(Result) if f.name in event})


def _add_test_metrics(run: Run) -> None:
    """What the search read from the test part when it ended, for its front."""
    for point in (run.store.read("pareto.json") or {"points": []})["points"]:
        run.records[point["trial"]].test = point["test"]
