"""A run: its records, its front, and the networks that it found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas import front
from nas.choices import Picks
from nas.evaluate import Evaluate
from nas.store import State, Store, read_json, read_tensors
from nas.trial import Problem, Result, Trial

if TYPE_CHECKING:
    from torch import nn

VERSION = 1


@dataclass
class Record:
    """A trial and what became of it; `test` holds test metrics, once the run has ended."""

    trial: Trial
    result: Result
    test: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Point:
    """One network that a run found."""

    run: Run
    record: Record

    @property
    def number(self) -> int:
        """Number of its trial."""
        return self.record.trial.number

    @property
    def picks(self) -> Picks:
        """Its architecture's picks."""
        return self.record.trial.picks

    @property
    def metrics(self) -> dict[str, float]:
        """Validation metrics and costs."""
        return self.record.result.metrics

    def module(self) -> nn.Module:
        """The trained network, masked, in eval mode."""
        run = self.run
        return run.evaluate.rebuild(run.problem.space, self.picks, run.state(self.record))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for `pareto.json` and `best/architecture.json`."""
        space, result = self.run.problem.space, self.record.result
        origin = space.origin
        made = (
            {"function": origin.function, "arguments": dict(origin.arguments)} if origin else None
        )
        return {
            "version": VERSION,
            "space": {"fingerprint": space.fingerprint, "origin": made},
            "trial": self.number,
            "architecture": space.architecture(self.picks).id,
            "picks": self.picks,
            "budget": self.record.trial.budget,
            "metrics": result.metrics,
            "test": self.record.test,
            "details": result.details,
        }


class Run:
    """What a search has done so far, and where it lies.

    Args:
        store: The folder.
        problem: What was searched for.
        evaluate: How.
    """

    def __init__(self, store: Store, problem: Problem, evaluate: Evaluate) -> None:
        self.store, self.problem, self.evaluate = store, problem, evaluate
        self.records: dict[int, Record] = {}
        self.interrupted = False
        self.note = ""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.store.folder

    def counted(self) -> int:
        """Closed trials that were trained, or failed."""
        return sum(
            r.result.status != "refused" and self.is_closed(r) for r in self.records.values()
        )

    def is_closed(self, record: Record) -> bool:
        """Whether the trial left no choice open."""
        return not self.problem.space.open(record.trial.picks)

    def usable(self) -> list[Record]:
        """Closed trials with metrics that count."""
        return [r for r in self.records.values() if r.result.usable and self.is_closed(r)]

    def front(self) -> list[Point]:
        """The feasible non-dominated networks, best in the first objective first."""
        records = self.usable()
        losses = [self.problem.losses(r.result) for r in records]
        best = front.pareto(losses, [r.result.violations for r in records])
        return [Point(self, records[i]) for i in best]

    def state(self, record: Record) -> State:
        """What a trial trained, or the equal one before it whose result it took."""
        number, source = record.trial.number, record.result.same_as
        return State.load(self.store.checkpoint(number if source is None else source))

    def best(self, objective: str | None = None, **limits: float) -> Point:
        """The point of the front that is best in one objective within limits.

        Args:
            objective: Name of a metric or cost; the first objective by default.
            limits: Upper bounds of metrics or costs.

        Raises:
            LookupError: No point of the front is within the limits.
        """
        by = next((o for o in self.problem.objectives if o.name == objective), None)
        by = by or self.problem.objectives[0]
        if objective not in (None, by.name):
            raise ValueError(f"best: {objective!r} is not an objective of this run")
        fits = [p for p in self.front() if all(p.metrics[k] <= v for k, v in limits.items())]
        if not fits:
            raise LookupError(f"best: no network of the front has {limits or 'all limits kept'}")
        return min(fits, key=lambda p: by.loss(p.metrics))


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The network in `RUN/best`: masked weights in a plain module, in eval mode.

    Args:
        folder: Holds `architecture.json` and `weights.safetensors`.
        model: For a space made by `sparsify` of your own module: that module, made anew.

    Raises:
        ValueError: The space cannot be made again without `model`, or is not the one of the file.
    """
    folder = Path(folder)
    described = read_json(folder / "architecture.json")
    module = model if model is not None else _remade(described)
    module.load_state_dict(read_tensors(folder / "weights.safetensors"))
    return module.eval()


def _remade(described: Mapping[str, Any]) -> nn.Module:
    space = make_space(described["space"]["origin"])
    if space.fingerprint != described["space"]["fingerprint"]:
        raise ValueError(
            f"architecture.json: its space is {described['space']['fingerprint']}, "
            f"search_spaces makes {space.fingerprint}"
        )
    return space.build(described["picks"], masked=False)


def make_space(origin: Mapping[str, Any] | None) -> Any:
    """The space that a function of `search_spaces` makes; for a user's own model none does."""
    import importlib

    if origin is None:
        raise ValueError("this architecture is of a model of your own: nas.load(..., model=...)")
    module, _, function = origin["function"].partition(":")
    if not module.startswith("search_spaces."):
        raise ValueError(f"a space is made by search_spaces only, got {origin['function']!r}")
    return getattr(importlib.import_module(module), function)(**origin["arguments"])
