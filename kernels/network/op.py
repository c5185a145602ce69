"""`torch.ops.sparse_nas.sparse_chain`: many layers in one call."""

import ctypes
from collections.abc import Sequence
from functools import lru_cache, partial

from torch import Size, Tensor, bfloat16, float32, get_num_threads

from kernels import calls
from kernels.native.library import library
from kernels.network import reference
from kernels.network.program import read, step_count, tails, validate

SCHEMA = "sparse_chain(Tensor x, Tensor program, int[] out_tail) -> Tensor"
_Three, _Four = ctypes.c_int64 * 3, ctypes.c_int64 * 4


def _run(x: Tensor, program: Tensor, out_tail: Sequence[int]) -> Tensor:
    if x.dtype is bfloat16:
        return calls.in_float32(_run, x, program, out_tail)
    calls.check_tensors("sparse_chain", x, program, None, 0)
    shape, sizes, tail = _shapes(x.shape, tuple(out_tail))
    lib = library()
    if lib is None:
        return _plain(x, program, out_tail).reshape(shape)
    x, y, size = x.contiguous(), x.new_empty(*shape), program.numel()  # sizes in a tuple: 0.4 us
    pointers = (x.data_ptr(), sizes, program.data_ptr(), size, y.data_ptr(), tail)
    if lib.chain(*pointers, get_num_threads(), None):
        arguments = (*pointers, get_num_threads(), None)
        refusal = partial(_mismatch, x, program, out_tail)
        calls.settle(lib, lib.chain, arguments, program, validate, refusal)
    return y


def step_s(x: Tensor, program: Tensor, out_tail: Sequence[int], calls: int = 1) -> list[float]:
    """Seconds that each step of a program takes in so many calls, taken inside the core.

    A step that runs as part of another (a linear layer behind a linear layer) takes 0.

    Raises:
        RuntimeError: there is no compiled core, so that nothing can be timed.
    """
    if x.dtype is not float32:
        raise ValueError(f"step_s: x must be float32, got {x.dtype}")
    y, lib = _run(x, program, out_tail), library()
    if lib is None:
        raise RuntimeError("step_s: needs the compiled core, kernels run as plain PyTorch here")
    _, sizes, tail = _shapes(x.shape, tuple(out_tail))
    x, times = x.contiguous(), (ctypes.c_int64 * step_count(program))()
    pointers = (x.data_ptr(), sizes, program.data_ptr(), program.numel(), y.data_ptr(), tail)
    for _ in range(calls):
        lib.chain(*pointers, get_num_threads(), times)
    return [taken / 1e9 for taken in times]


@lru_cache(maxsize=4096)
def _shapes(x: Size, out_tail: tuple[int, ...]) -> tuple[tuple[int, ...], object, object]:
    """The shape of y, and for the C core the sizes of x and the tail of y."""
    images = len(out_tail) == 3 and len(x) == 4
    features = len(out_tail) == 1 and len(x) >= 1
    if not (images or features) or min(out_tail) < 0:
        raise ValueError(
            "sparse_chain: x must be (..., in) with out_tail [out], or (N, C, H, W) with out_tail "
            f"[C, H, W], got {tuple(x)} with {list(out_tail)}"
        )
    if images:
        return (x[0], *out_tail), _Four(*x), _Three(*out_tail)
    return (*x[:-1], *out_tail), _Four(x[:-1].numel(), x[-1], 1, 1), _Three(*out_tail, 1, 1)


def _plain(x: Tensor, program: Tensor, out_tail: Sequence[int]) -> Tensor:
    validate(program)
    graph = read(program)
    tail = tuple(out_tail) if len(out_tail) == 3 else (*out_tail, 1, 1)
    if len(out_tail) == 1:
        x = x.reshape(x.shape[:-1].numel(), x.shape[-1], 1, 1)
    if tails(program) != (tuple(x.shape[1:]), tail):
        raise ValueError(_mismatch(x, program, out_tail))
    return reference.run(x, graph)


def _mismatch(x: Tensor, program: Tensor, out_tail: Sequence[int]) -> str:
    given, gives = tails(program)
    return (
        f"sparse_chain: the program maps {given} to {gives} (channels, height, width); "
        f"that does not fit x {tuple(x.shape)} with out_tail {list(out_tail)}"
    )


def _fake(x: Tensor, program: Tensor, out_tail: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[: x.dim() - len(out_tail)], *out_tail))


calls.define(SCHEMA, _run, _fake)
