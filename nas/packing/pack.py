"""`pack`: trace, fuse, tune, lower, check; or exchange layers where there is no graph."""

from __future__ import annotations

import copy
import logging
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from kernels import measured
from nas.latency import interleaved, using_threads
from nas.masks import bake
from nas.packing import devices
from nas.packing.exchange import exchange
from nas.packing.fuse import fuse
from nas.packing.layer import Layer
from nas.packing.layout import fastest_layout
from nas.packing.lower import Placement, lower
from nas.packing.network import PackedNetwork, Signature
from nas.packing.report import describe, row
from nas.packing.runs import Run, find_runs
from nas.packing.trace import Trace, Untraceable, trace
from nas.packing.tune import Choice, as_dense, choose
from nas.packing.verify import call, verify

log = logging.getLogger("nas")
WHOLE_SECONDS = 0.1
WHOLE_ROUNDS = 9
CLEARLY = 0.95
FAR = 1.5


def pack(
    module: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    kernels: Literal["auto", "dense"] = "auto",
    threads: int | None = None,
    measure: Literal["once", "anew"] = "once",
) -> PackedNetwork:
    """Make the network for inference out of a masked module.

    Masks are baked into a copy, which is traced by `torch.export` with a free batch dimension;
    batch norm, bias and activation are fused into the products before them, and every product
    gets the fastest kernel that computes the same, the dense one included, as measured at the
    example's batch; so does the network as a whole. What was measured for a layer is kept for the
    next such layer on this device (`kernels.measured`). Where tracing fails, layers are exchanged
    one by one in the copy; the reason is logged and kept in `notes`.

    Args:
        module: any module; it is left as it is.
        example_input: tensor or a tuple of tensors, the batch first, on the module's device: the
            CPU, float32, or a GPU, float32, bfloat16 or float16 as all parameters.
        kernels: `auto`, or `dense` for the dense twin: the same path, no zero left out.
        threads: torch's threads while measuring; None for those set.
        measure: `once`: layers are not timed that were before; `anew`: all are.

    Raises:
        ValueError: where the example is empty, `kernels` or `measure` is unknown, or the module
            and the example are not on one device, on a GPU of one dtype.
        TypeError: where the example holds anything but tensors.
    """
    _known("kernels", kernels, ("auto", "dense"))
    _known("measure", measure, ("once", "anew"))
    example = _checked(example_input)
    plain = bake(copy.deepcopy(module)).eval().requires_grad_(False)
    devices.of(example[0]).check(plain, example)
    how = _How(kernels == "auto", measure == "anew")
    here: Any = torch.cuda.device_of  # nothing where that is the CPU
    with using_threads(threads), torch.no_grad(), here(example[0]):
        call(plain, example)
        try:
            return _from_graph(plain, example, how)
        except Exception as error:  # whatever a graph cannot do, exchanging can; the log says why
            reason = str(error) if isinstance(error, Untraceable) else repr(error)
            log.warning("pack: layers are exchanged one by one: %s", reason)
            return _by_exchange(plain, example, how, reason)
        finally:
            measured.times(example[0].device).keep()


class _How(NamedTuple):
    """Whether sparse kernels may be chosen, and whether all is timed anew."""

    sparse: bool
    anew: bool


def _known(name: str, value: str, options: tuple[str, str]) -> None:
    if value not in options:
        raise ValueError(f"pack: {name} must be {options[0]!r} or {options[1]!r}, got {value!r}")


def _checked(example: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        kinds = ", ".join(type(x).__name__ for x in inputs)
        raise TypeError(f"pack: example_input must be a tensor or a tuple of them, got ({kinds})")
    if inputs[0].dim() == 0 or inputs[0].numel() == 0:
        shape = tuple(inputs[0].shape)
        raise ValueError(f"pack: example_input needs a batch of at least 1, got shape {shape}")
    return inputs


def _from_graph(plain: nn.Module, example: tuple[Tensor, ...], how: _How) -> PackedNetwork:
    traced = trace(plain, example)
    paths = {id(parameter): path for path, parameter in plain.named_parameters()}
    notes, device = fuse(traced.module, paths), devices.of(example[0])
    device.lay_out(traced.module)
    choices = _tune(traced.module, example, how)
    notes += tuple(choice.note for choice in choices.values() if choice.note)
    runs = find_runs(traced.module, choices, example, how.sparse) if device.core else []
    network = _network(traced, choices, runs, notes, example)
    some = runs or any(c.kernel is c.sparse for c in choices.values())
    if how.sparse and some and not _far_ahead(choices, runs):
        dense = {node: as_dense(choice) for node, choice in choices.items()}
        network = _faster(network, _network(traced, dense, [], notes, example), example)
    verify(network, plain, example)
    return network


def _network(
    traced: Trace,
    choices: dict[Node, Choice],
    runs: list[Run],
    notes: tuple[str, ...],
    example: tuple[Tensor, ...],
) -> PackedNetwork:
    lowered = _single_output(
        traced, lower(traced.module, traced.module.graph, _placements(choices, runs))
    )
    devices.of(example[0]).finish(lowered)
    body, layout = fastest_layout(lowered, example)
    spec = None if traced.out_spec.is_leaf() else traced.out_spec
    layers, parts = describe(choices, runs)
    return PackedNetwork(body, layers, notes, Signature.of(example), spec, layout, runs=parts)


def _far_ahead(choices: dict[Node, Choice], runs: list[Run]) -> bool:
    """Whether dense layers take so long that no layout would make a dense network as fast."""
    covered = {node for run in runs for node in run.nodes}
    alone_us = sum(choice.us for node, choice in choices.items() if node not in covered)
    ours_us = alone_us + sum(run.us for run in runs)
    return sum(choice.dense_us for choice in choices.values()) > FAR * ours_us


def _faster(
    sparse: PackedNetwork, dense: PackedNetwork, example: tuple[Tensor, ...]
) -> PackedNetwork:
    """The sparse network, unless the dense one, in the layout that suits it, clearly beats it."""
    inputs = tuple(tensor.clone() for tensor in example)
    calls = [lambda: sparse(*inputs), lambda: dense(*inputs)]
    kind = devices.of(inputs[0]).kind
    sparse_s, dense_s = interleaved(calls, WHOLE_SECONDS, WHOLE_ROUNDS, kind)
    if dense_s > CLEARLY * sparse_s:
        return sparse
    times = f"{dense_s * 1e3:.3f} ms, with sparse kernels {sparse_s * 1e3:.3f}"
    dense.whole = f"dense takes {times}"
    return dense


def _placements(choices: dict[Node, Choice], runs: list[Run]) -> list[Placement]:
    covered = {node for run in runs for node in run.nodes}
    alone = [node for node in choices if node not in covered]
    return [
        *(Placement(run.nodes, run.source, run.kernel) for run in runs),
        *(Placement((node,), node.all_input_nodes[0], choices[node].kernel) for node in alone),
    ]


def _by_exchange(
    plain: nn.Module, example: tuple[Tensor, ...], how: _How, reason: str
) -> PackedNetwork:
    body, choices, left_out = exchange(plain, example, *how)
    notes = [f"layers exchanged one by one: {reason}", *left_out]
    notes += [choice.note for choice in choices if choice.note]
    return PackedNetwork(body, tuple(map(row, choices)), tuple(notes))


class _Tuner(Interpreter):
    """Runs a graph and chooses each layer's kernel on the very input that reaches it."""

    def __init__(self, module: GraphModule, how: _How) -> None:
        super().__init__(module)
        self.how = how
        self.choices: dict[Node, Choice] = {}

    def run_node(self, n: Node) -> Any:
        if isinstance(n.target, Layer):
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            self.choices[n] = choose(n.target, x, *self.how)
        return super().run_node(n)


def _tune(module: GraphModule, example: tuple[Tensor, ...], how: _How) -> dict[Node, Choice]:
    tuner = _Tuner(module, how)
    tuner.run(*(tensor.clone() for tensor in example))
    return tuner.choices


def _single_output(traced: Trace, body: GraphModule) -> GraphModule:
    """A network of one output returns it bare; others return the flat list of them."""
    if traced.out_spec.is_leaf():
        output = body.graph.output_node()
        output.args = (output.args[0][0],)  # type: ignore[index]
        body.recompile()
    return body
