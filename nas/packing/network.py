"""The packed network: what `nas.pack` gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import TreeSpec, tree_unflatten

from nas.packing.report import PackedLayer, PackedRun, table
from nas.packing.straight import plain, straight
from nas.packing.trace import batched


@dataclass(frozen=True)
class Signature:
    """What inputs a traced network holds for: dtypes, and all sizes but the batch's.

    Attributes:
        tails: for each input its shape without the batch.
        batched: for each input whether its first dimension is the batch.
        dtypes: for each input its dtype.
    """

    tails: tuple[torch.Size, ...]
    batched: tuple[bool, ...]
    dtypes: tuple[torch.dtype, ...]

    @staticmethod
    def of(example: tuple[Tensor, ...]) -> Signature:
        """The signature of `example`."""
        carries = batched(example)
        tails = tuple(t.shape[c:] for t, c in zip(example, carries, strict=True))
        return Signature(tails, carries, tuple(t.dtype for t in example))

    def check(self, inputs: tuple[Tensor, ...]) -> None:
        """Raise ValueError where `inputs` are not what was traced."""
        if len(inputs) != len(self.tails):
            raise ValueError(f"PackedNetwork: takes {len(self.tails)} inputs, got {len(inputs)}")
        size = inputs[0].shape[0] if self.batched[0] else 0
        parts = zip(inputs, self.tails, self.batched, self.dtypes, strict=True)
        for index, (x, tail, carries, dtype) in enumerate(parts):
            shape = (size, *tail) if carries else tail
            if x.shape != shape or x.dtype != dtype:
                raise ValueError(
                    f"PackedNetwork: input {index} was packed as {self._say(index)}, "
                    f"got {tuple(x.shape)} {x.dtype}"
                )

    def _say(self, index: int) -> str:
        batch = ("batch",) if self.batched[index] else ()
        shape = ", ".join(map(str, (*batch, *self.tails[index])))
        return f"({shape}) {self.dtypes[index]}"


class PackedNetwork(nn.Module):
    """A network for inference with the fastest kernel found for each of its layers.

    Gives what the masked module gives in eval mode, within rounding, on any batch. Gradients are
    never recorded. On a GPU a call waits for nothing and can be captured into a graph, once it
    was called with inputs of the same shapes: with others it may take other kernels.

    Attributes:
        body: the traced graph, lowered to kernels, or the copy whose layers were exchanged.
        layers: one row for each call of a layer, in order of execution.
        notes: what was not packed, and why.
        runs: what calls of several layers take beside their layers.
        layout: `channels_last` where all convolutions are dense and faster so, and on a GPU.
        whole: why all kernels are dense although some sparse ones won by themselves, or "".
        out_spec: how the flat outputs of a traced body are nested; None for a single tensor.
        signature: the inputs that a traced body holds for; None where layers were exchanged.
    """

    def __init__(
        self,
        body: nn.Module,
        layers: tuple[PackedLayer, ...],
        notes: tuple[str, ...],
        signature: Signature | None = None,
        out_spec: TreeSpec | None = None,
        layout: str = "contiguous",
        whole: str = "",
        runs: tuple[PackedRun, ...] = (),
    ) -> None:
        super().__init__()
        self.body = body
        self.layers = layers
        self.notes = notes
        self.runs = runs
        self.signature = signature
        self.layout = layout
        self.whole = whole
        self.out_spec = out_spec
        self._bind()
        self._accepted: list[tuple[type[Tensor], torch.Size, torch.dtype, bool] | None] = [None]
        self._plain = False
        super().train(False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._bind()

    def _bind(self) -> None:
        graph = self.body if isinstance(self.body, GraphModule) else None
        self._call: Callable[..., Any] = self.body if graph is None else straight(graph)
        self._direct = self._call if graph is None else straight(graph, direct=True)

    def forward(self, *inputs: Tensor) -> Any:
        """Apply the network.

        Raises:
            ValueError: where an input is not shaped as what was packed (the batch is free).
        """
        if torch.compiler.is_compiling():  # sizes are symbols then, and none may stay
            return self._traced(inputs)
        if self.signature is not None:
            given = [(type(x), x.shape, x.dtype, x.is_cpu) for x in inputs]
            if given != self._accepted:  # what was accepted last is so again
                self.signature.check(inputs)
                self._accepted[:] = given
                self._plain = all(kind is Tensor and on_cpu for kind, _, _, on_cpu in given)
        call = self._direct if self._plain and plain() else self._call
        if not torch.is_grad_enabled():
            return self._nested(call(*inputs))
        torch._C._set_grad_enabled(False)  # torch.no_grad() would take 1.5 us
        try:
            return self._nested(call(*inputs))
        finally:
            torch._C._set_grad_enabled(True)

    def _traced(self, inputs: tuple[Tensor, ...]) -> Any:
        if self.signature is not None:
            self.signature.check(inputs)
        with torch.no_grad():
            return self._nested(self._call(*inputs))

    def _nested(self, result: Any) -> Any:
        return result if self.out_spec is None else tree_unflatten(result, self.out_spec)

    def empty(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """`inputs` with a batch of 0.

        Raises:
            ValueError: where layers were exchanged: nothing is known about such a module's batch.
        """
        if self.signature is None:
            raise ValueError("PackedNetwork: has no traced graph, its layers were exchanged")
        parts = zip(inputs, self.signature.batched, strict=True)
        return tuple(x[:0] if carries else x for x, carries in parts)

    def train(self, mode: bool = True) -> PackedNetwork:
        """Refuse training mode: a packed network is for inference."""
        if mode:
            raise ValueError("PackedNetwork: is for inference, train(True) has no meaning")
        return self

    def explain(self) -> str:
        """A table of every layer: its kernel, its time and dense's, and what was left out.

        `us` is the time of the kernel, `of limit` the share that the least possible time has in
        it (`PackedLayer.limit_us`). The rows of a run add up to the time of its call. Where times
        are those of such a layer that was measured before, a last column says so.
        """
        whole = (f"as a whole: {self.whole}",) if self.whole else ()
        return table(self.layers, self.runs, (*self.notes, *whole))
