"""Checks of a weight packed for a GPU: no kernel sees an index that points elsewhere."""

import torch
from torch import Tensor

from kernels.cuda.blocks import Blocks


def rule(holds: bool, thing: str, law: str, value: object) -> None:
    """Raises ValueError where something does not hold: the thing, the rule and the value."""
    if not holds:
        raise ValueError(f"packed weight: {thing} must be {law}, got {value}")


def check_index(blocks: Blocks) -> None:
    """Checks where rows and tiles start, and every column and place; waits for the device."""
    if blocks.is_channel:
        rows = blocks.order
        inside = bool(((rows >= 0) & (rows < blocks.rows)).all() & (rows.diff() > 0).all())
        rule(inside, "rows", f"ascending in [0, {blocks.rows})", "others")
    if not len(blocks.starts):
        return
    width, column = blocks.channels // blocks.block[1], blocks.columns
    if blocks.has_entries:
        width, column = blocks.channels, columns_of(blocks.columns)[:, 7]  # they ascend in eights
    _check_starts("starts", blocks.starts, len(column), 1)
    inside = bool(((column >= 0) & (column < width)).all())
    rule(inside, "columns", f"in [0, {width})", "others")
    if not blocks.has_entries:
        counts = blocks.starts.diff()
        row = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        ascending = bool(((column.diff() > 0) | (row.diff() > 0)).all())
        rule(ascending, "columns", "ascending in each row", "others")
    if len(blocks.tiles):
        _check_tiles(blocks)


def columns_of(words: Tensor) -> Tensor:
    """The columns of entries, (eights, 8) int64, ascending in each: see entries.cu."""
    low, high = words[len(words) // 3 * 2 :].view(-1, 2, 1).long().unbind(1)
    places = torch.arange(5, device=words.device) * 6
    steps = torch.cat([low >> 16 + places[:2] & 63, high >> places & 63], 1)
    return torch.cat([low & 0xFFFF, steps], 1).cumsum(1)


def _check_tiles(blocks: Blocks) -> None:
    """Checks that no lane reads beyond its tile."""
    _check_starts("tiles", blocks.tiles, len(blocks.pairs) // 4, 1)
    first, head = 4 * blocks.tiles[:-1].long(), torch.arange(48, device=blocks.tiles.device)
    sizes = 4 * blocks.tiles.long().diff()
    rule(bool((sizes >= len(head)).all()), "tiles", f"of at least {len(head)} words", "fewer")
    words = blocks.pairs[first[:, None] + head]
    bits = torch.arange(32, device=words.device)
    counts = (words[:, :32, None] >> bits & 1).sum(2)
    begins = torch.stack([words[:, 32:] & 0xFFFF, words[:, 32:] >> 16 & 0xFFFF], 2).flatten(1)
    ends = counts.cumsum(1)
    fits = bool((begins == ends - counts).all() & (ends[:, -1] <= sizes - len(head)).all())
    rule(fits, "tiles", "lists of pairs, lane by lane", "others")


def _check_starts(name: str, starts: Tensor, count: int, every: int) -> None:
    steps = starts.long().diff()  # of 32 bits a difference may wrap around
    ascending = (starts[0] == 0) & (starts[-1] == count) & (steps >= 0).all()
    whole = bool(ascending & (starts % every == 0).all())
    rule(whole, name, f"ascending from 0 to {count} by multiples of {every}", starts.tolist()[:4])
