"""Copies that nothing but views reads, and views of what may lie otherwise than it was traced."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from nas.packing.constants import mutates
from nas.packing.layer import PRODUCTS, aten

_VIEWS = {
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}


def drop_copies(module: GraphModule) -> None:
    """A copy that views alone read is left to them: of one sample they often need none.

    So they do of attention's queries, keys and values, which are three parts of one product.
    """
    nodes = list(module.graph.nodes)
    if any(mutates(node) for node in nodes):
        return
    for node in nodes:
        parts = {user.target for user in node.users} == {aten.select.int}
        alone = len(node.users) == 1 and all(user.target in _VIEWS for user in node.users)
        if node.target is aten.contiguous.default and (parts or alone):
            loosen(node)
            forward(module, node)


def loosen(node: Node) -> None:
    """Views of what is no longer laid out as it was may have to copy, up to the next layers."""
    for reached in behind(node):
        if reached.target is aten.view.default:
            reached.target = aten.reshape.default


def behind(node: Node) -> set[Node]:
    """What may share the memory or the layout of `node`: all that follows up to the next layers.

    What is written into keeps the layout that it has.
    """
    reached, waiting = set[Node](), [node]
    while waiting:
        source = waiting.pop()
        for user in source.users:
            into_another = mutates(user) and user.args[0] is not source
            if user in reached or user.target in PRODUCTS or into_another:
                continue
            reached.add(user)
            waiting.append(user)
    return reached


def forward(module: GraphModule, node: Node) -> None:
    """Let what reads `node` read its first argument."""
    source = node.args[0]
    assert isinstance(source, Node)
    node.replace_all_uses_with(source)
    module.graph.erase_node(node)
