"""Gradients of a layer whose weight is held whole, by whole_grad.cu (9.0).

That of the weight, zeros where no block is kept, alone or with that of the layer's input.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from kernels.block_index import BlockIndex
from kernels.cuda.blocks import SIZES
from kernels.cuda.driver import available, capability, function, tensor_map
from kernels.cuda.hopper import LINE, STEP, THREADS
from kernels.cuda.whole_plan import Plan, fastest, fastest_both

_STORED = 64  # rows and columns that a group of warps writes at once
_UNIT = 16  # the least side of a block
_WARPS, _RING = 8, 4  # that multiply; tiles whose kept blocks are looked up ahead
_ROOM = 196_608  # bytes of tiles that are under way or in use
_loaded: set[tuple[object, ...]] = set()


def takes(index: BlockIndex, dtype: torch.dtype) -> bool:
    """Whether this kernel computes it: bfloat16 or float16 on a GPU of 9.0."""
    device = index.lists.device
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = set(index.block) <= set(SIZES)
    return fits and capability(device.index) == (9, 0) and available(device.index)


def microseconds(index: BlockIndex, tokens: int) -> float:
    """How long `weight_grad` takes on an H200, by a rule of thumb."""
    return plan(index, tokens).us


def both_microseconds(index: BlockIndex, tokens: int) -> float:
    """How long `both_grads` takes on an H200, by a rule of thumb."""
    return plan_both(index, tokens).us


def ready(index: BlockIndex, x: Tensor) -> bool:
    """Whether it may be called now: while a graph is captured nothing can be loaded."""
    return _may_launch(x, plan(index, len(x)))


def both_ready(index: BlockIndex, x: Tensor) -> bool:
    """As `ready`, of both gradients."""
    return _may_launch(x, plan_both(index, len(x)))


def weight_grad(index: BlockIndex, grad: Tensor, x: Tensor) -> Tensor:
    """Gives grad^T x (out, in) at the blocks, else zeros.

    Args:
        index: of the blocks.
        grad: (tokens, out), one token at least; contiguous and from a multiple of 16 bytes on.
        x: (tokens, in), as grad.
    """
    given = x.new_empty(index.out_features, index.in_features)
    maps = ((grad, STEP), (x, STEP), (given, _STORED))
    _launch(index, x, plan(index, len(x)), maps)
    return given


def both_grads(
    index: BlockIndex, grad: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Gives what `weight_grad` does, and grad W (tokens, in), by one launch.

    Args:
        index: of the blocks.
        grad: see `weight_grad`.
        x: as grad.
        weight: W (out, in), as grad.
    """
    of_weight, of_x = torch.empty_like(weight), torch.empty_like(x)
    maps = ((grad, STEP), (x, STEP), (of_weight, _STORED), (weight, STEP), (of_x, _STORED))
    _launch(index, x, plan_both(index, len(x)), maps)
    return of_weight, of_x


def stages_of(rows: int, columns: int) -> int:
    """Steps that are under way or in use at once."""
    return _ROOM // ((rows + columns) * LINE)


def _launch(
    index: BlockIndex, x: Tensor, how: Plan, matrices: Sequence[tuple[Tensor, int]]
) -> None:
    """Starts the kernel: matrices it reads or writes, and lines of each that it moves at once."""
    defines = _defines(x, how)
    kernel = function("whole_grad.cu", "whole_grad", x.device.index, defines, dynamic=True)
    _loaded.add((x.device.index, defines))
    maps = tuple(tensor_map(part, lines, STEP) for part, lines in matrices)
    columns = max(how.weight, how.input)
    shared = stages_of(how.rows, columns) * ((how.rows + columns) * LINE + 16)
    shared += 4 * _STORED * LINE + _RING * (4 * _WARPS + 16) + 1024
    high, wide = (side.bit_length() - _UNIT.bit_length() for side in index.block)
    numbers = (index.out_features, index.in_features, len(x), high, wide, how.each)
    kernel.launch((how.blocks, 1), THREADS, (index.starts, index.columns), numbers, shared, maps)


def _may_launch(x: Tensor, how: Plan) -> bool:
    if not torch.cuda.is_current_stream_capturing():
        return True
    return (x.device.index, _defines(x, how)) in _loaded


def _defines(x: Tensor, how: Plan) -> tuple[tuple[str, int], ...]:
    return (
        ("HEIGHT", how.rows),
        ("WEIGHT", how.weight),
        ("INPUT", how.input),
        ("STAGES", stages_of(how.rows, max(how.weight, how.input))),
        ("BF16", int(x.dtype is torch.bfloat16)),
    )


def plan(index: BlockIndex, tokens: int) -> Plan:
    """The tiles of a gradient of the weight alone."""
    return fastest(*_sizes(index, tokens))


def plan_both(index: BlockIndex, tokens: int) -> Plan:
    """The tiles of both gradients."""
    return fastest_both(*_sizes(index, tokens))


def _sizes(index: BlockIndex, tokens: int) -> tuple[int, int, int, int]:
    return index.out_features, index.in_features, tokens, _at_once(index.lists.device)


@cache
def _at_once(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
