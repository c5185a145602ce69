"""A packed network in a folder: its graph as JSON, its tensors as safetensors, no pickle."""

from __future__ import annotations

import json
import keyword
import math
import operator
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import treespec_dumps, treespec_loads

from nas.packing.layout import channels_last
from nas.packing.network import PackedNetwork, Signature
from nas.packing.report import PackedLayer, PackedRun

FORMAT = 2
GRAPH, TENSORS = "packed.json", "packed.safetensors"
_OPERATORS = {"getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow"}
_MAKERS: dict[str, Callable[[Any], Any]] = {"float": float, "device": torch.device}
_MALFORMED = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, SafetensorError)
_KINDS: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def save(network: PackedNetwork, folder: Path | str) -> None:
    """Write `network` to `packed.json` and `packed.safetensors` in `folder`, making it.

    Raises:
        ValueError: where its layers were exchanged (its code is then the model's own), or its
            graph holds what JSON cannot say.
    """
    body, signature = network.body, network.signature
    if not isinstance(body, GraphModule) or signature is None:
        raise ValueError("save: needs a traced network, this one's layers were exchanged")
    spec = network.out_spec
    content = {
        "format": FORMAT,
        "device": _device_of(body),
        "signature": _signature_json(signature),
        "outputs": None if spec is None else treespec_dumps(spec),
        "layout": network.layout,
        "whole": network.whole,
        "layers": [asdict(layer) for layer in network.layers],
        "runs": [asdict(run) for run in network.runs],
        "notes": list(network.notes),
        "nodes": [_node_json(node) for node in body.graph.nodes],
    }
    text = json.dumps(content, indent=1)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in body.state_dict().items()}
    save_file(tensors, path / TENSORS)
    (path / GRAPH).write_text(text)


def load(folder: Path | str) -> PackedNetwork:
    """The network that `save` wrote; needs no code of the model that was packed.

    What was packed on a GPU is loaded onto the current one.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where a file is malformed, or the format or an operator is not known, or it was
            packed on a GPU and there is none. A packed weight is checked when it is first used,
            before any kernel sees it.
    """
    path = Path(folder)
    try:
        content = json.loads((path / GRAPH).read_text())
        device = _place(content.get("device", "cpu"), path)
        tensors = {name: part.to(device) for name, part in load_file(path / TENSORS).items()}
        return _network(content, tensors)
    except _MALFORMED as error:
        raise ValueError(f"load: {path} holds no packed network: {error!r}") from error


def _device_of(body: GraphModule) -> str:
    return "cuda" if any(tensor.is_cuda for tensor in body.state_dict().values()) else "cpu"


def _place(device: str, path: Path) -> str:
    if device not in ("cpu", "cuda"):
        raise ValueError(f"load: device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"load: {path} was packed on a GPU, and PyTorch finds none here")
    return device


def _network(content: dict[str, Any], tensors: dict[str, Tensor]) -> PackedNetwork:
    if content.get("format") != FORMAT:
        raise ValueError(f"load: format must be {FORMAT}, got {content.get('format')!r}")
    root = nn.Module()
    for name, tensor in tensors.items():
        root.register_buffer(name, tensor)
    body = GraphModule(root, _graph(content["nodes"]))
    spec = content["outputs"]
    return PackedNetwork(
        channels_last(body) if content["layout"] == "channels_last" else body,
        tuple(_layer(row) for row in content["layers"]),
        tuple(content["notes"]),
        _signature(content["signature"]),
        None if spec is None else treespec_loads(spec),
        content["layout"],
        content["whole"],
        tuple(PackedRun(**row) for row in content["runs"]),
    )


def _node_json(node: Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": node.op,
        "target": _target_name(node),
        "args": _encode(node.args),
        "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
    }


def _target_name(node: Node) -> str:
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    name = getattr(node.target, "__name__", "")
    if name not in _OPERATORS or getattr(operator, name) is not node.target:
        raise ValueError(f"save: {node.name} calls {node.target}, which has no form in JSON")
    return f"operator.{name}"


def _encode(value: Any) -> Any:
    """`value`, an argument in a graph, as JSON."""
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        return [_encode(part) for part in value]
    if isinstance(value, slice):
        return {"slice": _encode([value.start, value.stop, value.step])}
    if isinstance(value, torch.device):
        return {"device": value.type}  # the current one of them, where it is loaded
    for kind, its_type in _KINDS.items():
        if isinstance(value, its_type):
            return {kind: str(value).removeprefix("torch.")}
    raise ValueError(f"save: {value!r} ({type(value).__name__}) has no form in JSON")


def _decode(value: Any, nodes: dict[str, Node]) -> Any:
    """The inverse of `_encode`; tuples come back as lists."""
    if isinstance(value, list):
        return [_decode(part, nodes) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "node":
        return nodes[held]
    if kind == "slice":
        return slice(*_decode(held, nodes))
    if kind in _MAKERS:
        return _MAKERS[kind](held)
    found = getattr(torch, held, None)
    if not isinstance(found, _KINDS.get(kind, ())):
        raise ValueError(f"load: {held!r} is no {kind} of torch")
    return found


def _graph(rows: list[dict[str, Any]]) -> Graph:
    """The graph of `rows`; names become code, so that nothing but plain names is let in."""
    graph, nodes = Graph(), dict[str, Node]()
    for row in rows:
        args = tuple(_decode(row["args"], nodes))
        kwargs = {_plain(key): _decode(value, nodes) for key, value in row["kwargs"].items()}
        called = row["op"] == "call_function"
        if not called and row["op"] not in ("placeholder", "get_attr", "output"):
            raise ValueError(f"load: a graph has no {row['op']!r}")
        target = _function(row["target"]) if called else _plain(row["target"])
        nodes[row["name"]] = graph.create_node(
            row["op"], target, args, kwargs, _plain(row["name"])
        )
    return graph


def _plain(name: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"load: names must be plain, got {name!r}")
    return name


def _function(name: str) -> Any:
    space, *path = name.split(".")
    if space == "operator" and len(path) == 1 and path[0] in _OPERATORS:
        return getattr(operator, path[0])
    spaces = {"aten": torch.ops.aten, "sparse_nas": torch.ops.sparse_nas}
    found = getattr(spaces.get(space), path[0], None) if len(path) == 2 else None
    overload = getattr(found, path[-1], None)
    if not isinstance(overload, torch._ops.OpOverload):
        raise ValueError(f"load: operator {name!r} is not known")
    return overload


def _signature_json(signature: Signature) -> dict[str, Any]:
    return {
        "tails": [list(tail) for tail in signature.tails],
        "batched": list(signature.batched),
        "dtypes": _encode(signature.dtypes),
    }


def _signature(row: dict[str, Any]) -> Signature:
    tails = tuple(map(torch.Size, row["tails"]))
    return Signature(tails, tuple(row["batched"]), tuple(_decode(row["dtypes"], {})))


def _layer(row: dict[str, Any]) -> PackedLayer:
    shapes = {key: tuple(row[key]) for key in ("weight_shape", "input_shape")}
    return PackedLayer(**{**row, **shapes})
