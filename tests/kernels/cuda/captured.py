"""A step of training in a captured graph, against the same one launched by the host."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import block_op
from kernels.block_index import BlockIndex
from kernels.cuda import block_linear, whole_grad


def check(
    net: nn.Module, x: Tensor, room: bool, joins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks `steps` where rules say which way.

    Args:
        net: see `steps`.
        x: likewise.
        room: whether the gradients of a layer come beside each other.
        joins: whether they come by one launch, where there is such a kernel.
        monkeypatch: pytest's.
    """

    def joined(index: BlockIndex, dtype: torch.dtype, _: int) -> bool:
        return joins and whole_grad.takes(index, dtype)

    monkeypatch.setattr(block_linear, "room", lambda *_: room)
    monkeypatch.setattr(block_linear, "joins", joined)
    steps(net, x, room, monkeypatch)


def steps(net: nn.Module, x: Tensor, room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers that are this one, bit-equal for ten inputs and weights.

    Args:
        net: a layer of blocks with `values`, of as many features out as in.
        x: an input that takes a gradient.
        room: whether the gradients of a layer must come beside each other.
        monkeypatch: pytest's.
    """
    given, beside, met = [x, *net.parameters()], block_op._beside, list[torch.device]()

    def noted(device: torch.device) -> torch.cuda.Stream:
        met.append(device)
        return beside(device)

    monkeypatch.setattr(block_op, "_beside", noted)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(net(net(x)).square().sum(), given)

    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    assert len(met) == (2 if room else 0)
    for _ in range(10):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            net.get_parameter("values").mul_(0.9)
        graph.replay()
        assert all(torch.equal(mine, its) for mine, its in zip(held, step(), strict=True))
