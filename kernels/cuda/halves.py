"""Sparse linear of many tokens, two of every four weights kept, by halves.cu (9.0)."""

import torch
from torch import Tensor

from kernels.cuda.blocks import Blocks
from kernels.cuda.driver import available, capability, function, tensor_map
from kernels.cuda.hopper import LINE, ROWS, STEP, THREADS, TOKENS

_STAGES = 5
_STORED = 32  # tokens that a group of warps writes at once
_WORDS = 1024  # bytes of 64 columns
_SHARED = (
    _STAGES * ((TOKENS + ROWS // 2) * LINE + _WORDS) + 4 * _STORED * LINE + 16 * _STAGES + 1024
)
_LEAST = 4 * STEP  # columns
_MANY, _FULL = 512, 3 * 2**20  # tokens and results, from which it was faster than dense


def compressed(weight: Tensor) -> Tensor | None:
    """A weight (rows, channels) as halves.cu reads it, or None: 16 bits on a GPU of 9.0.

    Its rows come in 128s and its columns in 64s, at least four of these; NVRTC is there.
    """
    if not weight.is_cuda or weight.itemsize != 2:
        return None
    if capability(weight.device.index) != (9, 0) or not available(weight.device.index):
        return None
    rows, channels = weight.shape
    if not rows or rows % ROWS or channels < _LEAST or channels % STEP:
        return None
    return halved(weight)


def halved(weight: Tensor) -> Tensor | None:
    """Two of every four along each row of a weight, (n,) int32; None: more are not zero.

    First the weights, (rows, channels / 2), then words that say which they are, (rows / 128,
    channels / 64, 8 warps, 8 rows, 4): see halves.cu.
    """
    rows, channels = weight.shape
    fours = weight.view(rows, channels // 4, 4)
    ones = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=weight.device)
    bits = torch.tensor(_CODES, device=weight.device)[((fours != 0) * ones).sum(2)]
    if int(bits.min()) < 0:
        return None
    kept = fours.gather(2, torch.stack([bits & 3, bits >> 2], 2))
    parts = bits.view(rows // ROWS, 8, 2, 8, channels // STEP, 4, 4)
    parts = (parts << 4 * torch.arange(4, device=weight.device)).sum(-1)  # of 16 columns
    words = (parts[:, :, 0] | parts[:, :, 1] << 16).permute(0, 3, 1, 2, 4)
    words = torch.where(words < 2**31, words, words - 2**32).int()
    return torch.cat([kept.flatten().view(torch.int32), words.flatten()])


def _code(flags: int) -> int:
    """Places of two among four, in two bits each, the first ones lower; -1: it is more."""
    places = [place for place in range(4) if flags >> place & 1]
    spare = [place for place in range(4) if place not in places]
    first, second = sorted((places + spare)[:2])
    return first | second << 2 if len(places) <= 2 else -1


_CODES = [_code(flags) for flags in range(16)]


def takes(blocks: Blocks, x: Tensor) -> bool:
    """Whether this kernel computes it: two of every four are kept, bfloat16 or float16, 9.0."""
    return blocks.halves is not None and len(x) > 0 and available(x.device.index)


def pays(blocks: Blocks, x: Tensor) -> bool:
    """Whether it was faster than dense, by a rule of thumb."""
    return len(x) >= _MANY and len(x) * blocks.rows >= _FULL


def linear(blocks: Blocks, x: Tensor, bias: Tensor | None, activation: int) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; bias float32."""
    assert blocks.halves is not None
    count = blocks.rows * blocks.channels // 4  # words of two
    kept = blocks.halves[:count].view(x.dtype).view(blocks.rows, -1)
    lines, tiles = blocks.rows // ROWS, -(-len(x) // TOKENS)
    y = x.new_empty(len(x), blocks.rows)
    defines = (
        ("STAGES", _STAGES),
        ("BIAS", int(bias is not None)),
        ("ACT", activation),
        ("BF16", int(x.dtype is torch.bfloat16)),
    )
    kernel = function("halves.cu", "halves", x.device.index, defines, dynamic=True)
    maps = (
        tensor_map(x, TOKENS, STEP),
        tensor_map(kept, ROWS, STEP // 2),
        tensor_map(y, _STORED, STEP),
    )
    numbers = (lines, tiles, blocks.channels // STEP)
    at_once = torch.cuda.get_device_properties(x.device).multi_processor_count
    grid, tensors = (min(at_once, lines * tiles), 1), (blocks.halves[count:], bias)
    kernel.launch(grid, THREADS, tensors, numbers, _SHARED, maps)
    return y
