"""Sparse linear of many tokens where two of every four weights are kept, by cuSPARSELt."""

from typing import Any

import torch
from torch import Tensor

from kernels.cuda.blocks import Blocks

MANY = 2048  # tokens from which it was faster than dense
LARGE = 2**24  # weights from which it was
_found: dict[tuple[object, ...], int] = {}


def compressed(weight: Tensor) -> Tensor | None:
    """A weight as cuSPARSELt wants it, or None: bfloat16 on a GPU, in multiples of 64.

    Of float16 the search for an algorithm ends in an illegal instruction (cuSPARSELt 0.8 on an
    H200), and the default one is slower than dense.
    """
    fits = weight.is_cuda and weight.dtype is torch.bfloat16 and weight.numel() >= LARGE
    if not fits or weight.shape[0] % 64 or weight.shape[1] % 64:
        return None
    four = weight.ne(0).view(len(weight), -1, 4)
    if not torch.backends.cusparselt.is_available() or int(four.sum(2).max()) > 2:
        return None
    return torch._cslt_compress(weight)


def takes(blocks: Blocks, x: Tensor) -> bool:
    """Whether it computes x (tokens, channels) and was faster."""
    return blocks.two_of_four is not None and len(x) >= MANY and len(x) % 16 == 0


def linear(blocks: Blocks, x: Tensor, bias: Tensor | None) -> Tensor:
    """Gives y (tokens, rows) of x (tokens, channels), contiguous; bias of their dtype."""
    held: Any = blocks.two_of_four
    algorithm = _algorithm(held, x.t(), blocks.rows)
    return torch._cslt_sparse_mm(held, x.t(), bias, transpose_result=True, alg_id=algorithm)


def _algorithm(held: Tensor, x: Tensor, rows: int) -> int:
    """The fastest one, searched once for each shape; the default while a graph is captured."""
    key = (rows, *x.shape, x.dtype, x.device)
    if key not in _found:
        if torch.cuda.is_current_stream_capturing():
            return 0
        search: Any = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
        _found[key] = search(held, x, None, None, None, True)[0]
    return _found[key]
