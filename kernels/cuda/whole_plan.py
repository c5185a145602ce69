"""How whole_grad.cu shares its work out, and how long that takes on an H200, by rules of thumb."""

from bisect import bisect_left
from functools import lru_cache
from typing import NamedTuple

from kernels.cuda.hopper import STEP

# Of tiles of so many rows and columns of the gradient of a weight alone, microseconds: of a
# launch, of 64 tokens, of a tile beside them. Bytes of it that are written in one.
TILES = {
    (128, 256): (2.5, 0.65, 1.1),
    (128, 192): (2.31, 0.482, 1.29),
    (128, 128): (1.85, 0.344, 1.05),
    (128, 64): (1.33, 0.226, 1.35),
    (64, 64): (1.56, 0.16, 0.89),
}
_WRITTEN = 5e6
# Of both gradients of a layer, tiles of 128 rows or tokens and so many columns: of a launch, of 64
# tokens of a weight's, of 64 rows of x's, of a tile beside them; fitted to 82 sizes. Of more than
# 128 columns both are as wide, else there are too few registers. Bytes of both that are written in
# one, and of the output's gradient, which both read.
BOTH = {
    64: (1.21, 0.247, 0.211, 1.26),
    128: (1.26, 0.328, 0.315, 1.75),
    192: (1.59, 0.503, 0.51, 1.68),
    256: (2.06, 0.657, 0.657, 0.65),
}
PAIRS = ((64, 64), (64, 128), (128, 64), (128, 128), (192, 192), (256, 256))
_TALL, _WRITTEN_BOTH, _READ = 128, 4e6, 6e6


class Plan(NamedTuple):
    """Tiles of one launch.

    Attributes:
        us: that it takes.
        rows: of a tile.
        weight: columns of a tile of the weight's gradient.
        input: of that of x, 0 where there is none.
        blocks: thread blocks.
        each: of both, tiles that most thread blocks take of the product that comes second; below 0
            where that is the gradient of x.
    """

    us: float
    rows: int
    weight: int
    input: int
    blocks: int
    each: int


def together(one: float, other: float, power: float = 1.5) -> float:
    """Of what partly hides each other: the sum (a power of 1) or less, the longer at least."""
    return (one**power + other**power) ** (1 / power)


@lru_cache(maxsize=4096)
def fastest(rows: int, columns: int, tokens: int, most: int) -> Plan:
    """The gradient of a weight alone.

    Args:
        rows: of the weight.
        columns: of it.
        tokens: that are summed.
        most: thread blocks that run at once.
    """
    plans, written = [], 2 * rows * columns / _WRITTEN
    for (height, width), (launch, step, beside) in TILES.items():
        count = _tiles(rows, height) * _tiles(columns, width)
        each = together(step * _tiles(tokens, STEP), beside)
        time = launch + together(_tiles(count, most) * each, written)
        plans.append(Plan(time, height, width, 0, min(most, count), 0))
    return min(plans)


@lru_cache(maxsize=4096)
def fastest_both(rows: int, columns: int, tokens: int, most: int) -> Plan:
    """Both gradients of a layer; arguments as of `fastest`."""
    plans, moved = [], 2 * (rows + tokens) * columns / _WRITTEN_BOTH
    moved += 2 * (2 * rows * tokens) / _READ
    for weight, given in PAIRS:
        launch, step, _, beside = BOTH[weight]
        launch_x, _, step_x, beside_x = BOTH[given]
        counts = (
            _tiles(rows, _TALL) * _tiles(columns, weight),
            _tiles(tokens, _TALL) * _tiles(columns, given),
        )
        times = (
            together(step * _tiles(tokens, STEP), beside),
            together(step_x * _tiles(rows, STEP), beside_x),
        )
        blocks, last = min(most, sum(counts)), times[0] >= times[1]
        first, second = (0, 1) if last else (1, 0)  # those that take longer first
        took, each = _ends(counts[first], times[first], counts[second], times[second], blocks)
        time = max(launch, launch_x) + together(took, moved)
        plans.append(Plan(time, _TALL, weight, given, blocks, -each if last else each))
    return min(plans)


def _ends(count: int, time: float, others: int, other: float, blocks: int) -> tuple[float, int]:
    """When the last of some thread blocks ends at the soonest.

    Args:
        count: of tiles of the first product, of which each takes one of every so many.
        time: of one of them.
        others: tiles of the second product, one at least.
        other: the time of one of them.
        blocks: thread blocks; those that have one of the first product's tiles more than others
            take what the others leave.

    Returns:
        When, and tiles of the second product that those others take.
    """
    rounds, longer = divmod(count, blocks)
    shorter = blocks - longer
    most = _tiles(others, shorter)
    if not longer:
        return rounds * time + most * other, most

    def ends(each: int) -> tuple[float, float]:
        left = _tiles(max(0, others - each * shorter), longer)
        return rounds * time + each * other, (rounds + 1) * time + left * other

    # with more of them these end later, and the others sooner
    met = 1 + bisect_left(range(1, most), True, key=lambda each: ends(each)[0] >= ends(each)[1])
    return min((max(ends(each)), each) for each in (max(1, met - 1), met))


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)
