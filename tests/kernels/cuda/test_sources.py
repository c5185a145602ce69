"""The CUDA C++ compiles, where NVRTC is installed; no GPU is needed."""

import itertools
import os
from typing import Any

import pytest
import torch

from kernels.cuda import blob, few
from kernels.cuda.driver import CompileError, image

TARGETS = ("sm_80", "sm_90")


def compiles(source: str, target: str, **defines: int) -> None:
    try:
        assert image(source, target, defines)[:4] == b"\x7fELF"
    except CompileError as error:
        if "was not found" in str(error):
            pytest.skip(str(error))
        raise


def blocks(size: int, kept: float) -> blob.Blocks:
    """What plans look at, of a square weight in blocks of 64."""
    columns, none = torch.empty(int(kept * (size // 64) ** 2)), torch.empty(0)
    return blob.Blocks(
        blob.Form(blob.LINEAR),
        size,
        size,
        (64, 64),
        none,
        columns,
        none,
        False,
        none,
        none,
        none,
        None,
    )


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("narrow", [0, 1])
def test_sources_compile(target: str, narrow: int) -> None:
    for count, loads in itertools.product((1, 2, 4), (2, 4)):
        compiles("entries.cu", target, COUNT=count, WARPS=32, U=loads, BF16=narrow)
    for size, tokens in itertools.product((4096, 8192), (1, 16, 32)):
        for mean in (0.05, 0.5):  # of columns that are kept
            how = few.plan(blocks(size, mean), tokens)
            shape = {"MT": how.tiles, "NT": how.tokens // 8, "WARPS": how.warps, "U": how.chunks}
            compiles("few.cu", target, **shape, BR=64, BC=64, BF16=narrow)
    for tiles, wide, warps in itertools.product((1, 2, 4), (1, 2, 4), (8, 16)):
        shape = {"MT": tiles, "NT": wide, "WARPS": warps, "BF16": narrow}
        compiles("expand.cu", target, **shape, AHEAD=3)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled then")
@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize(("side", "turned"), [(64, True), (128, False)])
def test_triton_compiles(side: int, turned: bool, bulk: bool) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.cuda import many

    tiles = {"x": (128, 64), "values": (side, 64), "y": (128, side)}
    kinds = {name: f"tensordesc<bf16[{a},{b}]>" for name, (a, b) in tiles.items()}
    kinds = kinds if bulk else dict.fromkeys(tiles, "*bf16")
    kinds |= dict.fromkeys(("order", "starts", "columns"), "*i32") | {"bias": "*fp32"}
    kinds |= dict.fromkeys(("tokens", "channels", "rows"), "i32")
    fixed: dict[str, Any] = {
        "HEIGHT": side,
        "WIDTH": side,
        "STEP": 64,
        "STEPS": side // 64,
        "TOKENS": 128,
    }
    fixed |= {"TURNED": turned, "GROUP": 4, "SORTED": True, "BULK": bulk, "BIAS": True}
    fixed |= {"ACTIVATION": 4, "PRECISION": "tf32", "OUT": triton.language.bfloat16}
    names = many._linear.arg_names
    signature = {name: kinds.get(name, "constexpr") for name in names}
    source = ASTSource(many._linear, signature, fixed)
    options = {"num_warps": 4, "num_stages": 2}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert ("cp.async.bulk.tensor" in made.asm["ptx"]) == bulk


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled then")
@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_compiles(stride: int, bulk: bool) -> None:
    """To products that read their tiles where the copy engine put them."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels.cuda import implicit

    tiles = {"x": "16,4,1,4,64", "values": "64,64", "y": "16,4,4,64"}
    kinds = {name: f"tensordesc<bf16[{tile}]>" for name, tile in tiles.items()}
    kinds = kinds if bulk else dict.fromkeys(tiles, "*bf16")
    kinds |= dict.fromkeys(("order", "starts", "columns"), "*i32") | {"bias": "*fp32"}
    sizes = ("images", "height", "width", "out_height", "out_width", "rows")
    kinds |= dict.fromkeys(sizes, "i32")
    fixed: dict[str, Any] = {"HEIGHT": 64, "WIDTH": 64, "STEP": 64, "STEPS": 1, "CHANNELS": 256}
    fixed |= {"ACROSS": 3, "STRIDE_H": stride, "STRIDE_W": stride, "PAD_H": 1, "PAD_W": 1}
    fixed |= {"APART_H": 1, "APART_W": 1, "IMAGES": 16, "TALL": 4, "WIDE": 4, "GROUP": 1}
    fixed |= {"SORTED": True, "BULK": bulk, "BIAS": True, "ACTIVATION": 1, "PRECISION": "tf32"}
    fixed |= {"OUT": triton.language.bfloat16}
    signature = {name: kinds.get(name, "constexpr") for name in implicit._conv2d.arg_names}
    source = ASTSource(implicit._conv2d, signature, fixed)
    options = {"num_warps": 4, "num_stages": 3}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma.mma_async" in made.asm["ptx"]
    assert ("cp.async.bulk.tensor.5d" in made.asm["ptx"]) == bulk
    assert ("ldmatrix" in made.asm["ptx"]) is False
