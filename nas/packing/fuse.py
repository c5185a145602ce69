"""From a traced graph to one whose products are `Layer` nodes with all that follows fused in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from nas.packing import constants, devices
from nas.packing.attention import keep_order
from nas.packing.copies import drop_copies, forward
from nas.packing.layer import MATRIX_PRODUCTS, OUT_FIRST, PRODUCTS, ConvArgs, Layer, aten

_DROPOUTS = {
    aten.dropout.default,
    aten.dropout_.default,
    aten.alpha_dropout.default,
    aten.alpha_dropout_.default,
    aten.feature_dropout.default,
    aten.feature_dropout_.default,
    aten.feature_alpha_dropout.default,
}
_ALIASES = {aten.alias.default, aten.detach.default}
_RESHAPES = {
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.reshape.default,
    aten.view.default,
}
_CHECKS = {
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}
_UNSERVED = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.lstm.input,
    aten.gru.input,
    aten.bilinear.default,
}


def fuse(module: GraphModule, paths: Mapping[int, str]) -> tuple[str, ...]:
    """Rewrite the graph of `module` in place; returns which products could not be read and why.

    `paths` names parameters by their `id`: a tied one has several paths, and one is enough.

    Dropout in eval mode, guards and assertions vanish, constants are folded, every product with
    a constant weight becomes a call of a `Layer`, and batch norm, constant bias and
    activation that follow with no other reader are taken into it.
    """
    _drop_noops(module)
    keep_order(module)
    drop_copies(module)
    constants.fold(module)
    notes = tuple(_make_layers(module, paths))
    _drop_reshapes(module)
    for node in layer_nodes(module):
        _absorb(module, node)
    _drop_reshapes(module)
    _share(layer_nodes(module))
    module.graph.eliminate_dead_code()
    module.graph.lint()
    return notes


def layer_nodes(module: GraphModule) -> list[Node]:
    """The nodes that call a `Layer`, in order of execution."""
    return [node for node in module.graph.nodes if isinstance(node.target, Layer)]


def module_path(node: Node) -> str:
    """The path of the innermost module that `node` was traced in."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(list(stack.values())[-1][0])


def _drop_noops(module: GraphModule) -> None:
    for node in list(module.graph.nodes):
        if node.target in _CHECKS:
            module.graph.erase_node(node)
        elif node.target in _ALIASES or (node.target in _DROPOUTS and not node.args[2]):
            forward(module, node)


def _drop_reshapes(module: GraphModule) -> None:
    """A layer's result is contiguous: asking for that, or for its own shape, is for nothing."""
    for node in list(module.graph.nodes):
        if node.target in _RESHAPES and isinstance(node.args[0].target, Layer):
            shapes = [str(part.meta["val"].shape) for part in (node, node.args[0])]
            if shapes[0] == shapes[1]:
                forward(module, node)


def _make_layers(module: GraphModule, paths: Mapping[int, str]) -> Iterator[str]:
    for node in list(module.graph.nodes):
        if node.target in _UNSERVED:
            yield f"{module_path(node)}: {node.target} has no sparse kernel, it runs dense"
        elif node.target in PRODUCTS:
            found = _read(module, node, paths)
            if isinstance(found, str):
                yield f"{module_path(node)}: {node.target} runs dense: {found}"
            elif found is not None:
                _replace(module, node, *found)


def _replace(module: GraphModule, node: Node, layer: Layer, x: Node) -> None:
    with module.graph.inserting_before(node):
        call = module.graph.create_node("call_function", layer, (x,), name=layer.operation)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    module.graph.erase_node(node)


def _read(
    module: GraphModule, node: Node, paths: Mapping[int, str]
) -> tuple[Layer, Node] | str | None:
    """The layer that `node` computes and its input, why there is none, or None if not a layer."""
    x, source, offset, conv = _operands(node)
    weight, bias = constants.value(module, source), constants.value(module, offset)
    if node.target in MATRIX_PRODUCTS and (weight is None or weight.dim() != 2):
        return None
    if weight is None or (offset is not None and bias is None):
        return "its weight or bias is computed from the input"
    if isinstance(conv, str):
        return conv
    path = paths.get(id(weight), module_path(node)).removesuffix(".weight")
    weight = weight if node.target in OUT_FIRST else weight.t()
    bias = None if bias is None else bias.detach()
    layer = Layer(path, weight.detach().contiguous(), bias, conv)
    return _objection(x, layer) or (layer, x)


def _objection(x: Node, layer: Layer) -> str:
    given = x.meta.get("val")
    if not isinstance(given, Tensor):
        return "the shape of its input is unknown"
    if layer.conv is not None and given.dim() != 4:
        return "its input has no batch"
    tensors = [layer.weight, given, *([] if layer.bias is None else [layer.bias])]
    return devices.of(layer.weight).objection(tensors)


def _operands(node: Node) -> tuple[Node, Any, Any, ConvArgs | str | None]:
    """Input, weight, bias and, for a convolution, its arguments or why they are not served."""
    args: list[Any] = list(node.args)
    if node.target is aten.addmm.default:
        bias, x, weight = args[:3]
        return x, None if node.kwargs else weight, bias, None
    if node.target in MATRIX_PRODUCTS:
        return args[0], args[1], None, None
    x, weight, bias = [*args, None][:3]
    if node.target is aten.linear.default:
        return x, weight, bias, None
    return x, weight, bias, _conv_args(node, args)


def _conv_args(node: Node, args: list[Any]) -> ConvArgs | str:
    defaults: list[Any] = [None, None, None, [1, 1], [0, 0], [1, 1], 1]
    stride, padding, dilation, groups = [*args, *defaults[len(args) :]][3:7]
    if isinstance(padding, str):
        padding = _named_padding(padding, args[1].meta["val"].shape[2:], _pair(dilation))
        if padding is None:
            return "padding='same' of an even kernel is not symmetric"
    return ConvArgs(_pair(stride), _pair(padding), _pair(dilation), groups)


def _named_padding(name: str, size: Any, dilation: tuple[int, int]) -> list[int] | None:
    if name == "valid":
        return [0, 0]
    total = [step * (length - 1) for step, length in zip(dilation, size, strict=True)]
    return None if any(amount % 2 for amount in total) else [amount // 2 for amount in total]


def _pair(values: Any) -> tuple[int, int]:
    return (values[0], values[-1])


def _absorb(module: GraphModule, node: Node) -> None:
    """Take the readers of `node` into its layer, one by one, while there is exactly one."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        layer = _joined(module, node, user)
        if layer is None:
            return
        node.target = layer
        node.meta["val"] = user.meta["val"]
        user.replace_all_uses_with(node)
        module.graph.erase_node(user)


def _share(nodes: list[Node]) -> None:
    """Calls of one layer with equal tensors become one `Layer`, packed and stored once."""
    seen: list[Layer] = []
    for node in nodes:
        layer = node.target
        assert isinstance(layer, Layer)
        node.target = next((other for other in seen if _equal(layer, other)), layer)
        seen.append(node.target)


def _equal(one: Layer, other: Layer) -> bool:
    if (one.name, one.conv, one.activation) != (other.name, other.conv, other.activation):
        return False
    if not torch.equal(one.weight, other.weight) or (one.bias is None) != (other.bias is None):
        return False
    return one.bias is None or other.bias is None or torch.equal(one.bias, other.bias)


def _joined(module: GraphModule, node: Node, user: Node) -> Layer | None:
    layer = node.target
    assert isinstance(layer, Layer)
    if layer.activation != "none" or user.args[:1] != (node,):
        return None
    if user.target is aten.batch_norm.default:
        return _with_batch_norm(module, layer, user)
    if user.target in (aten.add.Tensor, aten.add_.Tensor):
        return _with_bias(module, layer, user)
    activation = _activation(user)
    return None if activation is None else replace(layer, activation=activation)


def _activation(user: Node) -> str | None:
    if user.target in (aten.hardtanh.default, aten.hardtanh_.default):
        return "relu6" if tuple(user.args[1:]) == (0.0, 6.0) else None
    if user.target in (aten.gelu.default, aten.gelu_.default):
        return "gelu" if user.kwargs.get("approximate", "none") == "none" else None
    return _PLAIN_ACTIVATIONS.get(user.target)


_PLAIN_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.relu6.default: "relu6",
    aten.relu6_.default: "relu6",
    aten.silu.default: "silu",
    aten.silu_.default: "silu",
}


def _with_bias(module: GraphModule, layer: Layer, user: Node) -> Layer | None:
    bias = constants.value(module, user.args[1])
    if layer.conv is not None or layer.bias is not None or bias is None or user.kwargs:
        return None
    right = bias.shape == layer.weight.shape[:1] and bias.dtype == layer.weight.dtype
    return replace(layer, bias=bias.detach()) if right else None


def _with_batch_norm(module: GraphModule, layer: Layer, user: Node) -> Layer | None:
    """Fold the eval-mode batch norm `user` into `layer`, in float64, rounded once to its dtype."""
    args: list[Any] = list(user.args)
    sources, training, eps = args[1:5], args[5], args[7]
    known = [constants.value(module, source) for source in sources]
    computed = any(k is None for k, s in zip(known, sources, strict=True) if s is not None)
    other_axis = layer.conv is None and user.meta["val"].dim() != 2
    if training or known[2] is None or computed or other_axis:
        return None
    return _normalised(layer, eps, *(None if k is None else k.detach().double() for k in known))


def _normalised(
    layer: Layer,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Any,
    variance: Any,
) -> Layer:
    scale = torch.rsqrt(variance + eps) * (1.0 if gamma is None else gamma)
    shift = ((0.0 if layer.bias is None else layer.bias) - mean) * scale
    bias = shift if beta is None else shift + beta
    rows = scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
    dtype = layer.weight.dtype
    return replace(layer, weight=(layer.weight * rows).to(dtype), bias=bias.to(dtype))
