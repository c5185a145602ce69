"""Choices, and what a set of them spans: validity, canonical picks, size, samples, neighbours.

Picks are plain JSON: a choice's name to the label of its option, a subset's name to the list of
the labels of its items. They hold active choices only, in the order of the space, so that equal
networks have equal picks. This file imports no torch: arguments are checked with it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Label = str | int | float | bool
Pick = Label | list[Label]
Picks = dict[str, Pick]


@dataclass(frozen=True)
class When:
    """A condition: the named choice is active and its pick is (for a subset: holds) one of these.

    Args:
        choice: Name of the choice that is asked.
        among: Labels of its options, or the one label of a subset's item.
    """

    choice: str
    among: tuple[Label, ...]

    def holds(self, pick: Pick) -> bool:
        """Whether a pick of the asked choice fulfils the condition."""
        return any(x in self.among for x in pick) if isinstance(pick, list) else pick in self.among


def label_of(option: Any) -> Label:
    """The label under which an option is stored: itself if plain, else its `label`."""
    if isinstance(option, str | int | float | bool):
        return option
    label = getattr(option, "label", None)
    if not isinstance(label, str):
        raise TypeError(f"Choice: an option is a plain value or has a `label`, got {option!r}")
    return label


@dataclass(frozen=True)
class Choice:
    """Picks one of its options.

    Args:
        name: Readable, with `/` and no dots; the same name in several places is one choice.
        options: Plain values, or objects with a `label`, or a mapping from label to object.
        ordered: Whether the order of the options means something (width, ratio, depth).
        when: Where the choice exists at all; None: everywhere. Choices found inside an option of
            another choice get their condition from where they stand.
        open_only: Labels that exist only while the choice is open, in a supernet (DARTS' `none`).
    """

    name: str
    options: Any
    ordered: bool = False
    when: When | None = None
    open_only: tuple[Label, ...] = ()

    def __post_init__(self) -> None:
        _check_name(self.name)
        given = self.options
        pairs = given.items() if isinstance(given, Mapping) else ((label_of(o), o) for o in given)
        object.__setattr__(self, "options", tuple(pairs))
        _check_labels(self.name, [label for label, _ in self.options])
        if not self.labels:
            raise ValueError(f"{self.name}: a choice needs at least one option")

    @property
    def labels(self) -> tuple[Label, ...]:
        """Labels that a pick may have."""
        return tuple(label for label, _ in self.options if label not in self.open_only)

    @property
    def open_labels(self) -> tuple[Label, ...]:
        """Labels that a mixture has a weight for, in order."""
        return tuple(label for label, _ in self.options)

    def value(self, label: Label) -> Any:
        """The option behind a label."""
        return dict(self.options)[label]

    def check(self, pick: Any) -> Pick:
        """The label that `pick` equals (1 for 1.0). Raises ValueError if none does."""
        if pick not in self.labels:
            raise ValueError(f"{self.name}: {pick!r} is none of {list(self.labels)}")
        return self.labels[self.labels.index(pick)]

    def sample(self, rng: np.random.Generator) -> Pick:
        """One label, uniformly."""
        return self.labels[int(rng.integers(len(self.labels)))]

    def near(self, pick: Pick) -> list[Pick]:
        """The labels next to a pick: adjacent ones if the order means something, else all."""
        if not self.ordered:
            return [label for label in self.labels if label != pick]
        at = self.labels.index(pick)
        return [self.labels[i] for i in (at - 1, at + 1) if 0 <= i < len(self.labels)]


@dataclass(frozen=True)
class Subset:
    """Picks `k` of its items; open, it has one weight an item, not one a combination.

    Args:
        name: As for `Choice`.
        items: Labels of what can be picked.
        k: How many are.
        when: As for `Choice`.
    """

    name: str
    items: tuple[Label, ...]
    k: int
    when: When | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        object.__setattr__(self, "items", tuple(self.items))
        _check_labels(self.name, list(self.items))
        if not 1 <= self.k <= len(self.items):
            raise ValueError(f"{self.name}: k must lie in 1..{len(self.items)}, got {self.k}")

    @property
    def labels(self) -> tuple[Label, ...]:
        """Labels of the items."""
        return self.items

    @property
    def open_labels(self) -> tuple[Label, ...]:
        """Labels that a mixture has a weight for, in order."""
        return self.items

    def check(self, pick: Any) -> Pick:
        """The items that `pick` lists. Raises ValueError unless they are k, distinct, in order."""
        if (
            not isinstance(pick, list)
            or pick != [x for x in self.items if x in pick]
            or len(pick) != self.k
        ):
            raise ValueError(
                f"{self.name}: a pick is {self.k} of {list(self.items)} in order, got {pick!r}"
            )
        return [x for x in self.items if x in pick]

    def sample(self, rng: np.random.Generator) -> Pick:
        """Draw k items, uniformly over the combinations."""
        kept = np.sort(rng.permutation(len(self.items))[: self.k])
        return [self.items[i] for i in kept]

    def near(self, pick: Pick) -> list[Pick]:
        """All picks that exchange one item for another."""
        held = set(pick)  # type: ignore[arg-type]
        swaps = [(held - {a}) | {b} for a in pick for b in self.items if b not in held]  # type: ignore[union-attr]
        return [[x for x in self.items if x in swap] for swap in swaps]


Decision = Choice | Subset


def _check_name(name: str) -> None:
    if not name or "." in name:
        raise ValueError(f"a choice's name is not empty and holds no dots, got {name!r}")


def _check_labels(name: str, labels: list[Label]) -> None:
    if len(set(labels)) != len(labels):
        raise ValueError(f"{name}: labels must differ, got {labels}")


class Choices:
    """An ordered set of choices, each active everywhere or under a condition on an earlier one.

    Args:
        choices: The choices; a condition may only name a choice that stands before.

    Raises:
        ValueError: Two different choices of one name, or a condition on none that stands before.
    """

    def __init__(self, choices: Iterable[Decision]) -> None:
        self._by_name: dict[str, Decision] = {}
        for choice in choices:
            self._add(choice)

    def _add(self, choice: Decision) -> None:
        if choice.name in self._by_name:
            raise ValueError(f"{choice.name}: named twice with different options or conditions")
        if choice.when is not None:
            self._check_condition(choice.name, choice.when)
        self._by_name[choice.name] = choice

    def _check_condition(self, name: str, when: When) -> None:
        parent = self._by_name.get(when.choice)
        if parent is None:
            raise ValueError(
                f"{name}: its condition names {when.choice!r}, which is not a choice before it"
            )
        unknown = [x for x in when.among if x not in parent.open_labels]
        if unknown or (isinstance(parent, Subset) and len(when.among) != 1):
            raise ValueError(
                f"{name}: a condition on {parent.name} needs its labels, got {when.among}"
            )

    def __iter__(self) -> Iterator[Decision]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def __getitem__(self, name: str) -> Decision:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def active(self, choice: Decision, picks: Mapping[str, Pick]) -> bool:
        """Whether a choice exists under these picks; an open condition counts as fulfilled."""
        when = choice.when
        if when is None:
            return True
        if not self.active(self._by_name[when.choice], picks):
            return False
        return when.choice not in picks or when.holds(picks[when.choice])

    def open(self, picks: Mapping[str, Pick]) -> tuple[str, ...]:
        """Names of the active choices that the picks leave open."""
        return tuple(c.name for c in self if c.name not in picks and self.active(c, picks))

    def partial(self, picks: Mapping[str, Pick]) -> Picks:
        """The picks of active choices, in order; some may be left open.

        Raises:
            ValueError: An unknown name, or a pick that its choice does not have.
        """
        unknown = [name for name in picks if name not in self]
        if unknown:
            raise ValueError(f"{unknown[0]}: no such choice in this space")
        kept = [c for c in self if c.name in picks and self.active(c, picks)]
        return {c.name: c.check(picks[c.name]) for c in kept}

    def canonical(self, picks: Mapping[str, Pick]) -> Picks:
        """The picks of active choices, in order, none left open.

        Raises:
            ValueError: As `partial`, or an active choice without a pick.
        """
        kept = self.partial(picks)
        missing = self.open(kept)
        if missing:
            raise ValueError(f"{missing[0]}: active, but not picked")
        return kept

    def sample(self, rng: np.random.Generator, fixed: Mapping[str, Pick] | None = None) -> Picks:
        """One architecture's picks: each active choice uniformly, `fixed` ones as they are."""
        picks: Picks = {}
        for choice in self:
            if self.active(choice, picks):
                held = (fixed or {}).get(choice.name)
                picks[choice.name] = choice.sample(rng) if held is None else held
        return picks

    def neighbours(
        self, picks: Mapping[str, Pick], rng: np.random.Generator | None = None
    ) -> Iterator[Picks]:
        """Picks that differ in one decision; what becomes active by it is drawn, or is the first.

        Args:
            picks: Canonical picks.
            rng: Draws newly active choices; None takes the first label of each.
        """
        for name, pick in picks.items():
            for other in self._by_name[name].near(pick):
                yield self._completed({**picks, name: other}, rng)

    def mutate(self, picks: Picks, rng: np.random.Generator) -> Picks:
        """One neighbour: a decision drawn uniformly, then another pick of it."""
        near = {name: self._by_name[name].near(pick) for name, pick in picks.items()}
        able = [name for name, others in near.items() if others]
        if not able:
            return dict(picks)
        name = able[int(rng.integers(len(able)))]
        other = near[name][int(rng.integers(len(near[name])))]
        return self._completed({**picks, name: other}, rng)

    def _completed(self, picks: Mapping[str, Pick], rng: np.random.Generator | None) -> Picks:
        done = dict(picks)
        for choice in self:
            if choice.name not in done and self.active(choice, done):
                done[choice.name] = choice.sample(rng) if rng is not None else _first(choice)
        return self.canonical(done)

    def size(self) -> int:
        """The number of distinct canonical picks."""
        return math.prod(self._count(c) for c in self if c.when is None)

    def _count(self, choice: Decision) -> int:
        weights = [
            math.prod(self._count(c) for c in self._under(choice, x)) for x in choice.labels
        ]
        if isinstance(choice, Choice):
            return sum(weights)
        counts = [1] + [0] * choice.k
        for weight in weights:
            counts = [n + (counts[i - 1] * weight if i else 0) for i, n in enumerate(counts)]
        return counts[choice.k]

    def _under(self, parent: Decision, label: Label) -> list[Decision]:
        return [
            c for c in self if c.when and c.when.choice == parent.name and label in c.when.among
        ]

    def describe(self) -> list[dict[str, Any]]:
        """The choices as plain JSON: what a space's fingerprint is made of."""
        return [describe(choice) for choice in self]


def _first(choice: Decision) -> Pick:
    return list(choice.items[: choice.k]) if isinstance(choice, Subset) else choice.labels[0]


def describe(choice: Decision) -> dict[str, Any]:
    """A choice as plain JSON: its kind, labels and condition."""
    when = (
        {"choice": choice.when.choice, "among": list(choice.when.among)} if choice.when else None
    )
    if isinstance(choice, Subset):
        extra: dict[str, Any] = {"k": choice.k}
    else:
        extra = {"ordered": choice.ordered, "open_only": list(choice.open_only)}
    return {"name": choice.name, "labels": list(choice.open_labels), "when": when, **extra}


def fingerprint(*parts: Any) -> str:
    """Sixteen hexadecimal digits that stand for plain JSON values."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
