"""The core touches nothing beside its arrays, also where its vectors are NEON's."""

import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels.native import build
from kernels.network import Graph, Step, X, Y
from kernels.network.lanes import PARTS, fits
from kernels.network.plan import plan
from tests.kernels import draws
from tests.kernels.driver import Case, Driver, DriverError, compile_driver, conv2d, linear, program
from tests.kernels.graphs import Drawn, residual_net
from tests.kernels.test_sparse_conv2d import LARGE

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ARM, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
batches = st.sampled_from([1, 2, 3, 5, 17, 70, 0])


@pytest.fixture(scope="module", params=[*build.supported(), "neon"])
def driver(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Driver]:
    """Calls every variant that runs here, and the one of 64-bit ARM by an emulator."""
    folder = tmp_path_factory.mktemp("driver")
    made = emulated(folder) if request.param == "neon" else sanitized(folder, request.param)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the references' teams would only spin beside other tests
    yield made
    torch.set_num_threads(threads)


def sanitized(folder: Path, isa: str) -> Driver:
    """On the heap the sanitizers watch; pages do what they cannot: masked loads, users' flags."""
    compiler, usual = [*build.compiler(), *SANITIZERS, "-g1"], build.build(isa)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", shlex.join(compiler))
        patch.setattr(build, "_FLAGS", (*build._FLAGS, "-Og"))
        watched = build.build(isa)
    made = compile_driver(compiler, folder)
    return Driver([made], {"heap": watched, "end": usual, "begin": usual})


def emulated(folder: Path) -> Driver:
    missing = [name for name in (ARM, QEMU) if not shutil.which(name)]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}: install g++-aarch64-linux-gnu, qemu-user")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", ARM)
        core = build.build("scalar")
    command = [QEMU, "-L", "/usr/aarch64-linux-gnu", compile_driver([ARM], folder)]
    return Driver(command, {"end": core, "begin": core})


def one_step(seed: int, size: tuple[int, int, int]) -> Graph:
    """A drawn operation between the arrays of a caller."""
    drawn = Drawn(seed, size)
    makers: list[Callable[[int], int]] = [
        *(drawn.conv, drawn.same, drawn.depthwise, drawn.skip, drawn.pool, drawn.map),
        *(drawn.padded, drawn.concat, lambda x: drawn.new((size[0], 1, 1), "mean", x)),
    ]
    out, graph = drawn.random.choice(makers)(X), drawn.graph
    graph.shapes[Y] = graph.shapes.pop(out)
    graph.steps = [
        replace(s, out=Y, source=Y if s.source == out else s.source) for s in graph.steps
    ]
    return graph


@st.composite
def calls(draw: st.DrawFn) -> Case:
    """A linear layer, a convolution or a program."""
    seed, threads, batch = draw(draws.seeds), draw(st.integers(1, 3)), draw(batches)
    operation = draw(st.sampled_from(["linear", "conv2d", "step", "program"]))
    if operation in ("program", "step"):
        size = draw(st.tuples(draws.channels, st.integers(1, 19), st.integers(1, 35)))
        steps = 1 if operation == "step" else draw(st.integers(2, 9))
        graph = one_step(seed, size) if steps == 1 else Drawn(seed, size).grow(steps)
        parts = draw(st.sampled_from([p for p in (0, *PARTS) if not p or fits(graph, p)]))
        return program(graph, draws.numbers(seed, min(batch, 5), *size), threads, parts)
    density, rows = draw(draws.densities), draw(draws.equal_rows)
    activation, with_bias = draw(draws.activations), draw(st.booleans())
    if operation == "conv2d":
        conv = draw(st.one_of(draws.general, draws.pointwise, draws.depthwise))
        weight = draws.weight(seed, conv.weight_shape, density, rows)
        bias = draws.numbers(seed, len(weight)) if with_bias else None
        return conv2d(conv, draws.numbers(seed, *conv.x_shape), weight, bias, activation, threads)
    shape = draw(st.tuples(st.integers(1, 70), st.sampled_from([0, 1, 3, 31, 32, 33, 100, 300])))
    weight = draws.weight(seed, shape, density, rows)
    bias = draws.numbers(seed, len(weight)) if with_bias else None
    return linear(draws.numbers(seed, batch, shape[1]), weight, bias, activation, threads)


@pytest.fixture(scope="module")
def many() -> list[Case]:
    """The same in every run; the driver starts slowly and takes them all at once."""
    cases: list[Case] = []

    @settings(max_examples=500, deadline=None, derandomize=True)
    @given(calls())
    def keep(case: Case) -> None:
        cases.append(case)

    keep()
    return cases


def test_calls_keep_to_their_arrays(driver: Driver, many: list[Case]) -> None:
    driver.check(many)


def test_bands_and_groups_of_images_keep_to_their_arrays(driver: Driver) -> None:
    """As if three threads shared them."""
    x, weight = draws.numbers(0, 150, 500), draws.weight(0, (300, 500), 0.3, 1)
    cases = [linear(x, weight, draws.numbers(0, 300), "gelu", threads=3)]
    for conv in LARGE:
        weight = draws.weight(0, conv.weight_shape, 0.1, 4)
        cases.append(conv2d(conv, draws.numbers(0, *conv.x_shape), weight, None, "relu", 3))
    graph = Drawn(11, (5, 40, 40)).grow(6)
    x = draws.numbers(0, 2 * plan(graph).images + 1, 5, 40, 40)
    cases.append(program(graph, x, threads=3))
    residual = residual_net()
    x = draws.numbers(0, 19, *residual.shapes[X])
    driver.check([*cases, *(program(residual, x, threads=3, parts=p) for p in (1, 2))])


def test_one_float_beside_an_array_is_one_too_many(driver: Driver) -> None:
    """The plan of a program is changed: its second channel begins elsewhere."""
    graph = Graph([(2, 4, 5), (3, 2, 3)])
    packed = kernels.pack_conv2d(torch.ones(3, 2, 3, 3))
    graph.steps.append(Step("conv2d", X, Y, packed=packed, kernel=(3, 3)))
    case = program(graph, draws.numbers(0, 1, 2, 4, 5))
    driver.check([case])
    for place, start in (("heap", 21), ("heap", -1), ("end", 21), ("begin", -1)):
        blob = case.blob.clone()
        blob[96:104] = torch.from_numpy(np.array([start], "<i8").view(np.uint8))
        if place in driver.cores:
            with pytest.raises(DriverError, match=r"AddressSanitizer|signal 11"):
                driver.run(place, [replace(case, blob=blob)])
