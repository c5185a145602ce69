"""`sparsify`: a space out of any `nn.Module`, one choice of sparsity for each weight tensor.

The module is an opaque node plus its choices. Trials start from the weights that it already has.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from nas.allocation import ALLOCATIONS, allocate
from nas.choices import Choice, Pick
from nas.expected import expected
from nas.masks import Mixture, Plan, attach_all
from nas.operations import DENSE, Layer
from nas.space import Activations, Space
from nas.sparsity import Sparsity, Unstructured, admits, parse
from nas.trace import Trace, trace

log = logging.getLogger("nas")
LEVELS = ("dense", "0.5", "0.8", "0.9", "0.95")
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class ModuleSpace(Space):
    """A space of the sparsities of a module's weight tensors; see `sparsify`.

    Attributes:
        example: The example input.
        left_out: Why each other parameter has no choice, by its name.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        example: Tensor,
        tensors: Mapping[str, tuple[Sparsity, ...]],
        left_out: Mapping[str, str],
        choices: Iterable[Choice],
        traced: Trace,
    ) -> None:
        self._make, self.example, self.tensors = make, example, dict(tensors)
        self.left_out, self._trace = dict(left_out), traced
        shapes = [[path, list(shape)] for path, shape in traced.shapes.items()]
        super().__init__(choices, tuple(example.shape[1:]), shapes)

    def build(self, picks: Mapping[str, Pick], masked: bool = True) -> nn.Module:
        """See `Space.build`; a supernet gets attributes `mixture` and `expected_cost`."""
        module, mixture = self._make(), Mixture()
        picks = self.choices.partial(picks)
        if masked:
            plan = {path: self._plan(path, picks) for path in self.tensors}
            attach_all(module, {p: o for p, o in plan.items() if o[0] != [DENSE]}, mixture)
        if self.open(picks):
            _dress(module, mixture, self.layers(picks))
        return module

    def _plan(self, path: str, picks: Mapping[str, Pick]) -> Plan:
        sparsity = self.sparsity(path, picks)
        if isinstance(sparsity, Choice):
            return [option for _, option in sparsity.options], sparsity.name
        return [sparsity], None

    def sparsity(self, path: str, picks: Mapping[str, Pick]) -> Any:
        """The Sparsity of a weight tensor under picks, or its Choice where that is open."""
        choice = self.choices[_name(path)]
        assert isinstance(choice, Choice)
        held = picks.get(choice.name)
        return choice if held is None else choice.value(held)  # type: ignore[arg-type]

    def layers(self, picks: Mapping[str, Pick]) -> list[Layer]:
        """See `Space.layers`."""
        return [
            Layer(
                path,
                shape,
                self._trace.positions.get(path, 0),
                self.sparsity(path, picks) if path in self.tensors else DENSE,
            )
            for path, shape in self._trace.shapes.items()
        ]

    def activations(self, picks: Mapping[str, Pick]) -> Activations:
        """See `Space.activations`; the sparsities do not change it."""
        return self._trace.activations(self._make, self.example)

    def draw(self, picks: Mapping[str, Pick]) -> nx.DiGraph[str]:
        """See `Space.draw`: the weight tensors in the order in which the module uses them."""
        drawn: nx.DiGraph[str] = nx.DiGraph()
        used = [p for p in self._trace.positions if p in self.tensors]
        names = [*used, *(p for p in self.tensors if p not in used)]
        for path in names:
            sparsity = self.sparsity(path, picks)
            label = getattr(sparsity, "label", "open")
            shape = self._trace.shapes[path]
            drawn.add_node(path, label=path.rpartition(".")[0], shape=shape, sparsity=label)
        drawn.add_edges_from(pairwise(names))
        return drawn


class GlobalSpace(ModuleSpace):
    """One ratio for the whole module, and how it is spread over the tensors as a choice."""

    def sparsity(self, path: str, picks: Mapping[str, Pick]) -> Any:
        """The tensor's share of the global ratio."""
        ratio, allocation = picks.get("ratio"), picks.get("allocation")
        if ratio is None or allocation is None:
            raise ValueError("sparsify(per='model'): ratio and allocation cannot be left open")
        ratios = self._allocated(str(allocation), float(ratio))  # type: ignore[arg-type]
        return Unstructured(ratios[path]) if ratios[path] > 0 else DENSE

    def _allocated(self, allocation: str, ratio: float) -> dict[str, float]:
        shapes = {path: self._trace.shapes[path] for path in self.tensors}
        weights = dict(self._make().named_parameters()) if allocation in ("global", "lamp") else {}
        held = {path: weights[path].detach() for path in shapes if path in weights}
        return allocate(allocation, shapes, ratio, held or None)


def sparsify(
    model: nn.Module | Callable[[], nn.Module],
    example_input: Tensor,
    sparsities: Sequence[str | Sparsity] = LEVELS,
    *,
    per: str = "tensor",
    skip: Sequence[str] = (),
) -> ModuleSpace:
    """Make a space of a module: a sparsity choice for each of its weight tensors.

    Tied weights and modules that are called twice have one choice. Options that a shape does not
    admit are dropped; what is left out altogether is in `space.left_out`, and logged.

    Args:
        model: A trained module, or a function that makes it; trials start from its weights. A
            function that can be imported is what remote workers want.
        example_input: (N, ...), to see what the weights are used for.
        sparsities: Options, or their labels.
        per: `tensor`, or `model`: one ratio for all and its allocation (uniform, ERK, global
            magnitude, LAMP) as the choices; sparsities are then unstructured.
        skip: Names of parameters to leave alone.

    Raises:
        ValueError: Nothing is left to make sparse, or `skip` names what is not there.
    """
    make = _Copies(model) if isinstance(model, nn.Module) else model
    module = make().eval()
    options = tuple(parse(s) if isinstance(s, str) else s for s in sparsities)
    tensors, left_out = _tensors(module, options, skip)
    if not tensors:
        raise ValueError(f"sparsify: nothing can be made sparse; left out: {left_out}")
    for path, reason in left_out.items():
        log.debug("sparsify: left out %s: %s", path, reason)
    traced = trace(module, example_input)
    if per == "tensor":
        choices = [Choice(_name(path), admitted) for path, admitted in tensors.items()]
        return ModuleSpace(make, example_input, tensors, left_out, choices, traced)
    if per != "model":
        raise ValueError(f"sparsify: per is tensor or model, got {per!r}")
    if not all(isinstance(o, Unstructured) or o == DENSE for o in options):
        raise ValueError("sparsify(per='model'): a global ratio is unstructured")
    ratio = Choice("ratio", sorted(o.ratio for o in options), ordered=True)
    spread = [ratio, Choice("allocation", ALLOCATIONS)]
    return GlobalSpace(make, example_input, tensors, left_out, spread, traced)


@dataclass(frozen=True)
class _Copies:
    """Makes copies of a module."""

    module: nn.Module

    def __call__(self) -> nn.Module:
        return copy.deepcopy(self.module)


def _name(path: str) -> str:
    return path.replace(".", "/") + "/sparsity"


def _tensors(
    module: nn.Module, options: Sequence[Sparsity], skip: Sequence[str]
) -> tuple[dict[str, tuple[Sparsity, ...]], dict[str, str]]:
    """Options by weight tensor, and why the rest is left out."""
    owners = {
        f"{prefix}.{name}" if prefix else name: owner
        for prefix, owner in module.named_modules()
        for name in owner._parameters
    }
    parameters = dict(module.named_parameters())
    unknown = [name for name in skip if name not in parameters]
    if unknown:
        raise ValueError(f"sparsify: skip names {unknown[0]!r}, which is not a parameter")
    tied = _tied(module)
    tensors, left_out = {}, {}
    for path, value in parameters.items():
        reason = "skipped" if path in skip else _unfit(value, owners.get(path), tied)
        admitted = tuple(o for o in options if admits(o, value.shape) is None)
        if reason is None and len(admitted) < 2:
            reason = next((r for o in options if (r := admits(o, value.shape))), "one option only")
        if reason is None:
            tensors[path] = admitted
        else:
            left_out[path] = reason
    return tensors, left_out


def _tied(module: nn.Module) -> set[int]:
    """Parameters that more than one module holds."""
    held = [
        id(p) for owner in module.modules() for p in owner._parameters.values() if p is not None
    ]
    return {i for i in held if held.count(i) > 1}


def _unfit(value: nn.Parameter, owner: nn.Module | None, tied: set[int]) -> str | None:
    if owner is None:
        return "parametrized otherwise"
    if not value.is_floating_point():
        return f"not real numbers: {value.dtype}"
    if value.ndim < 2:
        return f"not a weight matrix: {value.ndim} dimension"
    if isinstance(owner, NORMS):
        return "a normalisation"
    if isinstance(owner, nn.Embedding) and id(value) not in tied:
        return "an embedding: looking up rows multiplies nothing"
    return None


def _dress(module: Any, mixture: Mixture, layers: list[Layer]) -> None:
    """Give a user's module what a supernet has."""
    module.mixture = mixture
    module.expected_cost = _ExpectedLayers(tuple(layers))


@dataclass(frozen=True)
class _ExpectedLayers:
    layers: tuple[Layer, ...]

    def __call__(self, mixture: Mixture, cost: str) -> Tensor:
        return torch.as_tensor(expected(self.layers, mixture, cost))
