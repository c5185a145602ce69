"""`torch.ops.sparse_nas.sparse_chain`: a run of layers in one call."""

import ctypes
from collections.abc import Sequence
from functools import partial

from torch import Tensor, get_num_threads

from kernels import calls
from kernels.native.library import library
from kernels.network import reference
from kernels.network.program import layers_of, shapes, validate

SCHEMA = "sparse_chain(Tensor x, Tensor program, int[] out_tail) -> Tensor"
_Three, _Four = ctypes.c_int64 * 3, ctypes.c_int64 * 4


def _run(x: Tensor, program: Tensor, out_tail: Sequence[int]) -> Tensor:
    calls.check_tensors("sparse_chain", x, program, None, 0)
    shape = _shape(x, out_tail)
    lib = library()
    if lib is None:
        return _plain(x, program, out_tail)
    x, y = x.contiguous(), x.new_empty(shape)
    if len(out_tail) == 3:
        sizes, tail = _Four(*x.shape), _Three(*out_tail)
    else:
        batch, columns = x.shape[:-1].numel(), x.shape[-1]
        sizes, tail = _Four(batch, columns, 1, 1), _Three(*out_tail, 1, 1)
    pointers = (x.data_ptr(), sizes, program.data_ptr(), program.numel(), y.data_ptr(), tail)
    arguments = (*pointers, len(out_tail), get_num_threads())
    if lib.chain(*arguments):
        refusal = partial(_mismatch, x, program, out_tail)
        calls.settle(lib, lib.chain, arguments, program, validate, refusal)
    return y


def _shape(x: Tensor, out_tail: Sequence[int]) -> tuple[int, ...]:
    tail = len(out_tail)
    if tail not in (1, 3) or x.dim() < 1 or (tail == 3 and x.dim() != 4) or min(out_tail) < 0:
        raise ValueError(
            "sparse_chain: x must be (..., in) with out_tail [out], or (N, C, H, W) with out_tail "
            f"[C, H, W], got {tuple(x.shape)} with {list(out_tail)}"
        )
    return (*x.shape[:-tail], *out_tail)


def _plain(x: Tensor, program: Tensor, out_tail: Sequence[int]) -> Tensor:
    validate(program)
    layers, first = layers_of(program), shapes(program)[0]
    convolutions = len(first.weight_shape) == 4
    fits = convolutions == (len(out_tail) == 3)
    inputs = x.shape[1 if convolutions else -1] if fits else -1
    if inputs != first.channels * first.groups:
        raise ValueError(_mismatch(x, program, out_tail))
    y = reference.sparse_chain(x.contiguous(), layers)
    if list(y.shape[-len(out_tail) :]) != list(out_tail):
        raise ValueError(_mismatch(x, program, out_tail))
    return y


def _mismatch(x: Tensor, program: Tensor, out_tail: Sequence[int]) -> str:
    packed = [shape.weight_shape for shape in shapes(program)]
    return (
        f"sparse_chain: the program's weights are {packed}; "
        f"they do not fit x {tuple(x.shape)} with out_tail {list(out_tail)}"
    )


def _fake(x: Tensor, program: Tensor, out_tail: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[: x.dim() - len(out_tail)], *out_tail))


calls.define(SCHEMA, _run, _fake)
