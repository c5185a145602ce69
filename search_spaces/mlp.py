"""Multi-layer perceptrons: depth, widths, and the sparsity of each weight."""

from __future__ import annotations

from collections.abc import Sequence

from nas.choices import Choice, When
from nas.graph import INPUT, Graph
from nas.operations import Activation, Flatten, SparseLinear
from nas.space import GraphSpace, Origin
from nas.sparsity import parse


def mlp(
    input_shape: Sequence[int],
    outputs: int,
    depths: Sequence[int] = (3, 4),
    widths: Sequence[int] = (1536, 2048),
    sparsities: Sequence[str] = ("dense", "0.5", "0.8", "0.9"),
) -> GraphSpace:
    """Hidden layers of SparseLinear and ReLU, then a dense classifier.

    Args:
        input_shape: Of one sample; flattened.
        outputs: Size of the network's output.
        depths: Numbers of hidden layers.
        widths: Sizes of each.
        sparsities: Labels of the sparsities of each hidden layer's weight.

    Raises:
        ValueError: A depth or width below 1, or a sparsity that a layer does not admit.
    """
    if not depths or min(depths) < 1:
        raise ValueError(f"mlp: depths must be at least 1, got {list(depths)}")
    if min(widths, default=1) < 1:
        raise ValueError(f"mlp: widths must be at least 1, got {list(widths)}")
    depth = Choice("depth", sorted(depths), ordered=True)
    graph = Graph(input_shape)
    last = graph.add("flatten", Flatten(), INPUT)
    for i in range(max(depths)):
        deep = tuple(d for d in depth.labels if int(d) > i)
        when = When("depth", deep) if len(deep) < len(depth.labels) else None
        width = Choice(f"layer{i}/width", sorted(widths), ordered=True, when=when)
        sparsity = Choice(f"layer{i}/sparsity", [parse(s) for s in sparsities], when=when)
        last = graph.add(
            f"layer{i}/linear", SparseLinear(width, sparsity=sparsity), last, when=when
        )
        last = graph.add(f"layer{i}/relu", Activation("relu"), last, when=when)
    graph.add("classifier", SparseLinear(outputs), last)
    arguments = {
        "input_shape": list(input_shape),
        "outputs": outputs,
        "depths": list(depths),
        "widths": list(widths),
        "sparsities": list(sparsities),
    }
    return GraphSpace(graph, [depth], Origin("search_spaces.mlp:mlp", arguments))
