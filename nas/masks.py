"""Masks on tensors: whoever reads `.weight` of a layer reads the masked, or the mixed, weight.

One mechanism: a `torch.nn.utils.parametrize` parametrization, never a layer's `forward`, so that
fused paths (`nn.TransformerEncoderLayer`) and models that read `self.fc.weight` are masked too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nas.sparsity import Sparsity, check, mask


class Mixture:
    """The weights of every open choice, shared by all tensors that the choice governs.

    `mixture[name]` is a 1-D tensor with one weight per option, uniform until it is set. It may
    carry gradients: the masked weights are mixed with what was set. A deep copy is detached.
    """

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}

    def add(self, name: str, options: int) -> None:
        """Makes a choice known, with uniform weights; a known one must have as many options."""
        known = self._weights.setdefault(name, torch.full((options,), 1 / options))
        if len(known) != options:
            raise ValueError(f"choice {name!r}: has {len(known)} options, got {options}")

    def names(self) -> list[str]:
        """The known choices, in the order they were added."""
        return list(self._weights)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._weights:
            raise KeyError(f"no open choice {name!r}; there are {list(self._weights)}")
        return self._weights[name]

    def __setitem__(self, name: str, weights: Tensor) -> None:
        shape = self[name].shape
        if weights.shape != shape:
            raise ValueError(
                f"choice {name!r}: needs weights of shape {tuple(shape)}, "
                f"got {tuple(weights.shape)}"
            )
        self._weights[name] = weights

    def __deepcopy__(self, memo: dict[int, Any]) -> Mixture:
        copy = Mixture()
        copy._weights = {name: weights.detach().clone() for name, weights in self._weights.items()}
        return copy


class SparseWeight(nn.Module):
    """The parametrization of one weight tensor: W becomes W * sum over options k of p_k * mask_k.

    With one option the weight is closed and p is 1; with several it is open and p is the shared
    mixture's entry for its choice: one tensor, mixed on the weight and not on the output.

    Attributes:
        sparsities: the K options.
        choice: the name of the choice, or None.
        masks: (K, *shape) of 0 and 1 in the weight's dtype (measured on a CPU, reading a weight is
            2 to 3 times faster than with bool masks).
        scores: learned scores of the weight's shape, None unless `learn` was called.
        frozen: whether the masks are fixed although there are scores.
    """

    masks: Tensor
    scores: nn.Parameter | None

    def __init__(
        self,
        shape: Sequence[int],
        options: Sequence[Sparsity],
        choice: str | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        super().__init__()
        if not options:
            raise ValueError(f"SparseWeight: choice {choice!r} needs an option, got none")
        if len(options) > 1 and choice is None:
            raise ValueError(f"SparseWeight: {len(options)} options need a choice name, got None")
        for option in options:
            check(option, shape, "SparseWeight")
        self.sparsities, self.choice = tuple(options), choice
        self.mixture = mixture or Mixture()
        if choice is not None and self.open:
            self.mixture.add(choice, len(options))
        self.register_buffer("masks", torch.ones(len(options), *shape))
        self.register_parameter("scores", None)
        self.frozen = False

    @property
    def open(self) -> bool:
        """Whether several options are left."""
        return len(self.sparsities) > 1

    def forward(self, weight: Tensor) -> Tensor:
        """The masked (open: mixed) weight, of the weight's shape."""
        if self.scores is None or self.frozen:
            return weight * self._mix(self.masks)
        scores = self.scores.abs()
        self.set_scores(scores.detach())
        return weight * self._mix(self.masks + (scores - scores.detach()))

    def _mix(self, masks: Tensor) -> Tensor:
        if not self.open:
            return masks[0]
        return torch.tensordot(self.mixture[cast(str, self.choice)].to(masks), masks, dims=1)

    @torch.no_grad()
    def set_scores(self, scores: Tensor, at: Sequence[Sparsity] | None = None) -> None:
        """Recomputes the masks, all from one ranking, keeping the highest scores.

        Args:
            scores: of the weight's shape, not negative (such as magnitudes).
            at: one sparsity per option to use for now instead of the options' own.
        """
        options = self.sparsities if at is None else at
        masks = torch.stack([mask(scores, option) for option in options])
        self.masks = masks.to(self.masks)

    def learn(self, weight: Tensor) -> None:
        """Learns scores: forward masks by the top of |scores|, straight through in the backward.

        Scores start as sqrt(6 / fan_in) * W / max |W| (HYDRA, Sehwag et al. 2020, 2002.10509) and
        are trained as in edge-popup (Ramanujan et al. 2020, 1911.13299).
        """
        dense = weight.detach()
        fan_in = prod(dense.shape[1:])
        largest = dense.abs().max().clamp_min(torch.finfo(dense.dtype).tiny)
        self.scores, self.frozen = nn.Parameter((6 / fan_in) ** 0.5 * dense / largest), False

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings the masks up to date with learned scores, unless they are frozen."""
        if self.scores is not None and not self.frozen:
            self.set_scores(self.scores.abs())

    def freeze(self) -> None:
        """Fixes the masks that the learned scores give now; learning may go on from the scores."""
        self.refresh()
        self.frozen = True

    def extra_repr(self) -> str:
        """The options' labels and the choice."""
        labels = ", ".join(option.label for option in self.sparsities)
        return labels if self.choice is None else f"{labels}, choice={self.choice!r}"


class _Place(NamedTuple):
    owner: nn.Module
    name: str
    sparse: SparseWeight

    @property
    def original(self) -> nn.Parameter:
        steps: Any = cast(nn.ModuleDict, self.owner.parametrizations)[self.name]
        return steps.original


Plan = tuple[Sequence[Sparsity], str | None]


def attach(
    module: nn.Module,
    path: str,
    options: Sequence[Sparsity],
    choice: str | None = None,
    mixture: Mixture | None = None,
) -> SparseWeight:
    """Makes one weight tensor of `module` sparse; see `attach_all`."""
    return attach_all(module, {path: (options, choice)}, mixture)[path]


def attach_all(
    module: nn.Module, plan: Mapping[str, Plan], mixture: Mixture | None = None
) -> dict[str, SparseWeight]:
    """Makes weight tensors of `module` sparse, masked by their present magnitudes.

    Every tensor in `module` that is the same Parameter (tied) is masked by the same
    `SparseWeight`. The Parameter stays the same object, so that optimisers and ties hold.

    Args:
        module: the whole model, so that tied tensors are found.
        plan: by path (such as `layer1.0.conv1.weight` or `self_attn.in_proj_weight`) the
            sparsities to mask with and the name of the choice; several make the weight open, and
            need a name.
        mixture: what holds the weights of the choices, shared by all tensors of a supernet.

    Raises:
        ValueError: there is no such free Parameter, or its shape does not admit an option; nothing
            is attached then.
    """
    found, owners = _parameters(module, plan), _owners(module)
    for path, (options, _) in plan.items():
        for option in options:
            check(option, found[path].shape, path)
    attached = {}
    for path, (options, choice) in plan.items():
        parameter = found[path]
        sparse = SparseWeight(parameter.shape, options, choice, mixture)
        sparse.to(parameter.device, parameter.dtype)
        sparse.set_scores(parameter.detach().abs())
        for owner, name in owners[id(parameter)]:
            _own_class(owner)
            parametrize.register_parametrization(owner, name, sparse)
            _read_afresh(owner)
        attached[path] = sparse
    return attached


def _own_class(owner: nn.Module) -> None:
    """Parametrize keeps its properties in a class, which a deep copy would share and break."""
    if parametrize.is_parametrized(owner):
        shared = type(owner)
        owner.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))


def _read_afresh(owner: nn.Module) -> None:
    """A recurrent layer keeps the tensors it has read: they carry a graph and cannot be copied."""
    if isinstance(owner, nn.RNNBase):
        kind: Any = type(owner)  # of this one layer: parametrize made it
        kind._flat_weights = property(_flat_weights, lambda owner, tensors: None)
        owner.__dict__.pop("_flat_weights", None)


def _flat_weights(owner: nn.RNNBase) -> list[Tensor]:
    return [getattr(owner, name) for name in owner._flat_weights_names]


def _parameters(module: nn.Module, paths: Iterable[str]) -> dict[str, nn.Parameter]:
    """The free Parameter behind each path."""
    sparse = _places(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for path in paths:
        if path in sparse:
            raise ValueError(f"{path}: needs a weight that is not yet sparse")
        if path not in parameters:
            known = ", ".join(parameters) or "none"
            raise ValueError(f"{path}: no such parameter; there are {known}")
        if "parametrizations." in path:
            raise ValueError(f"{path}: needs a plain parameter, got one parametrized otherwise")
    found = {path: parameters[path] for path in paths}
    if len({id(p) for p in found.values()}) != len(found):
        raise ValueError(f"{list(found)}: some are one tensor; name a tied tensor once")
    return found


def _owners(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Who holds each Parameter, by its id."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        if not isinstance(owner, parametrize.ParametrizationList):
            for name, value in owner._parameters.items():
                owners.setdefault(id(value), []).append((owner, name))
    return owners


def _places(module: nn.Module) -> dict[str, _Place]:
    """Every path of a sparse weight; tied weights and shared modules under each of their names."""
    return {
        f"{prefix}.{name}" if prefix else name: _Place(owner, name, sparse)
        for prefix, owner in module.named_modules(remove_duplicate=False)
        if parametrize.is_parametrized(owner)
        for name, sparse in _parametrizations(owner)
    }


def _parametrizations(owner: nn.Module) -> Iterator[tuple[str, SparseWeight]]:
    for name, steps in cast(nn.ModuleDict, owner.parametrizations).items():
        for step in cast(nn.ModuleList, steps):
            if isinstance(step, SparseWeight):
                yield name, step


def sparse_weights(module: nn.Module) -> dict[str, SparseWeight]:
    """Each sparse weight once, under the first of its paths."""
    return {path: place.sparse for path, place in _distinct(module).items()}


def _distinct(module: nn.Module) -> dict[str, _Place]:
    places = _places(module)
    first: dict[int, str] = {}
    for path, place in places.items():
        first.setdefault(id(place.sparse), path)
    return {path: places[path] for path in first.values()}


def pairs(module: nn.Module) -> list[tuple[SparseWeight, nn.Parameter]]:
    """Each sparse weight once, with the Parameter behind it."""
    return [(place.sparse, place.original) for place in _distinct(module).values()]


@torch.no_grad()
def mask_by_magnitude(module: nn.Module) -> None:
    """Recomputes every mask from the present magnitudes."""
    for sparse, weight in pairs(module):
        sparse.set_scores(weight.abs())


def original(module: nn.Module, path: str) -> nn.Parameter:
    """The Parameter behind `path`, dense and unmasked."""
    place = _places(module).get(path)
    return place.original if place else module.get_parameter(path)


@torch.no_grad()
def bake(module: nn.Module) -> nn.Module:
    """Leaves the masked weights as plain Parameters, in place; ties stay ties.

    Returns:
        `module` itself.
    """
    masked = [(p.original, getattr(p.owner, p.name)) for p in _distinct(module).values()]
    for place in _places(module).values():
        if parametrize.is_parametrized(place.owner, place.name):
            _own_class(place.owner)
            parametrize.remove_parametrizations(place.owner, place.name, leave_parametrized=False)
        if isinstance(place.owner, nn.RNNBase):
            place.owner._init_flat_weights()
    for parameter, value in masked:
        parameter.copy_(value)
    return module


@torch.no_grad()
def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state under the user's own key names, sparse weights masked.

    Tied tensors are copied once per key, so that no two values share memory.
    """
    masked = {path: getattr(p.owner, p.name) for path, p in _places(module).items()}
    return _copies(_plain_state(module) | masked)


@torch.no_grad()
def training_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a trial needs to go on, under the user's own key names.

    `<key>` is the unmasked tensor (buffers too), `<key>#masks` the masks (K, *shape) and
    `<key>#scores` the learned scores.
    """
    return _copies(_slots(module))


@torch.no_grad()
def load_training_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts a `training_state` back into a module that was made sparse in the same way.

    Raises:
        ValueError: a key is missing, is unknown, or has another shape; nothing is loaded then.
    """
    slots = _slots(module)
    wrong = [f"{key} is missing" for key in slots.keys() - state.keys()]
    wrong += [f"{key} is unknown" for key in state.keys() - slots.keys()]
    wrong += [
        f"{key} needs shape {tuple(slots[key].shape)}, got {tuple(state[key].shape)}"
        for key in slots.keys() & state.keys()
        if slots[key].shape != state[key].shape
    ]
    if wrong:
        raise ValueError(f"training state does not fit: {'; '.join(sorted(wrong))}")
    for key, slot in slots.items():
        slot.copy_(state[key])


def _slots(module: nn.Module) -> dict[str, Tensor]:
    slots = _plain_state(module) | {p: place.original for p, place in _places(module).items()}
    for path, sparse in sparse_weights(module).items():
        sparse.refresh()
        slots[f"{path}#masks"] = sparse.masks
        if sparse.scores is not None:
            slots[f"{path}#scores"] = sparse.scores
    return slots


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict less what belongs to sparse weights."""
    places = [path.rpartition(".") for path in _places(module)]
    ours = tuple(f"{owner}{dot}parametrizations.{name}." for owner, dot, name in places)
    state = {k: v for k, v in module.state_dict().items() if not (ours and k.startswith(ours))}
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"state of {type(module).__name__}: needs tensors only, got {strange}")
    return state


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
