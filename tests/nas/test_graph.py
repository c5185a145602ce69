from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.choices import Choice, Picks, Subset, When
from nas.graph import INPUT, Graph, weight_path
from nas.operations import (
    Activation,
    BatchNorm,
    Flatten,
    Identity,
    Pool,
    Sequence,
    SparseConv2d,
    SparseLinear,
    Sum,
    Zero,
)
from nas.sparsity import Dense, Unstructured

RATIOS = (Dense(), Unstructured(0.5), Unstructured(0.9))


def chain_with_an_optional_middle() -> Graph:
    graph = Graph((4,))
    a = graph.add("a", SparseLinear(4), INPUT)
    b = graph.add("b", SparseLinear(4), a, when=When("deep", (True,)))
    graph.add("c", SparseLinear(2), b)
    return graph


def test_an_absent_node_passes_its_input_on_to_its_users() -> None:
    settled = chain_with_an_optional_middle().settle({"deep": False})
    assert list(settled.nodes) == ["a", "c"]
    assert settled.nodes["c"].inputs == ("a",)


@pytest.mark.parametrize(
    ("picks", "still_open", "kept"),
    [({"deep": True}, (), True), ({}, ("deep",), True), ({}, (), False)],
)
def test_a_node_exists_where_its_condition_holds_or_is_open(
    picks: Picks, still_open: tuple[str, ...], kept: bool
) -> None:
    assert ("b" in chain_with_an_optional_middle().settle(picks, still_open).nodes) == kept


def test_a_condition_stays_on_a_node_only_while_it_is_open() -> None:
    graph = chain_with_an_optional_middle()
    assert graph.settle({"deep": True}).nodes["b"].when is None
    assert graph.settle({}, ("deep",)).nodes["b"].when == When("deep", (True,))


def test_where_the_last_node_is_absent_what_feeds_it_is_the_output() -> None:
    graph = Graph((4,))
    a = graph.add("a", SparseLinear(4), INPUT)
    graph.add("beside", SparseLinear(4), INPUT)
    graph.add("last", SparseLinear(4), a, when=When("deep", (True,)))
    settled = graph.settle({"deep": False})
    assert (settled.output, list(settled.nodes)) == ("a", ["a"])


def test_a_graph_without_a_kept_node_is_refused() -> None:
    graph = Graph((4,))
    graph.add("only", SparseLinear(4), INPUT, when=When("deep", (True,)))
    with pytest.raises(ValueError, match="at least one node that is kept"):
        graph.settle({"deep": False})


def branches(keep: Subset | None) -> Graph:
    graph = Graph((4,))
    names = [graph.add(f"branch{i}", SparseLinear(4), INPUT) for i in range(3)]
    graph.add("sum", Sum(), *names, keep=keep)
    return graph


@given(st.sets(st.sampled_from("012"), min_size=2, max_size=2))
def test_a_subset_keeps_some_inputs_in_order_and_what_only_fed_the_others_goes(
    kept: set[str],
) -> None:
    graph = branches(Subset("inputs", ("0", "1", "2"), 2))
    settled = graph.settle({"inputs": sorted(kept)})
    assert settled.nodes["sum"].inputs == tuple(f"branch{i}" for i in sorted(kept))
    assert list(settled.nodes) == [*settled.nodes["sum"].inputs, "sum"]
    assert settled.nodes["sum"].keep is None


def test_an_open_subset_keeps_every_input() -> None:
    keep = Subset("inputs", ("0", "1", "2"), 2)
    node = branches(keep).settle({}, ("inputs",)).nodes["sum"]
    assert (node.keep, len(node.inputs)) == (keep, 3)


def test_an_absent_edge_that_changes_the_shape_does_not_reach_the_sum() -> None:
    keep = Subset("inputs", ("0", "1"), 1)
    graph = Graph((4,))
    edges = [
        graph.add(f"edge{i}", SparseLinear(7), INPUT, when=When("inputs", (str(i),)))
        for i in range(2)
    ]
    graph.add("sum", Sum(), *edges, keep=keep)
    settled = graph.settle({"inputs": ["1"]})
    assert settled.nodes["sum"].inputs == ("edge1",)
    assert settled.shapes() == {INPUT: (4,), "edge1": (7,), "sum": (7,)}


def test_settling_leaves_the_graph_itself_as_it_was() -> None:
    graph = branches(Subset("inputs", ("0", "1", "2"), 1))
    before = dict(graph.nodes)
    graph.settle({"inputs": ["1"]})
    assert graph.nodes == before


def test_one_name_in_several_places_is_one_choice() -> None:
    ratio = Choice("ratio", RATIOS)
    graph = Graph((4,))
    a = graph.add("a", SparseLinear(4, sparsity=ratio), INPUT)
    graph.add("b", SparseLinear(4, sparsity=ratio), a)
    assert graph.choices() == [ratio]
    settled = graph.settle({"ratio": "0.9"})
    assert [n.operation.sparsity for n in settled.nodes.values()] == [Unstructured(0.9)] * 2


def test_choices_inside_options_and_absent_nodes_have_their_place_as_condition() -> None:
    ratio = Choice("ratio", RATIOS)
    op = Choice("op", {"conv": SparseLinear(4, sparsity=ratio), "skip": Identity()})
    graph = Graph((4,))
    a = graph.add("a", SparseLinear(4), INPUT)
    graph.add("b", op, a, when=When("deep", (True,)))
    found = {c.name: c.when for c in graph.choices()}
    assert found == {"op": When("deep", (True,)), "ratio": When("op", ("conv",))}


@pytest.mark.parametrize("name", ["", "a.b", "input", "taken", "taken/inner", "folder"])
def test_a_name_that_weights_could_not_be_found_by_is_refused(name: str) -> None:
    graph = Graph((4,))
    graph.add("taken", Identity(), INPUT)
    graph.add("folder/node", Identity(), INPUT)
    with pytest.raises(ValueError, match=f"{name}: (a|no) node's name"):
        graph.add(name, Identity(), INPUT)
    assert graph.add("taken2", Identity(), INPUT) == "taken2"


def test_inputs_are_nodes_before_it_and_labelled_by_its_subset() -> None:
    graph = Graph((4,))
    with pytest.raises(ValueError, match=r"sum: inputs must be nodes before it, got \['later'\]"):
        graph.add("sum", Sum(), INPUT, "later")
    with pytest.raises(ValueError, match="sum: inputs must be nodes before it, got none"):
        graph.add("sum", Sum())
    with pytest.raises(ValueError, match="sum: keep labels 2 of 1 inputs"):
        graph.add("sum", Sum(), INPUT, keep=Subset("keep", ("0", "1"), 1))
    with pytest.raises(ValueError, match="sum: a node that may be absent has one input, got 2"):
        graph.add("sum", Sum(), INPUT, INPUT, when=When("deep", (True,)))


def test_a_choice_of_operations_inside_an_operation_is_refused() -> None:
    inner = Choice("inner", {"a": SparseLinear(4), "b": Identity()})
    for operation in (Sequence((("first", inner),)), Choice("op", {"x": inner, "y": Identity()})):
        with pytest.raises(ValueError, match=r"node: a choice of operations .* inner in one"):
            Graph((4,)).add("node", operation, INPUT)


@pytest.mark.parametrize(
    ("operation", "shape", "error"),
    [
        (SparseLinear(3), (1, 8, 8), r"x: SparseLinear: needs an input of shape \(F,\), got \(1"),
        (SparseConv2d(3), (8,), r"x: SparseConv2d: needs an input of shape \(C, H, W\), got \(8"),
        (SparseConv2d(3, 5, padding=0), (1, 4, 4), "x: SparseConv2d: kernel 5 does not fit"),
        (
            Choice("op", {"a": SparseLinear(3), "b": SparseLinear(4)}),
            (8,),
            r"x: options must agree on their output's shape, got \['\(3,\)', '\(4,\)'\]",
        ),
    ],
)
def test_an_error_of_shape_names_the_node_the_law_and_the_value(
    operation: Any, shape: tuple[int, ...], error: str
) -> None:
    graph = Graph(shape)
    graph.add("x", operation, INPUT)
    with pytest.raises(ValueError, match=error):
        graph.shapes()


def test_a_sum_of_different_shapes_names_them() -> None:
    graph = Graph((4,))
    a = graph.add("a", SparseLinear(3), INPUT)
    graph.add("sum", Sum(), a, INPUT)
    with pytest.raises(ValueError, match=r"sum: Sum: inputs must have one shape, got \[\(3,\), "):
        graph.shapes()


def test_the_shape_is_that_of_the_widest_option() -> None:
    graph = Graph((4,))
    a = graph.add("a", SparseLinear(Choice("width", (8, 32, 16))), INPUT)
    graph.add("b", SparseLinear(2), a)
    assert graph.shapes()["a"] == (32,)
    assert graph.settle({"width": 16}).shapes()["a"] == (16,)


def test_weights_are_named_by_node_option_and_place_inside() -> None:
    norm = Sequence((("conv", SparseConv2d(3)), ("norm", BatchNorm())))
    graph = Graph((2, 8, 8))
    a = graph.add("stem/conv", SparseConv2d(4, bias=True), INPUT)
    graph.add("cell/0-1", Choice("op", {"conv3": norm, "skip": Identity()}), a)
    paths = [layer.path for _, _, layer in graph.settle({"op": "conv3"}).layers()]
    inside = [f"cell.0-1.conv3.{x}" for x in ("conv.weight", "norm.weight", "norm.bias")]
    assert paths == ["stem.conv.weight", "stem.conv.bias", *inside]
    assert weight_path(graph.nodes["cell/0-1"], "conv3", "") == "cell.0-1.conv3"


def test_operations_that_keep_the_shape_or_pool_it() -> None:
    graph = Graph((3, 9, 9))
    last = INPUT
    for name, operation, shape in [
        ("relu", Activation(), (3, 9, 9)),
        ("max", Pool("max", 3, 2, 1), (3, 5, 5)),
        ("zero", Zero(2), (3, 3, 3)),
        ("flat", Flatten(), (27,)),
    ]:
        last = graph.add(name, operation, last)
        assert graph.shapes()[last] == shape
