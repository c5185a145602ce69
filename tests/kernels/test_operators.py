from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

import kernels
from kernels import calls
from kernels.network import Graph, Step, X, Y, write
from tests.kernels import draws

ops = torch.ops.sparse_nas
LINEAR = kernels.pack_linear(draws.weight(0, (10, 24), 0.3, 1))
CONV = kernels.pack_conv2d(draws.weight(0, (8, 3, 3, 3), 0.3, 1))
DEPTHWISE = kernels.pack_conv2d(draws.weight(0, (8, 1, 3, 3), 1.0, 1), 8)
BIAS = draws.numbers(0, 8)
WHERE = ([3, 3], [2, 2], [1, 1], [1, 1])
RESIDUAL = draws.numbers(2, 2, 8, 5, 4)


class Network(nn.Module):
    """A convolution, a fused run of convolutions, and a linear, all packed."""

    def __init__(self) -> None:
        super().__init__()
        walk: dict[str, Any] = {"kernel": (3, 3), "padding": (1, 1), "activation": "relu"}
        run = Graph([(8, 5, 4)] * 3)
        for source, out in ((X, 2), (2, Y)):
            run.steps.append(Step("conv2d", source, out, packed=DEPTHWISE, bias=BIAS, **walk))
        self.register_buffer("conv", CONV.data)
        self.register_buffer("run", write(run))
        self.register_buffer("linear", kernels.pack_linear(torch.ones(5, 8)).data)

    def forward(self, x: Tensor) -> Tensor:
        x = ops.sparse_conv2d(x, self.conv, BIAS, 8, *WHERE, 1, "relu")
        x = ops.sparse_chain(x, self.run, [8, *x.shape[2:]])
        return ops.sparse_linear(x.mean((2, 3)), self.linear, None, 5)


@pytest.fixture
def network() -> Network:
    return Network().eval()


PROGRAM = write(
    Graph([(24, 1, 1), (10, 1, 1)], steps=[Step("linear", X, Y, packed=LINEAR, activation="gelu")])
)
CALLS: list[tuple[OpOverload[..., Tensor], tuple[object, ...]]] = [
    (ops.sparse_linear.default, (draws.numbers(0, 4, 24), LINEAR.data, None, 10)),
    (ops.sparse_linear.default, (draws.numbers(0, 2, 3, 24), LINEAR.data, torch.ones(10), 10)),
    (ops.sparse_linear.default, (draws.numbers(0, 24, 3).T, LINEAR.data, None, 10, "silu")),
    (
        ops.sparse_linear.residual,
        (draws.numbers(0, 4, 24), LINEAR.data, None, draws.numbers(1, 4, 10), 10, "relu"),
    ),
    (ops.sparse_conv2d.default, (draws.numbers(0, 2, 3, 9, 7), CONV.data, BIAS, 8, *WHERE, 1)),
    (
        ops.sparse_conv2d.residual,
        (draws.numbers(0, 2, 3, 9, 7), CONV.data, BIAS, RESIDUAL, 8, *WHERE, 1),
    ),
    (ops.sparse_chain.default, (draws.numbers(0, 4, 24), PROGRAM, [10])),
]


@pytest.mark.parametrize(("operator", "arguments"), CALLS)
def test_operators_pass_torch_s_own_check(
    operator: OpOverload[..., Tensor], arguments: tuple[object, ...]
) -> None:
    torch.library.opcheck(operator, arguments)


def test_a_network_compiles_as_one_graph(network: Network) -> None:
    x = draws.numbers(0, 2, 3, 9, 7)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(x), network(x))


def test_an_exported_network_takes_any_batch(network: Network) -> None:
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}}
    program = torch.export.export(
        network, (draws.numbers(0, 2, 3, 9, 7),), dynamic_shapes=shapes, strict=False
    )
    for count in (1, 5):
        x = draws.numbers(count, count, 3, 9, 7)
        assert torch.equal(program.module()(x), network(x))


def test_the_fake_operators_know_every_shape() -> None:
    with torch.device("meta"):
        x, images = torch.empty(2, 5, 24), torch.empty(2, 3, 9, 7)
        blob = torch.empty(3, dtype=torch.uint8)
    assert ops.sparse_linear(x, blob, None, 10).shape == (2, 5, 10)
    assert ops.sparse_conv2d(images, blob, None, 8, *WHERE, 1).shape == (2, 8, 5, 4)
    assert ops.sparse_chain(x, blob, [6]).shape == (2, 5, 6)
    assert ops.sparse_chain(images, blob, [6, 2, 2]).shape == (2, 6, 2, 2)


def test_tensors_elsewhere_are_refused_without_the_dispatcher() -> None:
    run = calls.DIRECT[torch.ops.sparse_nas.sparse_linear.default]
    x, data = torch.randn(2, 24), LINEAR.data
    assert torch.equal(
        run(x, data, None, 10), torch.ops.sparse_nas.sparse_linear(x, data, None, 10)
    )
    with pytest.raises(ValueError, match="all tensors must be on the CPU, got cpu, meta"):
        run(x, data.to("meta"), None, 10)
