"""Attention works on samples as they lie: the same numbers, no copies, and only where it may."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from nas.attention import slow_attention
from nas.packing import PackedNetwork, devices, load, pack, save
from nas.packing.attention import keep_order
from nas.packing.trace import trace
from tests.pack_models import Cross, calls, kernels_of, masked, prefer, prefer_sparse, transformer

aten, ops = torch.ops.aten, torch.ops.sparse_nas
ATTENTION = aten.scaled_dot_product_attention.default
LENGTH, WIDTH = 6, 16
LATER = torch.ones(LENGTH, LENGTH).triu(1).bool()


class Attention(nn.Module):
    """Of its input on itself; a second input says which keys are padding."""

    def __init__(self, heads: int = 4, mask: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        self.causal, self.weights = options.pop("causal", False), options.pop("weights", False)
        options = {"batch_first": True, **options}
        self.attention, self.mask = nn.MultiheadAttention(WIDTH, heads, **options), mask

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        masks = {"attn_mask": self.seen(x), "is_causal": self.causal, "key_padding_mask": padding}
        return x + self.attention(x, x, x, need_weights=self.weights, **masks)[0]

    def seen(self, x: Tensor) -> Tensor | None:
        return self.mask


class PerHead(Attention):
    """A mask for every head of every sample, (N * H, L, L)."""

    def seen(self, x: Tensor) -> Tensor:
        mask = torch.linspace(-2, 2, 4 * LENGTH * LENGTH).reshape(4, LENGTH, LENGTH)
        return mask.repeat(x.shape[0], 1, 1)


class Widths(nn.Module):
    """Keys and values of other widths: three weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, kdim=6, vdim=10, batch_first=True)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.attention(x, y, z, need_weights=False)[0]


def layer(norm_first: bool, batch_first: bool = True) -> nn.Module:
    options = {"norm_first": norm_first, "batch_first": batch_first, "activation": "gelu"}
    one = nn.TransformerEncoderLayer(WIDTH, 4, 32, **options)  # type: ignore[arg-type]
    return nn.TransformerEncoder(one, 2, enable_nested_tensor=False)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 32, batch_first=True), 2)


ONE, PADDED = ((LENGTH, WIDTH),), ((LENGTH, WIDTH), (LENGTH,))
TURNED: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "self": (Attention, ONE),
    "one head": (lambda: Attention(1), ONE),
    "heads of one": (lambda: Attention(WIDTH), ONE),
    "no bias": (lambda: Attention(bias=False), ONE),
    "mask": (lambda: Attention(mask=LATER), ONE),
    "float mask": (lambda: Attention(mask=torch.randn(LENGTH, LENGTH)), ONE),
    "causal": (lambda: Attention(mask=LATER, causal=True), ONE),
    "mask per head": (PerHead, ONE),
    "padding": (Attention, PADDED),
    "padding and mask": (lambda: Attention(mask=LATER), PADDED),
    "padding and causal": (lambda: Attention(mask=LATER, causal=True), PADDED),
    "length of one": (Attention, ((1, WIDTH),)),
    "norm first": (lambda: layer(True), ONE),
    "norm last": (lambda: layer(False), ONE),
    "cross": (Cross, ((3, WIDTH), (7, WIDTH))),
    "widths": (Widths, ((3, WIDTH), (7, 6), (7, 10))),
    "decoder": (decoder, ((3, WIDTH), (7, WIDTH))),
}
LENGTH_FIRST: dict[str, Callable[[], nn.Module]] = {
    "self": lambda: Attention(batch_first=False),
    "one head": lambda: Attention(1, batch_first=False),
    "norm first": lambda: layer(True, batch_first=False),
    "norm last": lambda: layer(False, batch_first=False),
}


def given(batch: int, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """Random inputs; one of a single dimension says what is padding, never everything."""
    inputs = [torch.randn(batch, *shape) for shape in shapes]
    return tuple(
        (x > 0.5).index_fill_(1, torch.tensor(0), False) if x.dim() == 2 else x for x in inputs
    )


def assert_same(
    packed: nn.Module, module: nn.Module, shapes: tuple[tuple[int, ...], ...] = ONE
) -> None:
    """`packed` gives what `module` gives on batches 1, 2 and 5."""
    for batch in (1, 2, 5):
        inputs = given(batch, shapes)
        with torch.no_grad():
            expected = module(*(x.clone() for x in inputs))
        torch.testing.assert_close(packed(*inputs), expected, rtol=1e-4, atol=1e-5)


def graph(packed: PackedNetwork) -> Any:
    assert isinstance(packed.body, GraphModule) and packed.signature is not None
    return packed.body.graph


def operands(packed: PackedNetwork) -> list[list[Any]]:
    """For each operand of each attention the operators from its product on."""
    found = []
    products = {aten.linear.default, ops.sparse_linear.default, ops.sparse_chain.default}
    for node in graph(packed).nodes:
        for part in node.args[:3] if node.target is ATTENTION else ():
            found.append([part.target])
            while part.target not in products:
                part = part.args[0]
                found[-1].insert(0, part.target)
    return found


def copies(packed: PackedNetwork, shapes: tuple[tuple[int, ...], ...] = ONE) -> int:
    """How often a call of it copies a tensor."""
    inputs = given(3, shapes)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        packed(*inputs)
    return sum(event.count for event in profile.key_averages() if event.key == "aten::clone")


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_batch_first_stays_first(
    name: str, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer_sparse(monkeypatch)
    make, shapes = TURNED[name]
    module = masked(make())
    packed = pack(module, given(3, shapes), kernels="auto" if sparse else "dense")
    assert kernels_of(packed) == {"sparse_linear" if sparse else "dense"}
    views = {aten.unflatten.int, aten.select.int, aten.permute.default}
    assert operands(packed) and all(views.issuperset(path[1:]) for path in operands(packed))
    of_mask = shapes is PADDED  # to every head
    assert aten.transpose.int not in calls(packed) and copies(packed, shapes) == of_mask
    assert_same(packed, module, shapes)


@pytest.mark.parametrize("name", LENGTH_FIRST)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_length_first_stays_first(
    name: str, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the length is the free dimension."""
    prefer_sparse(monkeypatch)
    module = masked(LENGTH_FIRST[name]())
    packed = pack(module, torch.randn(3, 4, WIDTH), kernels="auto" if sparse else "dense")
    assert kernels_of(packed) == {"sparse_linear" if sparse else "dense"}
    assert aten.transpose.int not in calls(packed) and operands(packed)
    assert copies(packed, ((4, WIDTH),)) == 0
    assert_same(packed, module, ((4, WIDTH),))


LEFT_ALONE: dict[str, Callable[[], nn.Module]] = {
    "another key": lambda: Attention(add_bias_kv=True),
    "a zero key": lambda: Attention(add_zero_attn=True),
    "weights": lambda: Attention(weights=True),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_attention_stays_as_it_is(name: str) -> None:
    module = masked(LEFT_ALONE[name]())
    traced = trace(LEFT_ALONE[name]().eval(), given(2, ONE)).module
    before = str(traced.graph)
    keep_order(traced)
    assert str(traced.graph) == before
    packed = pack(module, given(3, ONE))
    assert graph(packed)
    assert_same(packed, module)


class Written(nn.Module):
    """What `F.multi_head_attention_forward` does, its values given to others by name."""

    def __init__(self, also: str = "", order: tuple[int, ...] = (2, 0, 1, 3)) -> None:
        super().__init__()
        self.also, self.order = also, order
        self.into, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, length, heads = x.shape[0], LENGTH, 4
        turned = x.transpose(1, 0)
        product = self.into(turned)
        split = product.unflatten(-1, (3, WIDTH))
        whole = split.unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
        parts = (whole[0], whole[1], whole[2])
        rows = [part.view(length, batch * heads, 4).transpose(0, 1) for part in parts]
        q, k, v = (row.view(batch, heads, length, 4) for row in rows)
        seen = F.scaled_dot_product_attention(q, k, v)
        flat = seen.permute(self.order).reshape(batch * length, WIDTH)
        result = self.out(flat).view(length, batch, WIDTH)
        last = result.transpose(1, 0)
        every = {"turned": turned, "product": product, "whole": whole, "part": parts[1]}
        every |= {"row": rows[2], "q": q, "seen": seen, "flat": flat, "result": result}
        return last, *([every[self.also] + 1] if self.also else [])


@pytest.mark.parametrize(
    ("also", "rewritten"),
    [
        ("", True),
        ("turned", True),  # the input is read where it lies, whoever else reads it transposed
        ("result", True),  # what is behind the last product stays as it was
        *((name, False) for name in ("product", "whole", "part", "row", "q", "seen", "flat")),
    ],
)
def test_what_others_read_in_between_is_still_there(also: str, rewritten: bool) -> None:
    module = masked(Written(also))
    packed = pack(module, given(3, ONE), kernels="dense")
    assert all(aten.unsqueeze.default not in path for path in operands(packed)) == rewritten
    assert_same(packed, module)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 3, 1)])
def test_a_result_in_another_order_stays(order: tuple[int, ...]) -> None:
    module = masked(Written(order=order))
    packed = pack(module, given(3, ONE), kernels="dense")
    assert any(aten.unsqueeze.default in path for path in operands(packed))
    assert_same(packed, module)


def test_attention_without_heads_stays() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            seen = F.scaled_dot_product_attention(x, x, x).permute(1, 0, 2)
            return self.fc(seen.reshape(-1, WIDTH)).view(LENGTH, -1, WIDTH).transpose(1, 0)

    module = masked(Plain())
    packed = pack(module, given(3, ONE), kernels="dense")
    assert graph(packed)
    assert_same(packed, module)


class Behind(nn.Module):
    """Reads what attention gives as the way it lies allows, or writes into it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.attention, self.way = nn.MultiheadAttention(WIDTH, 2, batch_first=True), way

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.attention(x, x, x, need_weights=False)[0]
        if self.way == "viewed":
            return (torch.relu(y).transpose(0, 1).view(-1, WIDTH),)
        if self.way == "added":
            total = 2 * x
            total += y
            return total, total.view(-1, LENGTH * WIDTH)
        copied = y.contiguous()
        copied += 1
        return y, copied


@pytest.mark.parametrize("way", ["viewed", "added", "written"])
def test_what_is_behind_it_still_holds(way: str) -> None:
    module = masked(Behind(way))
    packed = pack(module, given(4, ONE), kernels="dense")
    assert any(aten.unsqueeze.default in path for path in operands(packed)) == (way == "written")
    for batch in (2, 4):
        x = torch.randn(batch, *ONE[0])
        with torch.no_grad(), slow_attention():  # the fast one gives another layout
            torch.testing.assert_close(packed(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_on_a_gpu_its_product_adds_the_shortcut(
    norm_first: bool, batch_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed as on a GPU, on the CPU; so do the second products of the other halves."""
    monkeypatch.setattr(devices, "of", lambda _: replace(devices.GPU, kind="cpu"))
    monkeypatch.setattr("nas.packing.devices.kernels.tune", lambda *_: {"few": 2.0, "dense": 4.0})
    prefer(monkeypatch, lambda kernel: 4.0 if kernel.name == "dense" else 2.0)
    module = masked(layer(norm_first, batch_first))
    packed = pack(module, given(3, ONE))
    assert aten.add.Tensor not in calls(packed)
    assert calls(packed).count(ops.sparse_linear.residual) == 2 * 2
    assert_same(packed, module)


def test_a_saved_network_is_the_same(tmp_path: Path) -> None:
    module = masked(transformer())
    packed = pack(module, torch.randn(3, 5, WIDTH))
    save(packed, tmp_path)
    x = torch.randn(4, 5, WIDTH)
    assert torch.equal(load(tmp_path)(x), packed(x))
