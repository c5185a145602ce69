"""Which kernel was measured to be the fastest for a packed weight and what it is applied to."""

from collections.abc import Callable, Hashable, MutableMapping
from weakref import WeakKeyDictionary

import torch

from kernels import measured
from kernels.cuda.blocks import Blocks
from kernels.cuda.rounding import narrowed
from kernels.window import Window

_tables: MutableMapping[Blocks, dict[Hashable, str]] = WeakKeyDictionary()


def bucket(count: int) -> int:
    """The power of two that numbers of tokens or images up to it share their times with."""
    return 1 << max(0, count - 1).bit_length()


def linear_case(blocks: Blocks, tokens: int) -> str:
    """The name in `kernels.measured` of the kernels for weights like this, and so many tokens."""
    return " ".join([*_weight(blocks, False), "tokens", str(bucket(tokens))])


def conv2d_case(blocks: Blocks, shape: tuple[int, ...], window: Window) -> str:
    """The same for a convolution of x (N, C, H, W)."""
    searched = "searched" if torch.backends.cudnn.benchmark else ""
    words = ["kernel", window.kernel, "groups", blocks.form.groups, searched]
    words += ["of", (bucket(shape[0]), *shape[1:]), "stride, padding, dilation", *window.pairs]
    return " ".join([*_weight(blocks, True), *(str(word) for word in words if word)])


def fastest(blocks: Blocks, key: Hashable, case: Callable[[], str]) -> str | None:
    """The fastest kernel of a case, or None where it was not measured.

    The first call for a weight and a key reads what is known of the case; others look it up.
    """
    known = _tables.setdefault(blocks, {})
    if key not in known:
        us = measured.times(blocks.values.device).of(case())
        known[key] = min(us, key=us.__getitem__) if us else ""
    return known[key] or None


def put(blocks: Blocks, key: Hashable, kernel: str) -> None:
    """From now on this is the fastest one for a weight and a key."""
    _tables.setdefault(blocks, {})[key] = kernel


def _weight(blocks: Blocks, conv: bool) -> list[str]:
    dense, whole = blocks.dense, blocks.rows * blocks.channels
    kind = "x".join(map(str, (1, 1) if blocks.has_entries else blocks.block))
    stored, dtype = blocks.entries if dense else blocks.values.numel(), blocks.values.dtype
    words = ["kernels of", "conv2d" if conv else "linear", f"{blocks.rows}x{blocks.channels}"]
    words += [str(dtype), *(["tf32 of", narrowed(dtype, conv)] if narrowed(dtype, conv) else [])]
    words += [kind, "kept", measured.share(stored, whole)]
    semi = blocks.two_of_four is not None or blocks.halves is not None
    return [*words, "2:4"] if semi else words
