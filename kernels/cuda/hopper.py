"""Sparse linear of many tokens on compute capability 9.0, by hopper.cu."""

import torch
from torch import Tensor

from kernels.cuda.blob import Blocks
from kernels.cuda.driver import available, capability, function, tensor_map

ROWS, _TOKENS, _STEP = 128, 256, 64
_STAGES = 4  # steps that are under way or in use, as many as shared memory holds
_STORED = 64  # tokens that a group of warps writes at once
_LINE = 128  # bytes of a line of what is copied
_SHARED = _STAGES * (_TOKENS + ROWS) * _LINE + 4 * _STORED * _LINE + 16 * _STAGES + 1024
_MANY, _LARGE = 8192, 2**25  # tokens, and results, from which it was faster than many.py


def takes(blocks: Blocks, x: Tensor) -> bool:
    """Whether this kernel computes it: bfloat16 or float16, blocks of 128 rows, columns in 64s."""
    narrow = x.dtype in (torch.bfloat16, torch.float16) and len(x) > 0
    fits = blocks.in_blocks and blocks.block[0] == ROWS and blocks.block[1] % _STEP == 0
    if not (narrow and fits and len(blocks.columns)):  # a map of nothing is refused
        return False
    return capability(x.device.index) == (9, 0) and available(x.device.index)


def pays(blocks: Blocks, x: Tensor) -> bool:
    """Whether it was faster than many.py, by a rule of thumb."""
    return len(x) >= _MANY and len(x) * blocks.rows >= _LARGE


def linear(blocks: Blocks, x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; bias float32."""
    y = x.new_empty(len(x), blocks.rows)
    defines = (
        ("BC", blocks.block[1]),
        ("STAGES", _STAGES),
        ("ACT", activation),
        ("BF16", int(x.dtype is torch.bfloat16)),
    )
    kernel = function("hopper.cu", "hopper", x.device.index, defines, dynamic=True)
    maps = (
        tensor_map(x, _TOKENS, _STEP),
        tensor_map(blocks.values.view(-1, blocks.block[1]), ROWS, _STEP),
        tensor_map(y, _STORED, _STEP),
    )
    lines = blocks.rows // ROWS
    tiles = -(-len(x) // _TOKENS) * lines
    at_once = torch.cuda.get_device_properties(x.device).multi_processor_count
    tensors, numbers = (blocks.order, blocks.starts, blocks.columns, bias), (len(x), lines)
    kernel.launch((min(tiles, at_once), 1), 288, tensors, numbers, _SHARED, maps)
    return y
