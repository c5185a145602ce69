"""Attention on samples as they lie: queries, keys and values are views of their products.

`nn.MultiheadAttention` turns (N, L, E) into (L, N, E) before its first products and back behind
its last, and views (N * H, L, head) in between: five copies of all activations, all for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from nas.packing.constants import mutates
from nas.packing.copies import behind, loosen
from nas.packing.layer import aten

_ATTENTION = aten.scaled_dot_product_attention.default
_RESHAPES = (aten.reshape.default, aten.view.default)
_SWAPS: tuple[Any, ...] = ((0, 1), (1, 0))
_Step = tuple[tuple[Any, ...], tuple[Any, ...] | None]  # operators; arguments behind the first
_OF_HEADS: tuple[_Step, ...] = (
    (_RESHAPES, None),  # (N * H, L, head) to (N, H, L, head)
    ((aten.transpose.int,), _SWAPS),
    (_RESHAPES, None),  # (L, N, E) to (L, N * H, head)
)
_OF_PARTS: tuple[_Step, ...] = (
    ((aten.contiguous.default,), ((),)),  # (parts, L, N, E)
    ((aten.squeeze.dim,), ((-2,),)),
    ((aten.transpose.int,), ((0, -2),)),
    ((aten.unsqueeze.default,), ((0,),)),
    ((aten.unflatten.int,), None),  # (L, N, parts * E) to (L, N, parts, E)
)


class _Operand(NamedTuple):
    """Queries, keys or values.

    Attributes:
        product: the projection, in the trace (L, N, E) or (L, N, parts * E).
        part: what is split into heads, `product` itself or one of its parts.
        whole: what the parts are taken from, or `product`.
        sizes: of the product's last dimension: parts if there are, heads, head.
    """

    product: Node
    part: Node
    whole: Node
    sizes: tuple[int, ...]


class _Result(NamedTuple):
    """The product behind attention and what others read, (N, L, E) if `turned`, else (L, N, E)."""

    product: Node
    last: Node
    turned: bool


def keep_order(module: GraphModule) -> None:
    """Rewrite, in place, attention that turns samples around into attention that does not.

    That is `F.multi_head_attention_forward` where no weights are asked for: its products of one
    weight or of several, the batch first or second; masks stay as they are. What differs from it,
    is read by something else in between, or is written into behind it, stays as it is.
    """
    for node in list(module.graph.nodes):
        if node.target is _ATTENTION:
            operands = _operands(node)
            result = None if operands is None else _result(node)
            if operands is not None and result is not None:
                _lead_in(module.graph, node, operands)
                _lead_out(module.graph, node, result)
                module.graph.eliminate_dead_code()


def _operands(attention: Node) -> list[_Operand] | None:
    found = [_operand(argument) for argument in attention.args[:3]]
    operands = [operand for operand in found if operand is not None]
    parts = {operand.part for operand in operands}
    shared = all(
        operand.part is operand.whole or parts.issuperset(operand.whole.users)
        for operand in operands
    )
    return operands if len(operands) == 3 and shared else None


def _operand(heads: Any) -> _Operand | None:
    path = _path(heads, _OF_HEADS)
    if path is None or len(heads.users) != 1 or not _makes_heads(path):
        return None
    part, sizes = path[-1], _shape(heads)[1::2]
    if part.target is not aten.select.int:
        return _Operand(part, part, part, sizes) if _is_projection(part) else None
    path = _path(part.args[0], _OF_PARTS)
    if path is None or part.args[1] != 0 or not _is_projection(path[-1]):
        return None
    _, dim, (parts, *size) = path[-2].args
    same = dim == -1 and size == [_shape(part)[-1]]
    return _Operand(path[-1], part, path[0], (parts, *sizes)) if same else None


def _path(node: Any, steps: Sequence[_Step]) -> list[Any] | None:
    """`node` and what it is made of, step by step, read by nothing but the step behind it."""
    path = [node]
    for targets, arguments in steps:
        if not isinstance(node, Node) or node.target not in targets or node.kwargs:
            return None
        if arguments is not None and node.args[1:] not in arguments:
            return None
        node = node.args[0]
        path.append(node)
    alone = all(isinstance(part, Node) and len(part.users) == 1 for part in path[1:])
    return path if alone else None


def _makes_heads(path: list[Any]) -> bool:
    """Whether (L, N, E) becomes (L, N * H, head), and that, transposed, (N, H, L, head)."""
    heads, _, rows, part = map(_shape, path)
    if len(heads) != 4 or len(rows) != 3:
        return False
    batch, count, length, size = heads
    fixed = isinstance(count, int) and isinstance(size, int)
    return fixed and rows[::2] == (length, size) and part == (length, batch, count * size)


def _is_projection(node: Node) -> bool:
    return node.target is aten.linear.default and not node.kwargs and len(_shape(node)) == 3


def _result(attention: Node) -> _Result | None:
    permuted = _reader(attention, aten.permute.default)
    copied = _reader(permuted, aten.contiguous.default)
    flat = _reader(permuted if copied is None else copied, *_RESHAPES)
    product = _reader(flat, aten.linear.default)
    last = _reader(product, *_RESHAPES)
    if permuted is None or flat is None or product is None or last is None:
        return None
    given, rows = _shape(attention), _shape(last)
    if permuted.args[1:] != ([2, 0, 1, 3],) or len(given) != 4 or rows[:-1] != given[2::-2]:
        return None
    if _shape(flat)[1:] != (given[1] * given[3],):  # of heads, which are known numbers
        return None
    swapped = _reader(last, aten.transpose.int)
    turned = swapped is not None and swapped.args[1:] in _SWAPS
    result = _Result(product, swapped if swapped is not None and turned else last, turned)
    return None if any(mutates(node) for node in behind(result.last)) else result


def _reader(node: Node | None, *targets: Any) -> Node | None:
    """What alone reads `node`, as its first argument, if that is one of `targets`."""
    user = next(iter(node.users)) if node is not None and len(node.users) == 1 else None
    right = user is not None and user.target in targets and not user.kwargs
    return user if right and user is not None and user.args[0] is node else None


def _shape(node: Node) -> tuple[Any, ...]:
    """Of what a node gives, free sizes in words; () where that is unknown."""
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, Tensor) else ()
    return tuple(size if isinstance(size, int) else str(size) for size in sizes)


def _lead_in(graph: Graph, attention: Node, operands: list[_Operand]) -> None:
    """Let `attention` read views (N, H, L, head) of products of what lies as it lies."""
    split: dict[tuple[Node, tuple[int, ...]], tuple[Node, bool]] = {}
    heads: list[Node] = []
    for product, part, whole, sizes in operands:
        if (product, sizes) not in split:
            split[product, sizes] = _split(graph, product, sizes)
        rows, turned = split[product, sizes]
        with graph.inserting_before(attention):
            if part is not whole:
                rows = _call(graph, aten.select.int, rows, 2, part.args[2])
            order = [0, 2, 1, 3] if turned else [1, 2, 0, 3]
            heads.append(_call(graph, aten.permute.default, rows, order))
    attention.args = (*heads, *attention.args[3:])


def _split(graph: Graph, product: Node, sizes: tuple[int, ...]) -> tuple[Node, bool]:
    """A product, its last dimension split, and whether that is (N, L, ...), not (L, N, ...)."""
    x = product.args[0]
    assert isinstance(x, Node)
    turned = x.target is aten.transpose.int and x.args[1:] in _SWAPS
    with graph.inserting_after(product):
        if turned:
            straight = graph.call_function(aten.linear.default, (x.args[0], *product.args[1:]))
            value = product.meta["val"].transpose(0, 1).contiguous()
            straight.meta = {**product.meta, "val": value}
            product = straight
    with graph.inserting_after(product):
        return _call(graph, aten.unflatten.int, product, -1, list(sizes)), turned


def _lead_out(graph: Graph, attention: Node, result: _Result) -> None:
    product, last, turned = result
    with graph.inserting_before(product):
        order = [0, 2, 1, 3] if turned else [2, 0, 1, 3]
        rows = _call(graph, aten.permute.default, attention, order)
        flat = _call(graph, aten.flatten.using_ints, rows, 2, 3)
        straight = graph.call_function(aten.linear.default, (flat, *product.args[1:]))
    straight.meta = {**product.meta, "val": last.meta["val"].contiguous()}
    last.replace_all_uses_with(straight)
    loosen(straight)


def _call(graph: Graph, target: Any, x: Node, *arguments: Any) -> Node:
    node = graph.call_function(target, (x, *arguments))
    node.meta = {**x.meta, "val": target(x.meta["val"], *arguments)}
    return node
