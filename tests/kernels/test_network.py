from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from kernels.blob import seal
from kernels.network import (
    Graph,
    Step,
    X,
    Y,
    lanes,
    reference,
    step_s,
    validate,
    weighted_steps,
    write,
)
from kernels.network.plan import plan
from kernels.network.program import _bytes, read
from tests.kernels import draws
from tests.kernels.graphs import Drawn, residual_net

sparse_chain = torch.ops.sparse_nas.sparse_chain
on_every_isa = pytest.mark.usefixtures("isa")


def linears(seed: int, widths: list[int], activation: str = "relu") -> Graph:
    graph, value = Graph([(widths[0], 1, 1), (widths[-1], 1, 1)]), X
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        weight = draws.weight(seed + i, (outputs, inputs), 0.3, 4 if i % 2 else 1)
        bias = draws.numbers(seed + i, outputs) if i % 2 == 0 else None
        out = Y if i + 2 == len(widths) else graph.tensor((outputs, 1, 1))
        packed = kernels.pack_linear(weight)
        step = Step("linear", value, out, packed=packed, bias=bias, activation=activation)
        graph.steps.append(step)
        value = out
    return graph


def one_conv() -> Graph:
    """A 3x3 between two others, so that it runs on lines."""
    graph, value = Graph([(3, 9, 8), (4, 9, 8)]), X
    for inputs, outputs in ((3, 8), (8, 8), (8, 4)):
        packed = kernels.pack_conv2d(draws.weight(1, (outputs, inputs, 3, 3), 0.4, 1))
        out = Y if outputs == 4 else graph.tensor((outputs, 9, 8))
        bias = draws.numbers(2, outputs)
        walk: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1)}
        graph.steps.append(Step("conv2d", value, out, packed=packed, bias=bias, **walk))
        value = out
    return graph


def assert_equals_reference(y: Tensor, x: Tensor, graph: Graph) -> None:
    true = reference.run(x.double(), graph)
    largest = float(true.abs().max()) if true.numel() else 0.0
    torch.testing.assert_close(
        y.double().reshape(true.shape), true, rtol=0, atol=1e-5 * (1 + largest)
    )


@on_every_isa
@settings(max_examples=60, deadline=None)
@given(
    seed=draws.seeds,
    shape=st.tuples(draws.channels, st.integers(1, 19), st.integers(1, 35)),
    steps=st.integers(1, 9),
    batch=st.sampled_from([0, 1, 2, 7]),
)
def test_a_program_equals_its_graph(
    seed: int, shape: tuple[int, int, int], steps: int, batch: int
) -> None:
    graph = Drawn(seed, shape).grow(steps)
    program = write(graph)
    validate(program)
    x = draws.numbers(seed, batch, *shape)
    y = sparse_chain(x, program, list(graph.shapes[Y]))
    assert y.shape == (batch, *graph.shapes[Y])
    assert_equals_reference(y, x, graph)


@on_every_isa
@settings(max_examples=60, deadline=None)
@given(
    seed=draws.seeds,
    shape=st.tuples(st.integers(1, 6), st.sampled_from([1, 5, 8, 16, 24]), st.integers(1, 20)),
    steps=st.integers(1, 9),
    batch=st.sampled_from([0, 1, 2, 7, 8, 19]),
    parts=st.sampled_from(lanes.PARTS),
)
def test_a_program_of_images_beside_each_other_equals_its_graph(
    seed: int, shape: tuple[int, int, int], steps: int, batch: int, parts: int
) -> None:
    graph = Drawn(seed, shape).grow(steps)
    while not lanes.fits(graph, parts):
        parts = parts // 2 if parts > 1 else 0
        if not parts:
            with pytest.raises(ValueError, match="parts must be such that all steps fit"):
                write(graph, 1)
            return
    program = write(graph, parts)
    validate(program)
    x = draws.numbers(seed, batch, *shape)
    y = sparse_chain(x, program, list(graph.shapes[Y]))
    assert_equals_reference(y, x, graph)


@on_every_isa
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_a_residual_network_equals_its_graph(parts: int) -> None:
    graph = residual_net()
    program = write(graph, parts)
    validate(program)
    for batch in (0, 1, 8, 17):
        x = draws.numbers(batch, batch, 3, 16, 12)
        assert_equals_reference(sparse_chain(x, program, [5, 1, 1]), x, graph)


@on_every_isa
@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.sampled_from([1, 8, 33, 64, 100]), min_size=2, max_size=5),
    batch=st.sampled_from([0, 1, 3, 8, 9, 40, 100]),
    activation=draws.activations,
    seed=draws.seeds,
)
def test_a_run_of_linears_equals_its_layers(
    widths: list[int], batch: int, activation: str, seed: int
) -> None:
    graph = linears(seed, widths, activation)
    x = draws.numbers(seed, batch, widths[0])
    y = sparse_chain(x, write(graph), [widths[-1]])
    assert y.shape == (batch, widths[-1])
    assert_equals_reference(y, x.reshape(batch, widths[0], 1, 1), graph)


@on_every_isa
def test_groups_of_images_are_as_one() -> None:
    """More images than a group holds, the last group not full."""
    graph = Drawn(11, (5, 40, 40)).grow(6)
    images, program = plan(graph).images, write(graph)
    assert images < 40
    for batch in (images, images + 1, 2 * images + 1):
        x = draws.numbers(0, batch, 5, 40, 40)
        assert_equals_reference(sparse_chain(x, program, list(graph.shapes[Y])), x, graph)


@pytest.mark.usefixtures("threads")
def test_results_are_equal_bit_by_bit_for_any_threads(isa: str) -> None:
    if isa == "torch":
        pytest.skip("PyTorch's own kernels promise no such thing")
    for seed in range(6):
        graph = Drawn(seed, (16, 30, 31)).grow(8) if seed else residual_net()
        program, x = write(graph, 0 if seed else 2), draws.numbers(0, 9, *graph.shapes[X])
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sparse_chain(x, program, list(graph.shapes[Y])))
        assert all(torch.equal(results[0], other) for other in results[1:])


@on_every_isa
def test_a_run_keeps_leading_dimensions() -> None:
    graph = linears(0, [12, 30, 7], "gelu")
    x = draws.numbers(0, 2, 5, 24)[..., ::2]
    y = sparse_chain(x, write(graph), [7])
    assert y.shape == (2, 5, 7)
    assert_equals_reference(y, x.reshape(10, 12, 1, 1), graph)


def test_neighbouring_convolutions_run_in_place() -> None:
    """On lines: the first one's copies are its input's, the last one's scatter is its output's."""
    how = plan(one_conv())
    assert list(how.offsets) == list(how.inside) == [1]


def test_steps_with_weights_are_known_where_a_sum_was_taken_out_of_one() -> None:
    shape, packed = (4, 9, 8), kernels.pack_conv2d(draws.weight(1, (4, 4, 1, 1), 0.4, 1))
    steps = [Step("conv2d", X, 2, other=X, packed=packed), Step("conv2d", 2, Y, packed=packed)]
    program = write(Graph([shape] * 3, steps=steps))
    assert [step.operation for step in read(program).steps] == ["conv2d", "map", "conv2d"]
    assert weighted_steps(program) == [0, 2]


@on_every_isa
def test_a_run_names_both_sides_of_a_misfit() -> None:
    program = write(linears(0, [12, 30, 7]))
    for x, tail in ((torch.ones(2, 11), [7]), (torch.ones(2, 12), [8])):
        with pytest.raises(ValueError, match=r"maps \(12, 1, 1\) to \(7, 1, 1\).*does not fit x"):
            sparse_chain(x, program, tail)
    with pytest.raises(ValueError, match=r"with out_tail \[7\]"):
        sparse_chain(torch.ones(2, 3, 9, 8), write(one_conv()), [7])
    with pytest.raises(ValueError, match=r"does not fit"):
        sparse_chain(torch.ones(1, 3, 8, 9), write(one_conv()), [4, 8, 9])
    with pytest.raises(ValueError, match=r"x must be"):
        sparse_chain(torch.ones(3, 4), program, [1, 2])


def changed(**fields: object) -> Graph:
    graph = one_conv()
    graph.steps[1] = replace(graph.steps[1], **fields)  # type: ignore[arg-type]
    return graph


@pytest.mark.parametrize(
    ("fields", "law"),
    [
        ({"stride": (0, 1)}, "arguments from 1"),
        ({"activation": "tanh"}, "known operation and activation"),
        ({"bias": torch.ones(7)}, r"bias must be float32 \(8,\)"),
        ({"padding": (0, 0)}, "gives channels of"),
        ({"padding": (-1, -1)}, "1x1 where it skips pixels"),
        ({"source": 1}, "reads tensors written before"),
        ({"out": 2}, "writes a tensor of its own"),
        ({"at": 1}, "gives channels of"),
        ({"other": 0}, "adds a tensor of its output's shape"),
        ({"kernel": (1, 9)}, r"takes a weight of \(8, 8, 3, 3\)"),
        ({"operation": "linear"}, "dense features"),
        ({"operation": "pool", "padding": (2, 2)}, "half its kernel"),
    ],
)
def test_steps_that_do_not_fit_are_refused(fields: dict[str, object], law: str) -> None:
    with pytest.raises(ValueError, match=law):
        write(changed(**fields))


def test_a_graph_that_gives_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="writes the output"):
        write(Graph([(3, 4, 4), (3, 4, 4)]))


def test_the_graph_of_a_program_comes_back() -> None:
    graph = one_conv()
    again = read(write(graph))
    assert again.shapes == graph.shapes
    for before, after in zip(graph.steps, again.steps, strict=True):
        assert before.packed is not None and after.packed is not None
        assert torch.equal(before.packed.data, after.packed.data)
        for name in ("stride", "padding", "dilation", "activation", "source", "out", "at"):
            assert getattr(before, name) == getattr(after, name)


@settings(max_examples=200, deadline=None)
@given(
    place=st.integers(0, 2**31),
    flip=st.integers(1, 255),
    front=st.booleans(),
    parts=st.integers(0, 1),
)
def test_any_flipped_byte_of_a_program_is_refused(
    place: int, flip: int, front: bool, parts: int
) -> None:
    program = write(one_conv(), parts)
    program[place % (512 if front else len(program))] ^= flip
    with pytest.raises(ValueError, match=r"program: |packed weight: "):
        validate(program)
    with pytest.raises(ValueError, match=r"program: |packed weight: "):
        sparse_chain(torch.ones(1, 3, 9, 8), program, [4, 9, 8])


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 2**31), flip=st.integers(1, 255), parts=st.integers(0, 1))
def test_a_program_that_was_sealed_again_is_checked_as_a_whole(
    place: int, flip: int, parts: int
) -> None:
    """An attacker's checksum is right: then every table must be what the graph gives."""
    program = write(one_conv(), parts)
    graph = read(program)
    raw = program.numpy()
    raw[28 + place % (len(raw) - 28)] ^= flip
    seal(raw, 24)
    try:
        validate(program)
    except ValueError:
        return
    again = read(program)  # a weight, a bias or an activation is another, and all tables fit it
    assert torch.equal(write(again, again.parts), program)
    assert again.shapes == graph.shapes


def small(*steps: Step, shapes: tuple[tuple[int, int, int], ...] = ()) -> Graph:
    """Steps on images of 4 channels, 6 x 6."""
    return Graph([(4, 6, 6), (4, 6, 6), *shapes], steps=list(steps))


LINEAR = kernels.pack_linear(torch.ones(2, 4))
NARROW, WIDE = (2, 6, 6), (8, 6, 6)


@pytest.mark.parametrize("parts", [0, 1])
@pytest.mark.parametrize(
    ("graph", "law"),
    [
        (small(Step("map", X, 2), Step("zero", 2, Y), shapes=(NARROW,)), "gives channels"),
        (small(Step("map", X, 2), Step("zero", 2, Y), shapes=((4, 6, 6),)), "fills what it names"),
        (small(Step("zero", 2, 3, at=6), Step("map", X, Y), shapes=(NARROW, WIDE)), "channel 0"),
        (small(Step("pool", X, Y, activation="relu")), "has no activation"),
        (small(Step("pool", X, Y, other=X)), "adds nothing"),
        (small(Step("mean", X, 2, at=1), shapes=((9, 1, 1),)), "channel 0"),
        (small(Step("mean", X, 2), shapes=((9, 1, 1),)), "of its own"),
        (small(Step("map", X, 2), Step("map", 2, Y), shapes=(WIDE,)), "reads tensors written"),
        (small(Step("map", 2, Y, at=0), shapes=(NARROW,)), "reads tensors written"),
    ],
)
def test_what_an_operation_would_leave_undone_is_refused(
    graph: Graph, law: str, parts: int
) -> None:
    with pytest.raises(ValueError, match=law):
        write(graph, parts)


@on_every_isa
def test_a_tensor_that_two_steps_write_lies_somewhere() -> None:
    graph = Graph([(4, 1, 1), (2, 1, 1), (2, 1, 1)])
    last = kernels.pack_linear(torch.eye(2))
    steps = [Step("zero", 2, 2), Step("linear", X, 2, packed=LINEAR)]
    graph.steps = [*steps, Step("linear", 2, Y, packed=last)]
    y = sparse_chain(torch.ones(3, 4), write(graph), [2])
    assert torch.equal(y, torch.full((3, 2), 4.0))


def test_a_program_of_lanes_keeps_features_dense() -> None:
    """By hand, as a file may hold it: `write` would not."""
    graph = Graph([(4, 1, 1), (2, 1, 1), (2, 1, 1)], parts=1)
    graph.steps = [Step("linear", X, 2, packed=LINEAR), Step("map", 2, Y)]
    program = torch.from_numpy(_bytes(graph, plan(graph)))
    with pytest.raises(ValueError, match="lanes must be copied where they meet dense tensors"):
        sparse_chain(torch.ones(1, 4), program, [2])


def test_programs_beyond_memory_are_refused() -> None:
    packed = kernels.pack_conv2d(draws.weight(0, (256, 256, 3, 3), 0.01, 1))
    shape, walk = (256, 800, 800), {"kernel": (3, 3), "padding": (1, 1)}
    graph = Graph([shape, shape], steps=[Step("conv2d", X, Y, packed=packed, **walk)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be less than 2147483648 floats"):
        write(graph, 1)


def test_steps_are_timed_on_float32_alone() -> None:
    with pytest.raises(ValueError, match="x must be float32"):
        step_s(torch.ones(1, 3, 9, 8).bfloat16(), write(one_conv()), [4, 9, 8])
