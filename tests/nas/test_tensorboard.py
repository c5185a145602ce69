from __future__ import annotations

import subprocess
import sys
from math import log
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from nas.callbacks import Callback
from nas.evaluate import Evaluate
from nas.loop import search
from nas.run import Record, Run
from nas.tensorboard import TensorBoard, entropy, table
from nas.trial import Result, Trial
from strategies.random_search import RandomSearch
from tests.runs_for_tests import small_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_run(tmp_path_factory.mktemp("run") / "run", callbacks=[TensorBoard()])


def test_tensorboard_and_matplotlib_are_imported_by_a_search_only() -> None:
    heavy = "{'tensorboard', 'matplotlib'} & set(sys.modules)"
    code = f"import nas.tensorboard, sys; assert not {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_trial_has_one_run_of_its_own(run: Run) -> None:
    folders = [path.parent for path in (run.folder / "tensorboard").rglob("events*")]
    names = sorted(str(f.relative_to(run.folder / "tensorboard")) for f in folders)
    assert names == ["search", "trials/0000", "trials/0001", "trials/0002"]


def test_a_trials_scalars_are_its_reports_and_its_costs(run: Run) -> None:
    for number, record in run.records.items():
        read = _read(run, f"trials/{number:04d}")
        assert {"error", "train_loss", "nonzeros", "parameters"} <= set(read.Tags()["scalars"])
        assert _points(read, "error") == [(1, pytest.approx(record.result.metrics["error"]))]
        assert _points(read, "nonzeros") == [(1, record.result.metrics["nonzeros"])]


def test_hyperparameters_are_the_picks_and_a_dash_where_there_is_none(run: Run) -> None:
    space = run.problem.space
    for number, record in run.records.items():
        info = _hparams(run, f"trials/{number:04d}", metadata.SESSION_START_INFO_TAG)
        told = {k: v.string_value for k, v in info.session_start_info.hparams.items()}
        expected = {c.name: str(record.trial.picks.get(c.name, "-")) for c in space.choices}
        assert {k: v for k, v in told.items() if k in expected} == expected
        assert info.session_start_info.group_name == f"trial {number}"


def test_the_experiment_lists_choices_and_metrics_once(run: Run) -> None:
    experiment = _hparams(run, "search", metadata.EXPERIMENT_TAG).experiment
    names = {info.name for info in experiment.hparam_infos}
    assert {c.name for c in run.problem.space.choices} <= names
    assert [m.name.tag for m in experiment.metric_infos] == ["error", "nonzeros", "parameters"]


def test_the_best_so_far_never_gets_worse(run: Run) -> None:
    points = _points(_read(run, "search"), "best/error")
    values = [value for _, value in points]
    assert [step for step, _ in points] == [0, 1, 2]
    assert values == sorted(values, reverse=True)
    assert values[-1] == pytest.approx(min(r.result.metrics["error"] for r in run.usable()))


def test_the_front_and_the_best_architecture_are_drawn(run: Run) -> None:
    tags = set(_read(run, "search").Tags()["images"])
    drawn = {f"front_architectures/trial_{p.number:04d}" for p in run.front()}
    assert {"front", "best_architecture", *drawn} <= tags


def test_the_text_describes_the_run_and_its_front(run: Run) -> None:
    text = _text(run, "run")
    assert f"| space.fingerprint | {run.problem.space.fingerprint} |" in text
    assert "| layer0/width | 16, 32 |" in text
    front = run.front()[0]
    row = f"| {front.number} | {run.problem.space.architecture(front.picks).id} |"
    assert row in _text(run, "front")


def test_a_resumed_search_writes_no_trial_twice(tmp_path: Path) -> None:
    small_run(tmp_path / "run", 2, [TensorBoard()])
    run = small_run(tmp_path / "run", 4, [TensorBoard()], resume=True)
    assert len(list((run.folder / "tensorboard/trials").glob("*/events*"))) == 4
    read = _read(run, "search")
    assert [step for step, _ in _points(read, "best/error")] == [0, 1, 2, 3]
    assert [step for step, _ in _points(read, "trials/failed")] == [0, 1, 2, 3]


def test_trials_from_before_tensorboard_are_written_from_the_log(tmp_path: Path) -> None:
    small_run(tmp_path / "run", 2)
    run = small_run(tmp_path / "run", 3, [TensorBoard()], resume=True)
    for number in range(3):
        assert _points(_read(run, f"trials/{number:04d}"), "train_loss")
    assert [step for step, _ in _points(_read(run, "search"), "best/error")] == [0, 1, 2]


def test_a_trial_that_is_begun_again_replaces_what_it_had_reported(tmp_path: Path) -> None:
    class Break(Callback):
        def reported(self, trial: Trial, step: int, metrics: Any) -> None:
            if trial.number == 1:
                raise KeyboardInterrupt

    assert small_run(tmp_path / "run", 2, [TensorBoard(), Break()]).interrupted
    run = small_run(tmp_path / "run", 2, [TensorBoard()], resume=True)
    assert len(_points(_read(run, "trials/0001"), "error")) == 1


def test_failed_trials_end_in_failure_and_refused_ones_have_no_run(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", 1, [TensorBoard()])
    space = run.problem.space

    def broken(module: Any, epochs: int) -> None:
        raise OSError("no data")

    evaluate = Evaluate(train=broken, validate=lambda module: 0.0)
    out = tmp_path / "failed"
    failed = search(space, RandomSearch(), evaluate, out=out, trials=1, callbacks=[TensorBoard()])
    info = _hparams(failed, "trials/0000", metadata.SESSION_END_INFO_TAG).session_end_info
    assert info.status == 2  # STATUS_FAILURE
    assert _points(_read(failed, "search"), "trials/failed") == [(0, 1.0)]
    board = TensorBoard()
    board.start(run)
    refused = Trial(1, space.smallest(), 1)
    run.records[1] = Record(refused, Result("refused", {"nonzeros": 1.0}))
    board.told(run, refused, run.records[1].result)
    board.end(run)
    assert not (run.folder / "tensorboard/trials/0001").exists()
    assert _points(_read(run, "search"), "trials/refused")[-1] == (1, 1.0)


def test_a_supernets_mixture_is_written_with_its_entropy(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", 1)
    board = TensorBoard()
    board.start(run)
    mixture = {"depth": [0.5, 0.25, 0.25], "layer0/width": [1.0, 0.0]}
    supernet = Trial(1, {}, 1)
    run.records[1] = Record(supernet, Result("ok", {"error": 0.5}, mixture=mixture))
    board.reported(supernet, 1, {"error": 0.5, "entropy/all": 0.7})
    board.told(run, supernet, run.records[1].result)
    board.end(run)
    read = _read(run, "search")
    found = {
        name: _points(read, f"entropy/{name}")[0] for name in ("depth", "layer0/width", "mean")
    }
    nats: dict[str, Any] = {"depth": 1.5 * log(2), "layer0/width": 0.0, "mean": 0.75 * log(2)}
    assert found == {name: (1, pytest.approx(value)) for name, value in nats.items()}
    assert {"mixture/depth", "mixture/layer0/width"} <= set(read.Tags()["histograms"])
    assert "mixture" in read.Tags()["images"]
    assert _points(_read(run, "trials/0001"), "entropy/all") == [(1, pytest.approx(0.7))]


@pytest.mark.parametrize("options", [2, 5])
def test_entropy_is_that_of_a_choice_between_equals(options: int) -> None:
    assert entropy([3.0] * options) == pytest.approx(log(options))
    assert entropy([1.0] + [0.0] * options) == 0


def test_a_cell_of_a_table_may_hold_a_bar() -> None:
    assert table(("a",), [("x|y",)]) == "| a |\n| --- |\n| x\\|y |\n\n"


def _read(run: Run, name: str) -> EventAccumulator:
    read = EventAccumulator(str(run.folder / "tensorboard" / name))
    read.Reload()
    return read


def _points(read: EventAccumulator, tag: str) -> list[Any]:
    return [(event.step, event.value) for event in read.Scalars(tag)]


def _text(run: Run, tag: str) -> str:
    (event, *_) = _read(run, "search").Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def _hparams(run: Run, name: str, tag: str) -> Any:
    content = _read(run, name).SummaryMetadata(tag).plugin_data.content
    return HParamsPluginData.FromString(content)
