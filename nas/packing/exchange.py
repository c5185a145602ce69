"""Packing without a graph: layers exchanged one by one, where tracing is not possible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nas.attention import slow_attention
from nas.packing import devices
from nas.packing.layer import ConvArgs, Kernel, Layer
from nas.packing.tune import Choice, choose


class Exchanged(nn.Module):
    """Runs a module whose layers were exchanged, its attention off the fused dense path."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        """Call the module."""
        with slow_attention():
            return self.module(*inputs)


class PackedForward(nn.Module):
    """Mixed into the class of a layer: its forward is the chosen kernel.

    `weight` stays readable, so that whoever uses it as a function still sees the masked weight.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the kernel."""
        kernel: Kernel = self.packed_kernel  # type: ignore[assignment]
        return kernel(x)


def exchange(
    module: nn.Module, example: tuple[Tensor, ...], sparse: bool, anew: bool
) -> tuple[Exchanged, list[Choice], list[str]]:
    """Give each exact `nn.Linear` and `nn.Conv2d` of `module` its fastest kernel, in place.

    Args:
        module: a private copy in eval mode, parametrizations removed.
        example: inputs; every layer is timed on what it is given first.
        sparse: whether sparse kernels may be chosen.
        anew: whether to time what was timed before.
    """

    def chosen(name: str, layer: nn.Module, x: Tensor) -> Choice:
        return choose(_read(name, layer), x, sparse, anew)

    candidates = {name: layer for name, layer in module.named_modules() if _is_exact(layer)}
    choices = _choices_while_running(module, candidates, example, chosen)
    for name, choice in choices.items():
        if choice.kernel is choice.sparse:
            _give(candidates[name], choice.kernel)
    return Exchanged(module), list(choices.values()), list(_left_out(module, candidates, choices))


def _choices_while_running(
    module: nn.Module,
    candidates: dict[str, nn.Module],
    example: tuple[Tensor, ...],
    chosen: Callable[[str, nn.Module, Tensor], Choice],
) -> dict[str, Choice]:
    choices: dict[str, Choice] = {}

    def watch(name: str, layer: nn.Module) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in choices and _is_served(layer, args):
                choices[name] = chosen(name, layer, args[0])

        return layer.register_forward_pre_hook(before)

    handles = [watch(name, layer) for name, layer in candidates.items()]
    try:
        with slow_attention():
            module(*(tensor.clone() for tensor in example))
    finally:
        for handle in handles:
            handle.remove()
    return choices


def _is_exact(module: nn.Module) -> bool:
    """Whether calling `module` means exactly what its base class says."""
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if isinstance(module, nn.Conv2d):
        own = kind.forward, getattr(kind, "_conv_forward", None)
        plain = nn.Conv2d.forward, nn.Conv2d._conv_forward
        return own == plain and module.padding_mode == "zeros" and _padding(module) is not None
    return isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward


def _is_served(layer: nn.Module, args: tuple[Any, ...]) -> bool:
    tensors = (*args, *layer.parameters(recurse=False))
    fitting = len(args) == 1 and not devices.of(args[0]).objection(tensors)
    return fitting and (args[0].dim() == 4 or isinstance(layer, nn.Linear))


def _padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    if isinstance(conv.padding, tuple):
        return conv.padding[0], conv.padding[1]
    if conv.padding == "valid":
        return 0, 0
    sizes = zip(conv.dilation, conv.kernel_size, strict=True)
    total = [step * (length - 1) for step, length in sizes]
    return None if any(amount % 2 for amount in total) else (total[0] // 2, total[1] // 2)


def _read(name: str, layer: nn.Module) -> Layer:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    bias = None if layer.bias is None else layer.bias.detach()
    if isinstance(layer, nn.Linear):
        return Layer(name, layer.weight.detach(), bias)
    padding = _padding(layer)
    assert padding is not None
    (sh, sw), (dh, dw) = layer.stride, layer.dilation
    return Layer(
        name, layer.weight.detach(), bias, ConvArgs((sh, sw), padding, (dh, dw), layer.groups)
    )


def _give(layer: nn.Module, kernel: Kernel) -> None:
    layer.packed_kernel = kernel  # type: ignore[assignment]
    kind: Any = type(layer)
    layer.__class__ = _packed_class(kind)


@lru_cache
def _packed_class(kind: Any) -> Any:
    """`kind` with its forward replaced and all else of it kept (attributes, hooks, isinstance)."""
    return type(f"Packed{kind.__name__}", (PackedForward, kind), {})


def _left_out(
    module: nn.Module, candidates: dict[str, nn.Module], choices: dict[str, Choice]
) -> Iterator[str]:
    for name, layer in module.named_modules():
        if name in choices or not _has_sparse_weight(layer):
            continue
        if name in candidates:
            yield f"{name}: left as it is: not called as a module on one tensor of its dtype"
        else:
            yield f"{name}: left as it is: {type(layer).__name__} is no plain Linear or Conv2d"


def _has_sparse_weight(layer: nn.Module) -> bool:
    """Whether a weight of `layer` itself has a tenth of zeros, as only a mask leaves it."""
    weights = [p for p in layer.parameters(recurse=False) if p.dim() > 1]
    return any(int(torch.count_nonzero(w)) <= 0.9 * w.numel() for w in weights)
