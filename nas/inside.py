"""The choices inside of operations and other values: finding, settling and merging them.

This file imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from nas.choices import Choice, Decision, Pick, Subset, When, describe


def find(value: Any, when: When | None = None) -> Iterator[Decision]:
    """All choices inside a value, each with the condition of where it stands."""
    if isinstance(value, Choice):
        own = value if value.when else replace(value, options=dict(value.options), when=when)
        yield own
        for label, option in value.options:
            yield from find(option, When(value.name, (label,)))
    elif isinstance(value, Subset):
        yield value if value.when else replace(value, when=when)
    elif isinstance(value, tuple):
        for item in value:
            yield from find(item, when)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from find(getattr(value, field.name), when)


def settle(value: Any, picks: Mapping[str, Any]) -> Any:
    """The value with every picked choice replaced by its option; open ones stay."""
    if isinstance(value, Choice):
        picked = value.name in picks
        return settle(value.value(picks[value.name]), picks) if picked else _open(value, picks)
    if isinstance(value, tuple):
        return tuple(settle(item, picks) for item in value)
    if is_dataclass(value) and not isinstance(value, type) and not isinstance(value, Subset):
        changed = {f.name: settle(getattr(value, f.name), picks) for f in fields(value)}
        return replace(value, **changed)
    return value


def _open(choice: Choice, picks: Mapping[str, Pick]) -> Choice:
    return replace(choice, options={label: settle(o, picks) for label, o in choice.options})


def merge(found: Iterable[Decision]) -> list[Decision]:
    """One decision a name, parents first: a choice exists wherever one of its places does.

    Raises:
        ValueError: One name with different options, or under different choices.
    """
    merged: dict[str, Decision] = {}
    for choice in found:
        held = merged.get(choice.name)
        merged[choice.name] = choice if held is None else _joined(held, choice)
    placed: list[Decision] = []
    while merged:
        _place(next(iter(merged)), merged, placed)
    return placed


def _place(name: str, waiting: dict[str, Decision], placed: list[Decision]) -> None:
    """Put a choice behind the one that its condition asks for."""
    choice = waiting.pop(name)
    if choice.when is not None and choice.when.choice in waiting:
        _place(choice.when.choice, waiting, placed)
    placed.append(choice)


def _joined(a: Decision, b: Decision) -> Decision:
    unlike = describe(a) | {"when": None} != describe(b) | {"when": None}
    if unlike or (a.when and b.when and a.when.choice != b.when.choice):
        raise ValueError(f"{a.name}: named twice with different options or conditions")
    if a.when is None or b.when is None:
        return a if a.when is None else b
    among = tuple(dict.fromkeys((*a.when.among, *b.when.among)))
    when = When(a.when.choice, among)
    return (
        replace(a, options=dict(a.options), when=when)
        if isinstance(a, Choice)
        else replace(a, when=when)
    )
