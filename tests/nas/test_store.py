import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.store import VERSION, State, Store, check_order


@pytest.fixture
def store(tmp_path: Path) -> Any:
    opened = Store(tmp_path / "run")
    yield opened
    opened.close()


def numbers(events: list[dict[str, Any]]) -> list[int]:
    return [event["trial"] for event in events]


def log_of(store: Store) -> Path:
    return store.folder / "trials.jsonl"


def test_events_come_back_in_the_order_of_appending(store: Store) -> None:
    assert store.events() == []
    for i in (3, 1, 2):
        store.append("ask", {"trial": i, "picks": {"op": ["a", "b"]}})
    assert numbers(store.events()) == [3, 1, 2]
    assert store.events()[0] == {
        "version": VERSION,
        "event": "ask",
        "trial": 3,
        "picks": {"op": ["a", "b"]},
    }


def test_a_line_is_on_the_disk_whole_before_append_returns(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        synced.append(log_of(store).read_text())

    monkeypatch.setattr(os, "fsync", fsync)
    for i in range(3):
        store.append("tell", {"trial": i})
        assert len(synced) == i + 1
        assert synced[-1].endswith("\n") and synced[-1].count("\n") == i + 1


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 200))
def test_a_log_cut_anywhere_keeps_its_whole_lines_and_goes_on_behind_them(cut: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for i in range(3):
            store.append("tell", {"trial": i, "metrics": {"error": 0.5}})
        store.close()
        text = log_of(store).read_text()
        log_of(store).write_text(text[:cut])
        again = Store(Path(folder))
        whole = text[:cut].count("\n")
        assert numbers(again.events()) == list(range(whole))
        again.append("ask", {"trial": 99})
        assert numbers(again.events()) == [*range(whole), 99]
        again.close()


def test_numbers_that_are_not_finite_are_null_at_any_depth(store: Store) -> None:
    store.append("tell", {"trial": 0, "metrics": {"a": math.nan, "b": [1.5, math.inf], "c": (2,)}})
    assert store.events()[0]["metrics"] == {"a": None, "b": [1.5, None], "c": [2]}
    json.loads(log_of(store).read_text(), parse_constant=lambda name: pytest.fail(name))


def test_floats_come_back_exactly(store: Store) -> None:
    value = 0.1 + 0.2
    store.append("tell", {"trial": 0, "value": value})
    assert store.events()[0]["value"] == value


def test_a_second_driver_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first = Store(tmp_path)
    with pytest.raises(ValueError, match="another search is writing to this folder"):
        Store(tmp_path)
    first.close()
    Store(tmp_path).close()


def test_a_log_of_another_format_is_refused_with_its_line(store: Store) -> None:
    store.append("ask", {"trial": 0})
    with log_of(store).open("a") as log:
        log.write('{"version": 99, "event": "ask"}\n')
    with pytest.raises(ValueError, match=rf"jsonl:2: format 99, this version reads {VERSION}"):
        store.events()


def test_a_damaged_line_before_the_last_is_refused_with_its_number(store: Store) -> None:
    store.append("ask", {"trial": 0})
    with log_of(store).open("a") as log:
        log.write('{"version": 1, "ev\n')
    store.append("ask", {"trial": 1})
    with pytest.raises(ValueError, match=r"trials.jsonl:2: not a line of JSON"):
        store.events()


def test_a_file_is_written_whole_and_read_back(store: Store) -> None:
    assert store.read("best/architecture.json") is None
    store.write("best/architecture.json", {"version": VERSION, "a": [1, 2.5, None]})
    store.write("best/architecture.json", {"version": VERSION, "b": 1})
    assert store.read("best/architecture.json") == {"version": VERSION, "b": 1}
    assert sorted(p.name for p in (store.folder / "best").iterdir()) == ["architecture.json"]


def state(value: float) -> State:
    tensors = {"a.weight": torch.full((2, 3), value), "training#step": torch.tensor(7)}
    return State(tensors, {"open": ["x"], "mixture": {"x": [0.25, 0.75]}})


def test_a_state_comes_back_as_it_was(store: Store) -> None:
    state(1.5).save(store.checkpoint(4))
    back = State.load(store.checkpoint(4))
    assert back.tensors.keys() == state(1.5).tensors.keys()
    assert all(torch.equal(back.tensors[k], v) for k, v in state(1.5).tensors.items())
    assert back.meta["open"] == ["x"] and back.meta["mixture"] == {"x": [0.25, 0.75]}


def test_a_state_that_breaks_off_while_it_is_written_leaves_the_one_before(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    state(1.0).save(store.checkpoint(0))

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        state(2.0).save(store.checkpoint(0))
    assert float(State.load(store.checkpoint(0)).tensors["a.weight"][0, 0]) == 1.0
    assert list(store.kept()) == [0]


def test_a_state_may_be_saved_again_and_forgotten(store: Store) -> None:
    for value in (1.0, 2.0):
        state(value).save(store.checkpoint(3))
    state(0.0).save(store.checkpoint(11))
    assert float(State.load(store.checkpoint(3)).tensors["a.weight"][0, 0]) == 2.0
    assert sorted(store.kept()) == [3, 11]
    store.forget(3)
    store.forget(5)
    assert list(store.kept()) == [11]


@pytest.mark.parametrize("line", ["[1]", '{"version": 1}', '{"version": 1, "event": "tell"}'])
def test_a_line_that_is_no_event_of_a_trial_is_named(store: Store, line: str) -> None:
    store.append("ask", {"trial": 0})
    with log_of(store).open("a") as log:
        log.write(line + "\n")
    with pytest.raises(ValueError, match=r"trials.jsonl:2: "):
        check_order(store.events())


def test_a_trial_that_ends_without_being_asked_for_is_named(store: Store) -> None:
    for event in ("ask", "report", "tell", "tell"):
        store.append(event, {"trial": 0})
    with pytest.raises(ValueError, match=r"trials.jsonl:4: tell of trial 0, which is not out"):
        check_order(store.events())


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_damaged_state_is_named(store: Store, name: str) -> None:
    State({"weight": torch.ones(2)}).save(store.checkpoint(0))
    (store.checkpoint(0) / name).write_bytes(b"\xff damaged")
    with pytest.raises(ValueError, match=rf"{name}: not "):
        State.load(store.checkpoint(0))
