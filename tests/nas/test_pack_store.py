from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import GraphModule

from nas.packing import load, pack, save
from tests.pack_models import MODELS, Branching, Mlp, ResNet, assert_same, masked, prefer_sparse

CHAIN = torch.ops.sparse_nas.sparse_chain.default


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_network_comes_back_whole(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer_sparse(monkeypatch, runs=len(name) % 2 == 0)
    make, shapes, _ = MODELS[name]
    module = masked(make())
    packed = pack(module, tuple(torch.randn(2, *shape) for shape in shapes))
    save(packed, tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    assert_same(loaded, module, *shapes)
    assert loaded.explain() == packed.explain()
    assert (loaded.layers, loaded.runs) == (packed.layers, packed.runs)
    assert loaded.signature == packed.signature


def test_a_channels_last_network_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.packing.layout.interleaved", lambda *_: [2.0, 1.0])
    module = masked(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)))
    save(pack(module, torch.randn(2, 3, 7, 7), kernels="dense"), tmp_path)
    loaded = load(tmp_path)
    assert loaded.layout == "channels_last"
    assert loaded(torch.randn(2, 3, 7, 7)).is_contiguous(memory_format=torch.channels_last)
    assert_same(loaded, module, (3, 7, 7))


def test_a_fresh_process_needs_no_code_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer_sparse(monkeypatch, runs=True)
    packed = pack(masked(Mlp()), torch.randn(2, 33))
    save(packed, tmp_path)
    code = (
        "import sys, torch; from nas.packing import load; "
        f"print(load({str(tmp_path)!r})(torch.ones(1, 33)).tolist()); "
        "assert not any(name.startswith('tests') for name in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    torch.testing.assert_close(
        torch.tensor(json.loads(done.stdout)), packed(torch.ones(1, 33)), rtol=1e-5, atol=1e-6
    )


def test_a_network_without_a_graph_is_not_saved(tmp_path: Path) -> None:
    packed = pack(masked(Branching()), torch.randn(2, 3, 6, 6))
    with pytest.raises(ValueError, match="layers were exchanged"):
        save(packed, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 2', '"format": 1', "format must be 2, got 1"),
        ("aten.linear.default", "aten.no_such.default", "aten.no_such.default"),
        ("aten.linear.default", "aten.linear.default.__class__", "__class__"),
        ("aten.linear.default", "operator.attrgetter", "attrgetter"),
        ("aten.linear.default", "os.system", "os.system"),
        ('"name": "tensor"', '"name": "a;print(1)"', "plain"),
        ('"target": "tensor"', '"target": "tensor.__class__"', "plain"),
        ('"kwargs": {}', '"kwargs": {"a=print(1),b": 1}', "plain"),
        ('"op": "get_attr"', '"op": "call_method"', "call_method"),
        ('"dtype": "float32"', '"dtype": "nn"', "'nn' is no dtype"),
    ],
)
def test_what_is_not_known_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    save(pack(masked(Mlp()), torch.randn(2, 33), kernels="dense"), tmp_path)
    path = tmp_path / "packed.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_spoiled_weight_is_refused_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer_sparse(monkeypatch)
    save(pack(masked(nn.Linear(16, 16)), torch.randn(2, 16)), tmp_path)
    path = tmp_path / "packed.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-40] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ValueError):
        load(tmp_path)(torch.randn(2, 16))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a network whose layers run as one call."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        prefer_sparse(patch, runs=True)
        save(pack(masked(Mlp()), torch.randn(2, 33)), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=150, deadline=None)
@given(
    place=st.integers(0, 2**31), flip=st.integers(1, 255), cut=st.booleans(), graph=st.booleans()
)
def test_spoiled_files_are_refused_or_harmless(
    stored: dict[str, bytes], place: int, flip: int, cut: bool, graph: bool
) -> None:
    """A flipped byte, or all that follows it left out."""
    name = "packed.json" if graph else "packed.safetensors"
    raw = bytearray(stored[name])
    place %= len(raw)
    raw[place] ^= flip
    with tempfile.TemporaryDirectory() as folder:
        for file, content in {**stored, name: bytes(raw[:place] if cut else raw)}.items():
            (Path(folder) / file).write_bytes(content)
        try:
            network = load(folder)
        except ValueError:
            return
    if not graph:  # a spoiled program is refused by its call; a bias that is another is none
        with contextlib.suppress(ValueError, RuntimeError):
            network(torch.ones(1, 33))


def test_a_packed_network_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    prefer_sparse(monkeypatch, runs=True)
    module = masked(ResNet())
    packed = pack(module, torch.randn(2, 3, 9, 11))
    free = {"inputs": ({0: torch.export.Dim("batch", min=1, max=64)},)}
    program = torch.export.export(packed, (torch.randn(3, 3, 9, 11),), dynamic_shapes=free)
    graphs = [
        part.graph for part in program.graph_module.modules() if isinstance(part, GraphModule)
    ]
    assert any(node.target is CHAIN for graph in graphs for node in graph.nodes)
    x = torch.randn(5, 3, 9, 11)
    torch.testing.assert_close(program.module()(x), packed(x))
