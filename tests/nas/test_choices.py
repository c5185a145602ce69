import json
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.choices import (
    Choice,
    Choices,
    Decision,
    Label,
    Pick,
    Picks,
    Subset,
    When,
    fingerprint,
    label_of,
)
from nas.inside import find, merge, settle
from nas.sparsity import NM, Unstructured

LABELS = ("a", "b", "c", "d")


@dataclass(frozen=True)
class _Held:
    """Anything that holds a choice."""

    inner: Any


@st.composite
def drawn_choices(draw: st.DrawFn) -> Choices:
    """Up to five choices and subsets, some under a condition on an earlier one."""
    made: list[Decision] = []
    for i in range(draw(st.integers(1, 5))):
        when = _drawn_condition(draw, made)
        labels = LABELS[: draw(st.integers(1, 4))]
        if draw(st.booleans()):
            made.append(Subset(f"c{i}", labels, draw(st.integers(1, len(labels))), when))
        else:
            hidden = draw(st.sampled_from([(), labels[:1] if len(labels) > 1 else ()]))
            made.append(Choice(f"c{i}", labels, draw(st.booleans()), when, hidden))
    return Choices(made)


def _drawn_condition(draw: st.DrawFn, made: list[Decision]) -> When | None:
    if not made or draw(st.booleans()):
        return None
    parent = draw(st.sampled_from(made))
    most = 1 if isinstance(parent, Subset) else len(parent.labels)
    among = draw(st.lists(st.sampled_from(parent.labels), min_size=1, max_size=most, unique=True))
    return When(parent.name, tuple(among))


def possible(choice: Decision) -> list[Pick]:
    if isinstance(choice, Subset):
        return [list(kept) for kept in combinations(choice.items, choice.k)]
    return list(choice.labels)


def every_architecture(choices: Choices) -> set[str]:
    """Brute force: all picks of all choices, made canonical."""
    names = [c.name for c in choices]
    all_picks = product(*(possible(c) for c in choices))
    return {json.dumps(choices.canonical(dict(zip(names, p, strict=True)))) for p in all_picks}


@settings(deadline=None, max_examples=60)
@given(drawn_choices())
def test_the_size_is_the_number_of_distinct_canonical_picks(choices: Choices) -> None:
    assert choices.size() == len(every_architecture(choices))


def test_a_choice_that_several_options_share_is_counted_under_each_of_them() -> None:
    op = Choice("op", ("conv", "pool", "skip"))
    ratio = Choice("ratio", (0.5, 0.9), when=When("op", ("conv", "pool")))
    assert Choices([op, ratio]).size() == 2 * 2 + 1


def test_choices_under_the_items_of_a_subset_count_only_where_the_item_is_kept() -> None:
    inputs = Subset("inputs", ("0", "1", "2"), 2)
    ops = [Choice(f"op{i}", tuple(range(2 + i)), when=When("inputs", (str(i),))) for i in range(3)]
    assert Choices([inputs, *ops]).size() == 2 * 3 + 2 * 4 + 3 * 4


@settings(deadline=None, max_examples=60)
@given(drawn_choices(), st.integers(0, 2**32 - 1))
def test_a_sample_is_canonical_and_takes_no_label_of_supernets(
    choices: Choices, seed: int
) -> None:
    picks = choices.sample(np.random.default_rng(seed))
    assert json.dumps(choices.canonical(picks)) == json.dumps(picks)
    for name, pick in picks.items():
        assert set(pick if isinstance(pick, list) else [pick]) <= set(choices[name].labels)


@settings(deadline=None, max_examples=60)
@given(drawn_choices(), st.integers(0, 2**32 - 1), st.booleans())
def test_neighbours_are_canonical_and_differ_in_one_decision(
    choices: Choices, seed: int, draw: bool
) -> None:
    rng = np.random.default_rng(seed)
    picks = choices.sample(rng)
    for other in choices.neighbours(picks, rng if draw else None):
        assert json.dumps(choices.canonical(other)) == json.dumps(other)
        changed = [n for n in picks if n in other and other[n] != picks[n]]
        assert len(changed) == 1
        gone, new = picks.keys() - other.keys(), other.keys() - picks.keys()
        assert all(_hangs_on(choices, name, changed[0]) for name in gone | new)


@settings(deadline=None, max_examples=60)
@given(drawn_choices(), st.integers(0, 2**32 - 1))
def test_a_mutation_is_a_neighbour_and_no_other_is_possible_where_there_is_none(
    choices: Choices, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    picks = choices.sample(rng)
    near, other = list(choices.neighbours(picks)), choices.mutate(picks, rng)
    assert json.dumps(choices.canonical(other)) == json.dumps(other)
    changed = [n for n in picks if n in other and other[n] != picks[n]]
    assert len(changed) == (1 if near else 0)


def _hangs_on(choices: Choices, name: str, ancestor: str) -> bool:
    when = choices[name].when
    return when is not None and (
        when.choice == ancestor or _hangs_on(choices, when.choice, ancestor)
    )


def test_neighbours_of_an_ordered_choice_are_next_to_it_and_of_any_other_all_the_rest() -> None:
    rest: Picks = {"kind": "x", "inputs": ["0", "2"]}
    choices = Choices(
        [
            Choice("width", (8, 16, 32, 64), ordered=True),
            Choice("kind", ("x", "y", "z")),
            Subset("inputs", ("0", "1", "2"), 2),
        ]
    )
    found = list(choices.neighbours({"width": 16, **rest}))
    assert [p["width"] for p in found if p["width"] != 16] == [8, 32]
    assert [p["kind"] for p in found if p["kind"] != "x"] == ["y", "z"]
    assert [p["inputs"] for p in found if p["inputs"] != ["0", "2"]] == [["1", "2"], ["0", "1"]]
    assert len(found) == 6


def test_canonical_picks_are_in_the_order_of_the_space_without_what_is_inactive() -> None:
    choices = depth_and_widths()
    picks: Picks = {"width1": 16, "width0": 8, "depth": 1}
    assert list(choices.canonical(picks).items()) == [("depth", 1), ("width0", 8)]


def test_equal_picks_are_equal_text_whatever_the_type_of_the_number() -> None:
    choices = depth_and_widths()
    picks: Any = {"depth": 1.0, "width0": 8.0}
    assert json.dumps(choices.canonical(picks)) == '{"depth": 1, "width0": 8}'


def test_an_invalid_pick_is_refused_with_the_choice_the_labels_and_the_pick() -> None:
    choices = depth_and_widths()
    with pytest.raises(ValueError, match=r"width0: 9 is none of \[8, 16\]"):
        choices.canonical({"depth": 1, "width0": 9})
    with pytest.raises(ValueError, match="width1: active, but not picked"):
        choices.canonical({"depth": 2, "width0": 8})
    with pytest.raises(ValueError, match="colour: no such choice"):
        choices.canonical({"colour": 1})


@pytest.mark.parametrize("pick", [["b", "a"], ["a"], ["a", "a"], ["a", "z"], "a", ["a", "b", "c"]])
def test_a_subset_takes_k_distinct_items_in_order_only(pick: Pick) -> None:
    with pytest.raises(ValueError, match="inputs: a pick is 2 of"):
        Choices([Subset("inputs", ("a", "b", "c"), 2)]).canonical({"inputs": pick})


def test_labels_of_supernets_are_never_picked_and_weigh_in_a_mixture() -> None:
    op = Choice("op", ("none", "conv"), open_only=("none",))
    assert (op.labels, op.open_labels) == (("conv",), ("none", "conv"))
    with pytest.raises(ValueError, match="op: 'none' is none of"):
        Choices([op]).canonical({"op": "none"})


def test_what_is_open_is_active_and_not_picked() -> None:
    choices = depth_and_widths()
    assert choices.open({}) == ("depth", "width0", "width1")
    assert choices.open({"depth": 1}) == ("width0",)
    assert choices.open({"depth": 2, "width0": 8, "width1": 8}) == ()


def test_a_sample_keeps_what_is_fixed() -> None:
    choices = depth_and_widths()
    drawn = [choices.sample(np.random.default_rng(i), {"width1": 16}) for i in range(20)]
    assert {p["width1"] for p in drawn if "width1" in p} == {16}
    assert {p["width0"] for p in drawn} == {8, 16}
    assert {p["depth"] for p in drawn} == {1, 2}


@pytest.mark.parametrize("name", ["", "a.b"])
def test_a_name_holds_no_dots_and_is_not_empty(name: str) -> None:
    with pytest.raises(ValueError, match="name is not empty and holds no dots"):
        Choice(name, (1, 2))
    with pytest.raises(ValueError, match="name is not empty and holds no dots"):
        Subset(name, ("a",), 1)


def test_options_are_plain_labelled_or_named() -> None:
    assert Choice("s", (NM(2, 4), Unstructured(0.9))).labels == ("2:4", "0.9")
    assert Choice("s", {"half": NM(2, 4)}).value("half") == NM(2, 4)
    with pytest.raises(TypeError, match="an option is a plain value or has a `label`"):
        label_of(object())
    with pytest.raises(ValueError, match="s: labels must differ"):
        Choice("s", (1, 1))
    with pytest.raises(ValueError, match="s: a choice needs at least one option"):
        Choice("s", ("none",), open_only=("none",))
    with pytest.raises(ValueError, match=r"s: k must lie in 1\.\.2, got 3"):
        Subset("s", ("a", "b"), 3)


def test_a_condition_names_a_choice_before_it_and_labels_that_it_has() -> None:
    late = Choice("b", (1, 2), when=When("a", (1,)))
    with pytest.raises(ValueError, match="b: its condition names 'a', which is not a choice"):
        Choices([late, Choice("a", (1, 2))])
    with pytest.raises(ValueError, match="b: a condition on a needs its labels"):
        Choices([Choice("a", (3, 4)), late])
    with pytest.raises(ValueError, match="a: named twice"):
        Choices([Choice("a", (1, 2)), Choice("a", (1, 2))])


@pytest.mark.parametrize(
    "other",
    [
        Choice("x", (1, 3)),
        Choice("x", (2, 1)),
        Choice("x", (1, 2), ordered=True),
        Choice("x", (1, 2), open_only=(1,)),
        Subset("x", (1, 2), 1),
    ],
)
def test_one_name_with_different_options_is_refused(other: Decision) -> None:
    with pytest.raises(ValueError, match="x: named twice with different options"):
        merge([Choice("x", (1, 2)), other])


def test_subsets_of_one_name_that_keep_different_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="x: named twice"):
        merge([Subset("x", (1, 2), 1), Subset("x", (1, 2), 2)])


def test_one_name_under_two_options_of_a_choice_exists_under_both() -> None:
    ratio = Choice("ratio", (0.5, 0.9))
    op = Choice("op", {"conv": _Held(ratio), "wide": _Held(ratio), "skip": _Held(None)})
    found = Choices(merge(find(op)))
    assert found["ratio"].when == When("op", ("conv", "wide"))
    assert found.size() == 5


def test_a_choice_that_also_stands_outside_exists_everywhere() -> None:
    ratio = Choice("ratio", (0.5, 0.9))
    op = Choice("op", {"conv": _Held(ratio), "skip": _Held(None)})
    assert Choices(merge(find((op, _Held(ratio))))).size() == 4


def test_choices_are_put_behind_what_their_conditions_ask_for() -> None:
    late = Choice("late", (1, 2), when=When("first", ("a",)))
    assert [c.name for c in merge([late, Choice("first", ("a", "b"))])] == ["first", "late"]


def test_conditions_that_turn_in_a_circle_are_refused() -> None:
    a = Choice("a", (1, 2), when=When("b", (1,)))
    b = Choice("b", (1, 2), when=When("a", (1,)))
    with pytest.raises(ValueError, match="which is not a choice before it"):
        Choices(merge([a, b]))


def test_settle_replaces_what_is_picked_at_any_depth_and_leaves_the_rest_open() -> None:
    ratio = Choice("ratio", (Unstructured(0.5), Unstructured(0.9)))
    op = Choice("op", {"conv": _Held((ratio, 1)), "skip": _Held(None)})
    assert settle(op, {"op": "conv", "ratio": "0.9"}) == _Held((Unstructured(0.9), 1))
    half = settle(op, {"ratio": "0.5"})
    assert half.value("conv") == _Held((Unstructured(0.5), 1))


@given(st.lists(st.sampled_from([1, 1.5, True, "x", "2:4"]), unique=True, min_size=1))
def test_labels_come_back_from_json_as_they_were(labels: list[Label]) -> None:
    choices = Choices([Choice("c", labels)])
    for label in choices["c"].labels:
        back = choices.canonical(json.loads(json.dumps({"c": label})))
        assert back == {"c": label} and type(back["c"]) is type(label)


def test_the_fingerprint_tells_apart_what_changes_the_picks() -> None:
    kinds: list[Decision] = [
        Choice("c", ("a", "b")),
        Choice("c", ("b", "a")),
        Choice("d", ("a", "b")),
        Choice("c", ("a", "b"), ordered=True),
        Choice("c", ("a", "b"), open_only=("a",)),
        Subset("c", ("a", "b"), 1),
        Subset("c", ("a", "b"), 2),
    ]
    assert len({fingerprint(Choices([c]).describe()) for c in kinds}) == len(kinds)


def depth_and_widths() -> Choices:
    deep = When("depth", (2,))
    return Choices(
        [
            Choice("depth", (1, 2), ordered=True),
            Choice("width0", (8, 16), ordered=True),
            Choice("width1", (8, 16), ordered=True, when=deep),
        ]
    )
