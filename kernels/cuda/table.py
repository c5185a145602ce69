"""Which kernel was measured to be the fastest for a packed weight, by the number of tokens."""

from collections.abc import MutableMapping
from weakref import WeakKeyDictionary

from kernels import measured
from kernels.cuda.blob import Blocks

_MOST = 24  # tokens as a power of two, up to which times are looked up
_tables: MutableMapping[Blocks, dict[int, str]] = WeakKeyDictionary()


def bucket(tokens: int) -> int:
    """The power of two that numbers of tokens up to it share their times with."""
    return 1 << max(0, tokens - 1).bit_length()


def fastest(blocks: Blocks, tokens: int) -> str | None:
    """The fastest kernel for so many tokens, or None where none was measured.

    The first call for a weight reads what is known of weights like it; others do but look it up.
    """
    return of(blocks).get(bucket(tokens))


def of(blocks: Blocks) -> dict[int, str]:
    """The table of one weight: the fastest kernel by `bucket`; may be added to."""
    found = _tables.get(blocks)
    if found is None:
        found = _tables[blocks] = _known(blocks)
    return found


def case(blocks: Blocks, tokens: int) -> str:
    """The name in `kernels.measured` of the kernels for weights like this, and so many tokens."""
    dense, whole = blocks.dense, blocks.rows * blocks.channels
    kind = "x".join(map(str, (1, 1) if blocks.has_entries else blocks.block))
    stored = len(blocks.columns) if dense else blocks.values.numel()
    words = ["kernels of linear", f"{blocks.rows}x{blocks.channels}", blocks.values.dtype, kind]
    words += ["kept", measured.share(stored, whole)]
    words += ["2:4"] if blocks.two_of_four is not None else []
    return " ".join(map(str, [*words, "tokens", bucket(tokens)]))


def _known(blocks: Blocks) -> dict[int, str]:
    times, found = measured.times(blocks.values.device), {}
    for tokens in (1 << power for power in range(_MOST + 1)):
        if us := times.of(case(blocks, tokens)):
            found[tokens] = min(us, key=us.__getitem__)
    return found
