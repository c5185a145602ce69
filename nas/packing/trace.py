"""Tracing a module to a graph of aten operators with a free batch dimension."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils._pytree import TreeSpec

from nas.attention import slow_attention

_CHATTY = logging.getLogger("torch.fx.experimental.symbolic_shapes")


class Untraceable(Exception):
    """A module cannot be served by a traced graph; the message says why."""


@dataclass(frozen=True)
class Trace:
    """A traced module: flat tensor inputs, a flat tuple of outputs, and how to unflatten it."""

    module: GraphModule
    out_spec: TreeSpec


def trace(module: nn.Module, example: tuple[Tensor, ...]) -> Trace:
    """Export `module` in eval mode with a dynamic batch (dimension 0 of its inputs).

    Args:
        module: in eval mode, parametrizations removed.
        example: inputs of any batch; batch 1 is doubled, since an exported 1 would be fixed.

    Raises:
        Untraceable: where `torch.export` refuses, with its reason in one line.
    """
    example = at_least_two(example)
    try:
        with _quiet(), slow_attention():
            program = torch.export.export(
                module, example, dynamic_shapes=_dynamic(example), strict=False
            )
            traced = program.module(check_guards=False)
    except Exception as error:
        raise Untraceable(f"torch.export: {type(error).__name__}: {_first_line(error)}") from error
    assert isinstance(traced, GraphModule)
    traced.graph.set_codegen(CodeGen())
    return Trace(traced, program.call_spec.out_spec)


def batch_of(example: tuple[Tensor, ...]) -> int:
    """The batch size of `example`: the first dimension of its first tensor."""
    return example[0].shape[0]


def batched(example: tuple[Tensor, ...]) -> tuple[bool, ...]:
    """Which tensors of `example` carry the batch in their first dimension."""
    size = batch_of(example)
    return tuple(tensor.dim() > 0 and tensor.shape[0] == size for tensor in example)


def at_least_two(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`example` itself, or with batch 1 repeated to 2."""
    if batch_of(example) > 1:
        return example
    return tuple(
        torch.cat([tensor, tensor]) if carries else tensor
        for tensor, carries in zip(example, batched(example), strict=True)
    )


def _dynamic(example: tuple[Tensor, ...]) -> tuple[dict[int, torch.export.Dim] | None, ...]:
    # of float32 on a GPU PyTorch's kernels want a guard; what is exported is not bound to it
    batch = torch.export.Dim("batch", max=65535 if example[0].is_cuda else None)
    return tuple({0: batch} if carries else None for carries in batched(example))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


@contextmanager
def _quiet() -> Iterator[None]:
    """The reason of a failed export is kept by the caller: torch need not print it as well."""
    before = _CHATTY.disabled
    _CHATTY.disabled = True
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        _CHATTY.disabled = before
