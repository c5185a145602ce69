"""What a search leaves beside its log: `pareto.json` with test metrics, and `best/`."""

from __future__ import annotations

from typing import Any

from nas.masks import weights
from nas.run import VERSION, Point, Run


def write_results(run: Run) -> None:
    """Write the front and the best network; the test part is read here, for the front alone."""
    front = run.front()
    for point in front:
        point.record.test = _tested(point)
    run.store.write("pareto.json", pareto(run, front))
    if front:
        _write_best(run, front[0])


def pareto(run: Run, front: list[Point]) -> dict[str, Any]:
    """The front as plain JSON."""
    objectives = [{"name": o.name, "direction": o.direction} for o in run.problem.objectives]
    space = {"fingerprint": run.problem.space.fingerprint}
    points = [point.to_json() for point in front]
    return {"version": VERSION, "space": space, "objectives": objectives, "points": points}


def _tested(point: Point) -> dict[str, float]:
    task = point.run.evaluate.task
    return {} if task is None else task.evaluate(point.module(), "test")


def _write_best(run: Run, point: Point) -> None:
    from safetensors.torch import save_file

    folder = run.folder / "best"
    run.store.write("best/architecture.json", point.to_json())
    save_file(weights(point.module()), folder / "weights.safetensors.part")
    (folder / "weights.safetensors.part").rename(folder / "weights.safetensors")
