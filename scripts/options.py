"""Options of command lines: NAME=VALUE pairs, checked against what takes them, and devices."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver; asks no library, so that none is started."""
    return Path("/dev/nvidiactl").exists()


def device(name: str) -> str:
    """The type of `--device`.

    Raises:
        argparse.ArgumentTypeError: it is cuda, and there is no driver.
    """
    if name == "cuda" and not has_driver():
        raise argparse.ArgumentTypeError("cuda: there is no NVIDIA driver on this machine")
    return name


def pairs(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; a value is JSON if it can be read so, else text."""
    split = [text.partition("=") for text in texts]
    wrong = [text for text, (_, equals, _) in zip(texts, split, strict=True) if not equals]
    if wrong:
        raise ValueError(f"{wrong[0]!r}: needs NAME=VALUE")
    return {name: _value(value) for name, _, value in split}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def check_known(what: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that has no default, or a value of another kind than it."""
    for name, value in options.items():
        if name not in defaults:
            raise ValueError(f"{what} {name!r} is none of {list(defaults)}")
        default = defaults[name]
        if default is not None and not _alike(value, default):
            like = json.dumps(default)
            raise ValueError(f"{what} {name}={json.dumps(value)}: needs a value like {like}")


def _alike(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, list) and all(_alike(item, default[0]) for item in value)
    kind = (int, float) if isinstance(default, float) else type(default)
    return isinstance(value, kind) and isinstance(value, bool) == isinstance(default, bool)
