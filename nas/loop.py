"""The loop: ask, check, train, measure, log, tell. It knows no strategy, space, task or device."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nas.callbacks import Callback
from nas.evaluate import Evaluate, Outcome
from nas.executors import Executor, InProcess
from nas.problem import make_problem
from nas.provenance import provenance
from nas.results import write_results
from nas.run import VERSION, Record, Run
from nas.space import Space
from nas.store import Store, check_order
from nas.trial import Objective, Problem, Result, Strategy, Trial

log = logging.getLogger("nas")
MOST_REFUSALS = 200


def search(
    space: Space,
    strategy: Strategy,
    evaluate: Evaluate,
    *,
    out: str | Path,
    objectives: Sequence[str | Objective] = ("error",),
    limits: Mapping[str, float] | None = None,
    trials: int = 50,
    epochs: int = 10,
    executor: Executor | None = None,
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    repeat: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Run:
    """Search a space, and leave the run's folder with all that was found.

    Args:
        space: Where to search.
        strategy: Who asks for trials.
        evaluate: How they are trained and what they cost.
        out: The run's folder.
        objectives: Metrics or costs; the first is the main one.
        limits: Upper bounds of costs.
        trials: Closed trials to train.
        epochs: Budget of one.
        executor: Where they train; in this process by default.
        callbacks: Told as the search goes on.
        resume: Go on with the run in `out`, from its log.
        repeat: Train equal architectures again rather than take the first one's result.
        arguments: What to keep in `run.json` beside all this: how a script was called.

    Returns:
        The run; `run.interrupted` after Ctrl-C.

    Raises:
        ValueError: What was asked for cannot be, in one line, before any work.
    """
    problem = make_problem(
        space,
        objectives,
        limits or {},
        trials,
        epochs,
        metrics=evaluate.directions,
        costs=evaluate.costs,
    )
    strategy.start(problem)
    store = Store(Path(out))
    run = Run(store, problem, evaluate)
    try:
        events = _open(run, strategy, resume, arguments or {})
        loop = _Loop(run, strategy, executor or InProcess(), callbacks, repeat)
        loop.replay(events)
        loop.run_all()
        write_results(run)
        loop.call(lambda c: c.end(run))
    finally:
        store.close()
    return run


def violations(metrics: Mapping[str, float], limits: Mapping[str, float]) -> dict[str, float]:
    """By what share of a limit it is passed, for each that is."""
    over = {n: metrics[n] / limit - 1 for n, limit in limits.items() if n in metrics}
    return {name: amount for name, amount in over.items() if amount > 0}


def _open(
    run: Run, strategy: Strategy, resume: bool, arguments: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Write or compare `run.json`; the events of the log so far."""
    given, store = {**describe(run, strategy), "arguments": dict(arguments)}, run.store
    described = json.loads(json.dumps(given))  # as it is read back: tuples are lists
    before, events = store.read("run.json"), store.events()
    check_order(events)
    if not resume and (events or before):
        raise ValueError(f"{run.folder}: holds a run already; resume it, or choose another folder")
    if resume and before is None:
        raise ValueError(f"{run.folder}: holds no run to resume")
    if before is not None:
        compare(before, described)
        described["made"] = before["made"]
    store.write("run.json", described)
    return events


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError if a run's description differs in what its log depends on."""
    same = ("space", "strategy", "task", "objectives", "limits", "epochs", "training", "costs")
    for key in same:
        if before[key] != now[key]:
            raise ValueError(f"run.json: {key} was {before[key]}, is {now[key]}")


def describe(run: Run, strategy: Strategy) -> dict[str, Any]:
    """All that is needed to repeat a run, as plain JSON."""
    space, evaluate, problem = run.problem.space, run.evaluate, run.problem
    origin = asdict(space.origin) if space.origin else None
    training = {**asdict(evaluate.training), "recipe": _named(evaluate.training.recipe)}
    return {
        "version": VERSION,
        "space": {"fingerprint": space.fingerprint, "origin": origin},
        "strategy": strategy.settings(),
        "task": evaluate.task.name if evaluate.task else None,
        "objectives": [asdict(o) for o in problem.objectives],
        "limits": dict(problem.limits),
        "trials": problem.trials,
        "epochs": problem.budget,
        "training": training,
        "costs": [_named(c) for c in evaluate.costs],
        "size": str(space.size()),
        "choices": space.choices.describe(),
        "made": provenance(evaluate.device),
    }


def _named(value: Any) -> dict[str, Any]:
    held = vars(value) if hasattr(value, "__dict__") else {}
    return {"name": getattr(value, "name", type(value).__name__), **held}


class _Loop:
    """One search at work."""

    def __init__(
        self,
        run: Run,
        strategy: Strategy,
        executor: Executor,
        callbacks: Sequence[Callback],
        repeat: bool,
    ) -> None:
        self.run, self.strategy, self.executor = run, strategy, executor
        self.callbacks, self.repeat = callbacks, repeat
        self.out: dict[int, Trial] = {}
        self.queue: list[Trial] = []
        self.first: dict[tuple[str, int], int] = {}
        self.twins: dict[int, list[Trial]] = {}
        self.refusals = 0

    def call(self, what: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            what(callback)

    # Resuming

    def replay(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Ask, report and tell as the log says; what was asked and never told runs again."""
        asked: dict[int, Trial] = {}
        for event in _lasting(events):
            number = event["trial"]
            if event["event"] == "ask":
                asked[number] = self._asked_again(event)
            elif event["event"] == "report":
                self.strategy.report(asked[number], event["step"], _numbers(event["metrics"]))
            else:
                self._told_again(asked.pop(number), event)
        self.queue = list(asked.values())
        self.call(lambda c: c.start(self.run))

    def _asked_again(self, event: Mapping[str, Any]) -> Trial:
        trial = self.strategy.ask()
        described = trial.to_json() if trial else None
        if described is None or any(described[key] != event[key] for key in described):
            raise ValueError(
                f"trials.jsonl: trial {event['trial']} was {dict(event)}, "
                f"the strategy now asks {described}"
            )
        assert trial is not None
        return trial

    def _told_again(self, trial: Trial, event: Mapping[str, Any]) -> None:
        names = Result.__dataclass_fields__
        fields = {**event, "metrics": _numbers(event["metrics"])}
        result = Result(**{k: v for k, v in fields.items() if k in names})
        self._count_refusals(result)
        self._remember(trial, result)
        self.strategy.tell(trial, result)

    # Going on

    def run_all(self) -> None:
        """Search until the strategy ends, the trials are used up, or Ctrl-C."""
        run = self.run
        try:
            self.executor.start(run.problem.space, run.evaluate, self.strategy.seed)
            self._fill()
            while self.out:
                self._finish(*self.executor.next(self._report))
                self._fill()
        except KeyboardInterrupt:
            run.interrupted = True
        finally:
            self.executor.close()

    def _fill(self) -> None:
        while len(self.out) < self.executor.workers and self.refusals < MOST_REFUSALS:
            trial = self.queue.pop(0) if self.queue else self._ask()
            if trial is None:
                return
            self._launch(trial)

    def _ask(self) -> Trial | None:
        waiting = sum(len(t) for t in self.twins.values())
        used = self.run.counted() + self._out_closed() + waiting
        if used >= self.run.problem.trials and not self.strategy.ends_itself:
            return None
        trial = self.strategy.ask()
        if trial is not None:
            self.run.evaluate.check(self.run.problem.space, trial)
            self.run.store.append("ask", trial.to_json())
            self.call(lambda c: c.asked(trial))
        return trial

    def _out_closed(self) -> int:
        return sum(not self.run.problem.space.open(t.picks) for t in self.out.values())

    def _launch(self, trial: Trial) -> None:
        """Refuse a trial, let it wait for its twin, or hand it to the executor."""
        problem, evaluate = self.run.problem, self.run.evaluate
        if problem.space.open(trial.picks):
            self._submit(trial)
            return
        costs = evaluate.analytic(problem.space, trial.picks)
        broken = violations(costs, problem.limits)
        if broken:
            error = "refused: " + ", ".join(
                f"{name} {costs[name]:g} over {problem.limits[name]:g}" for name in broken
            )
            self._tell(trial, Result("refused", costs, broken, error=error))
        else:
            self._submit_once(trial)

    def _submit_once(self, trial: Trial) -> None:
        first = None if self.repeat else self.first.setdefault(_key(self.run, trial), trial.number)
        if first is None or first == trial.number or trial.fit or trial.parent is not None:
            self._submit(trial)
        elif first in self.run.records:
            self._tell(trial, self._copied(first))
        else:
            self.twins.setdefault(first, []).append(trial)

    def _copied(self, first: int) -> Result:
        result = self.run.records[first].result
        return replace(result, same_as=first, seconds=0.0)

    def _submit(self, trial: Trial) -> None:
        parent = None if trial.parent is None else self.run.records[trial.parent]
        start = None if parent is None else self.run.state(parent)
        self.out[trial.number] = trial
        self.executor.submit(trial, start)

    def _report(self, trial: Trial, step: int, metrics: Mapping[str, float]) -> bool:
        go = self.strategy.report(trial, step, metrics)
        fields = {"trial": trial.number, "step": step, "metrics": dict(metrics), "go": go}
        self.run.store.append("report", fields)
        self.call(lambda c: c.reported(trial, step, metrics))
        return go

    def _finish(self, trial: Trial, outcome: Outcome) -> None:
        del self.out[trial.number]
        result = self._judged(trial, outcome)
        if outcome.state is not None and result.usable:
            outcome.state.save(self.run.store.checkpoint(trial.number))
        self._tell(trial, result)
        for twin in self.twins.pop(trial.number, []):
            self._tell(twin, self._copied(trial.number))

    def _judged(self, trial: Trial, outcome: Outcome) -> Result:
        """Measured costs and violations beside what training gave; the driver measures, alone."""
        run, metrics, details = self.run, dict(outcome.metrics), {}
        closed = not run.problem.space.open(trial.picks)
        status, error = outcome.status, outcome.error
        if outcome.state is not None and closed:
            metrics |= run.evaluate.analytic(run.problem.space, trial.picks)
            try:
                details = run.evaluate.measure(run.problem.space, trial.picks, outcome.state)
                metrics |= {name: found["value"] for name, found in details.items()}
                _check_objectives(run.problem, metrics)
            except Exception as failure:  # a trial's failure, wherever it shows
                status, error = "failed", f"{type(failure).__name__}: {failure}"
        broken = violations(metrics, run.problem.limits)
        return Result(
            status, metrics, broken, outcome.mixture, outcome.seconds, error, dict(details)
        )

    def _tell(self, trial: Trial, result: Result) -> None:
        self._count_refusals(result)
        units = {n: u for n in result.metrics if (u := self.run.evaluate.unit(n))}
        fields = {"trial": trial.number, **result.to_json(), "units": units}
        self.run.store.append("tell", fields)
        self._remember(trial, result)
        self.strategy.tell(trial, result)
        self._forget_states()
        self.call(lambda c: c.told(self.run, trial, result))
        if self.refusals == MOST_REFUSALS:
            self.run.note = f"ended: {MOST_REFUSALS} trials in a row were refused ({result.error})"
            log.warning(self.run.note)

    def _count_refusals(self, result: Result) -> None:
        self.refusals = self.refusals + 1 if result.status == "refused" else 0

    def _remember(self, trial: Trial, result: Result) -> None:
        self.run.records[trial.number] = Record(trial, result)
        if not self.run.problem.space.open(trial.picks) and result.status != "refused":
            self.first.setdefault(_key(self.run, trial), trial.number)

    def _forget_states(self) -> None:
        """Drop the states that nothing can need: all but the front's, unless trials continue."""
        if self.strategy.continues:
            return
        needed = {p.record.result.same_as for p in self.run.front()}
        needed |= {p.number for p in self.run.front()}
        for number in list(self.run.store.kept()):
            if number not in needed:
                self.run.store.forget(number)


def _lasting(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events without the reports of a training that broke off and began again."""
    kept: list[Mapping[str, Any]] = []
    before: dict[int, float] = {}
    for event in reversed(events):
        number = event["trial"]
        if event["event"] == "report":
            lasts = event["step"] < before.get(number, -math.inf)
            before[number] = event["step"] if lasts else -math.inf
        else:
            lasts, before[number] = True, math.inf
        if lasts:
            kept.append(event)
    return kept[::-1]


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Metrics as they were before the log wrote null for what is not finite."""
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _key(run: Run, trial: Trial) -> tuple[str, int]:
    return run.problem.space.architecture(trial.picks).id, trial.budget


def _check_objectives(problem: Problem, metrics: Mapping[str, float]) -> None:
    missing = [o.name for o in problem.objectives if o.name not in metrics]
    if missing:
        raise ValueError(f"objective {missing[0]!r} is none of {sorted(metrics)}")
