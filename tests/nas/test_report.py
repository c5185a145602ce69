from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.choices import Picks
from nas.costs import Latency, NonZeros
from nas.evaluate import Evaluate
from nas.loop import search
from nas.masks import bake
from nas.reopen import open_run
from nas.reporting import Plan, Report, make_report, speed, summary, write_report
from nas.reporting.accuracy import Judge, Judged
from nas.reporting.baseline import TOLERANCE, match_nonzeros
from nas.reporting.intervals import difference, estimate
from nas.reporting.markdown import markdown
from nas.reporting.speed import Ratio, measure_speed
from nas.reporting.summary import verdict
from nas.run import Point, Run
from nas.store import Store
from nas.tasks import Split, binomial_interval, digits
from nas.training import Training
from nas.trial import Objective, Problem, Trial
from nas.worker import trial_seed
from search_spaces.mlp import mlp
from strategies.random_search import RandomSearch

SEED = 4
WIDTHS = tuple(range(8, 33))
PLAN = Plan(seeds=2, networks=2, baseline_seeds=1, batches=(1, 4), compiled=False)


@pytest.fixture(scope="module", autouse=True)
def short_measurements() -> Iterator[None]:
    """What is tested of times is their arithmetic."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "SECONDS", 1e-4)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("report") / "run"
    space = mlp((1, 8, 8), 10, depths=(1, 2), widths=WIDTHS, sparsities=("0.5", "0.6", "0.8"))
    evaluate = Evaluate(digits(), costs=[NonZeros(), Latency()])
    objectives = ("error", "nonzeros")
    strategy = RandomSearch(seed=SEED)
    search(space, strategy, evaluate, out=folder, objectives=objectives, trials=3, epochs=1)
    return open_run(folder)


@pytest.fixture(scope="module")
def report(run: Run) -> Report:
    return make_report(run, PLAN)


def error_of(run: Run, network: torch.nn.Module) -> float:
    assert run.evaluate.task is not None
    return run.evaluate.task.evaluate(network, "test")["error"]


def trained(run: Run, point: Point, seed: int, masked: bool = True) -> float:
    """The test error of a point's architecture, trained here by hand."""
    assert run.evaluate.task is not None
    torch.manual_seed(seed)
    network = run.problem.space.build(point.picks, masked=masked)
    run.evaluate.training(network, run.evaluate.task, 1, lambda step, metrics: True, seed)
    return error_of(run, network)


def test_every_point_of_the_front_is_reported_the_best_first(run: Run, report: Report) -> None:
    assert [row.trial for row in report.points] == [p.number for p in run.front()]
    assert report.best.trial == run.best().number
    assert [row.validation for row in report.points] == [p.metrics for p in run.front()]


def test_sizes_are_those_of_the_networks(run: Run, report: Report) -> None:
    for row, point in zip(report.points, run.front(), strict=True):
        network = bake(point.module())
        assert row.judged.parameters == sum(p.numel() for p in network.parameters())
        assert row.judged.nonzeros == sum(int((p != 0).sum()) for p in network.parameters())
    space = run.problem.space
    parent = space.build(space.largest(), masked=False)
    count = sum(p.numel() for p in parent.parameters())
    assert (report.parent.judged.parameters, report.parent.judged.nonzeros) == (count, count)
    assert report.twin.judged.nonzeros == report.best.judged.parameters


def test_the_searchs_own_network_is_judged_and_counts_as_a_sample(
    run: Run, report: Report
) -> None:
    for row, point in zip(report.points, run.front(), strict=True):
        value = error_of(run, point.module())
        assert row.own.values == [value] == row.judged.values[:1]
        assert row.own.values[0] == pytest.approx(row.test["error"])
        assert row.own.binomial == [binomial_interval(value, report.examples or 0)]
    assert report.examples == 359


def test_the_searchs_training_and_those_of_the_report_are_one(run: Run, report: Report) -> None:
    point = run.best()
    seeds = [trial_seed(SEED + i, point.number) for i in range(2)]
    assert report.best.judged.seeds == seeds
    assert report.best.judged.values == [trained(run, point, seed) for seed in seeds]


def test_the_dense_twin_is_trained_without_masks_from_the_same_seeds(
    run: Run, report: Report
) -> None:
    point, twin = run.best(), report.twin.judged
    assert twin.seeds == report.best.judged.seeds
    assert twin.values == [trained(run, point, seed, masked=False) for seed in twin.seeds]
    assert report.twin.difference == difference(report.best.judged.values, twin.values)


def test_estimates_are_those_of_the_values(report: Report) -> None:
    assert report.baseline is not None
    every = [r.judged for r in report.points] + [report.twin.judged, report.parent.judged]
    for judged in [*every, *report.baseline.judged]:
        assert judged.estimate == estimate(judged.values)
        assert not judged.failures


def test_random_networks_have_the_points_nonzeros_and_seeds(run: Run, report: Report) -> None:
    found, point = report.baseline, run.best()
    assert found is not None and not found.note
    assert len({str(match.picks) for match in found.matches}) == PLAN.networks
    target = report.best.judged.nonzeros
    for match, judged in zip(found.matches, found.judged, strict=True):
        assert judged.picks == match.picks != point.picks
        assert abs(match.nonzeros / target - 1) == pytest.approx(match.off)
        assert match.off <= TOLERANCE
        assert judged.nonzeros == match.nonzeros
        assert judged.seeds == found.point.seeds == report.best.judged.seeds[:1]
    means = [judged.values[0] for judged in found.judged]
    assert found.estimate == estimate(means)
    assert found.beaten == sum(mean > found.point.values[0] for mean in means)


def test_the_test_part_changes_what_is_reported_and_nothing_that_is_chosen(
    run: Run, report: Report
) -> None:
    task = run.evaluate.task
    assert task is not None
    wrong = replace(task, test=Split(task.test.inputs, (task.test.targets + 1) % 10))
    again = make_report(
        open_run(run.folder, Evaluate(wrong, costs=run.evaluate.costs)), replace(PLAN, seeds=1)
    )
    assert [row.trial for row in again.points] == [row.trial for row in report.points]
    assert again.baseline is not None and report.baseline is not None
    assert again.baseline.matches == report.baseline.matches
    assert again.twin.judged.values[0] != report.twin.judged.values[0]


def test_other_data_than_the_searchs_are_noted(run: Run) -> None:
    other = open_run(run.folder, Evaluate(digits(seed=9), costs=run.evaluate.costs))
    plan = Plan(seeds=1, networks=0, batches=(1,), compiled=False)
    assert all("the data are others" in row.notes[0] for row in make_report(other, plan).points)


def test_a_point_with_a_parent_is_trained_from_scratch_and_that_is_noted(run: Run) -> None:
    other = open_run(run.folder)
    number = other.best().number
    record = other.records[number]
    record.trial = replace(record.trial, parent=99)
    report = make_report(other, Plan(seeds=1, networks=0, batches=(1,), compiled=False))
    (note,) = report.best.notes
    assert "from the state of trial 99" in note and "from scratch" in note
    assert report.best.judged.values == [trained(run, other.best(), trial_seed(SEED, number))]


def test_a_training_that_fails_is_reported(run: Run) -> None:
    evaluate = Evaluate(run.evaluate.task, training=Training(lr=1e30))
    judge, point = Judge(open_run(run.folder, evaluate), SEED), run.best()
    judged = judge.dense(point.picks, point, 1)
    assert (judged.values, judged.estimate) == ([], None)
    assert "loss is" in judged.failures[trial_seed(SEED, point.number)]


def test_a_run_without_a_front_is_refused(run: Run) -> None:
    empty = open_run(run.folder)
    empty.records.clear()
    with pytest.raises(ValueError, match="there is no front"):
        make_report(empty, PLAN)


@pytest.mark.parametrize(
    "wrong", [{"seeds": 0}, {"baseline_seeds": 0}, {"networks": -1}, {"batches": (1, 0)}]
)
def test_a_plan_refuses_what_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Plan: seeds"):
        Plan(**wrong)


def test_limits_hold_for_random_networks_and_what_is_out_of_reach_is_the_nearest(
    tmp_path: Path,
) -> None:
    import numpy as np

    space = mlp((1, 8, 8), 10, depths=(1,), widths=(8, 64, 512), sparsities=("dense", "0.5"))
    picks: Picks = {"depth": 1, "layer0/width": 64, "layer0/sparsity": "dense"}
    limits = {"nonzeros": 5000.0}
    store = Store(tmp_path)
    problem = Problem(space, (Objective("error"),), limits, 1, 1)
    run = Run(store, problem, Evaluate(digits(), costs=[NonZeros()]))
    found = match_nonzeros(run, picks, 9, np.random.default_rng(0))
    store.close()
    assert {m.picks["layer0/width"] for m in found} <= {8, 64}
    assert [m.off for m in found] == sorted(m.off for m in found)
    assert found[0].picks == {"depth": 1, "layer0/width": 64, "layer0/sparsity": "0.5"}
    assert found[0].off > TOLERANCE


# Speed


def test_each_network_stands_in_each_measurement(report: Report) -> None:
    for row in report.points:
        assert [s.batch for s in row.speeds] == [1, 4]
        for s in row.speeds:
            assert list(s.networks) == ["packed", "twin", "parent", "eager"]
            assert list(s.speedups) == ["twin", "parent", "eager"]
            assert (s.unpacked, s.threads, s.left_out) == ("eager", 1, {})
            assert s.profile is not None and 0 <= s.profile["share"] <= 1
            assert sum(s.kernels.values()) == row.judged.picks["depth"] + 1  # type: ignore[operator]


def test_times_and_ratios_are_those_of_the_rounds(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed network takes 1 to 4 ms by turns, the others 2, 3 and 1.5 times as long."""
    rounds: list[int] = []

    def taken(calls: list[Any], seconds: float, n: int) -> list[float]:
        rounds.append(n)
        packed = 1e-3 * (1 + len(rounds) % 4)
        return [packed, 2 * packed, 3 * packed, 1.5 * packed]

    monkeypatch.setattr(speed, "interleaved", taken)
    found = measure_speed(run.best(), 1, compiled=False)
    assert len(rounds) == 3 * speed.ROUNDS  # a wide spread: once more, with twice the rounds
    assert found.networks["packed"].rounds == 2 * speed.ROUNDS
    assert found.networks["packed"].median_ms == pytest.approx(2.5)
    assert found.networks["twin"].iqr_ms == pytest.approx(2 * 1.5)
    assert not found.networks["packed"].reliable
    twin = found.speedups["twin"]
    assert [twin.low, twin.median, twin.high] == pytest.approx([2.0] * 3)
    assert found.speedups["eager"].median == pytest.approx(1.5)


def test_a_steady_network_is_reliable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "interleaved", lambda calls, *_: [1e-3] * len(calls))
    found = measure_speed(run.best(), 1, compiled=False)
    assert all(t.reliable and t.rounds == speed.ROUNDS for t in found.networks.values())


def test_where_nothing_compiles_the_reason_is_said(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(module: Any, **options: Any) -> Any:
        def call(x: Any) -> None:
            raise RuntimeError("no C++ compiler\nhere")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    found = measure_speed(run.best(), 1)
    assert found.left_out == {"compiled": "RuntimeError: no C++ compiler here"}
    assert (found.unpacked, "compiled" in found.networks) == ("eager", False)


@pytest.mark.slow
def test_a_compiled_network_takes_part(run: Run) -> None:
    found = measure_speed(run.best(), 2)
    assert not found.left_out
    assert found.networks["compiled"].median_ms > 0


# What is written


def told(report: Report, twin: Ratio, error: tuple[float, float]) -> Report:
    """A report whose speed over the twin and errors (the point's, the twin's) are these."""
    speeds = [replace(s, speedups={**s.speedups, "twin": twin}) for s in report.best.speeds]
    best = replace(report.best, speeds=speeds)
    ours, theirs = [error[0], error[0] + 1e-6], [error[1], error[1] + 1e-6]
    dense = replace(report.twin, difference=difference(ours, theirs))
    return replace(report, points=[best, *report.points[1:]], twin=dense)


@pytest.mark.parametrize(
    ("twin", "errors", "says"),
    [
        (Ratio(1.02, 0.97, 1.05), (0.1, 0.1), "Sparsity brings nothing beyond packing"),
        (Ratio(0.80, 0.70, 0.90), (0.2, 0.1), "Sparsity brings nothing beyond packing"),
        (
            Ratio(2.0, 1.9, 2.1),
            (0.1, 0.1),
            "sparsity brings speed at batch 1 and speed at batch 4",
        ),
        (Ratio(2.0, 1.9, 2.1), (0.2, 0.1), "at the price of a worse error"),
        (Ratio(1.0, 0.9, 1.1), (0.1, 0.2), "Beyond packing, sparsity brings error"),
    ],
)
def test_what_sparsity_brought_is_said_by_the_numbers(
    report: Report, twin: Ratio, errors: tuple[float, float], says: str
) -> None:
    assert says in verdict(told(report, twin, errors))


def test_a_json_and_a_markdown_are_written(run: Run, report: Report) -> None:
    place = write_report(run, report)
    values = json.loads((place.parent / "report.json").read_text(), parse_constant=_refuse)
    documented = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    assert values["version"] == 1
    assert all(f"`{key}`" in documented for key in values)
    assert values["points"][0]["judged"]["values"] == report.best.judged.values
    assert values["summary"] == summary(report)
    assert all((place.parent / name).stat().st_size for name in values["pictures"])
    assert "front.png" in values["pictures"]


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_the_markdown_shows_each_network_and_stays_narrow(report: Report) -> None:
    text = markdown(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    for row in report.points:
        assert any(line.startswith(f"| trial {row.trial} ") for line in lines)
    for title in ("Accuracy", "Speed at batch 1", "Speed at batch 4", "Random networks"):
        assert f"## {title}" in lines
    mean = _mean(report.twin.judged)
    assert any(f"dense twin of {report.best.trial}" in x and f" {mean:.4g} [" in x for x in lines)


def _mean(judged: Judged) -> float:
    assert judged.estimate is not None
    return judged.estimate.mean


def test_the_seed_of_an_equal_trial_is_the_first_ones(run: Run) -> None:
    other = open_run(run.folder)
    first = other.best()
    copied = replace(first.record.result, same_as=first.number)
    trial = Trial(50, first.picks, 1)
    twin = Point(other, replace(first.record, trial=trial, result=copied))
    assert Judge(other, SEED).own(twin).seeds == [trial_seed(SEED, first.number)]
