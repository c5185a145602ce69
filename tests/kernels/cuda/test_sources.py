"""The CUDA C++ compiles, where NVRTC is installed; no GPU is needed."""

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.cuda import driver, few, whole_grad, whole_plan
from kernels.cuda.blocks import LINEAR, Blocks, Form
from kernels.cuda.driver import CompileError, image
from kernels.window import Window

TARGETS = ("sm_80", "sm_90")


def compiles(source: str, target: str, **defines: int) -> None:
    try:
        assert image(source, target, defines)[:4] == b"\x7fELF"
    except CompileError as error:
        if "was not found" in str(error):
            pytest.skip(str(error))
        raise


def blocks(size: int, block: tuple[int, int], kept: float) -> Blocks:
    """What plans look at, of a square weight in blocks."""
    wide = size // block[1]
    columns, none = torch.empty(int(kept * size // block[0] * wide)), torch.empty(0)
    form, lists = Form(LINEAR), (none, columns, none)
    made = Blocks(form, size, size, block, *lists, False, none, none, 0, none, None)
    return replace(made, longest=min(wide, int(1.5 * kept * wide) + 1))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("narrow", [0, 1])
def test_sources_compile(target: str, narrow: int) -> None:
    for count, eights in itertools.product((1, 2), (1, 2)):
        compiles("entries.cu", target, COUNT=count, WARPS=32, U=eights, BF16=narrow)
    plans = {
        (block, few.plan(blocks(size, block, kept), tokens))
        for block in ((64, 64), (16, 32))
        for size, tokens in itertools.product((4096, 8192), (1, 16, 32))
        for kept in (0.05, 0.1, 0.15, 0.5)
    }
    for block, how in plans:
        assert block[0] % how.rows == 0
        shape = {"MT": how.tiles, "NT": how.tokens // 8, "WARPS": how.warps, "U": how.chunks}
        compiles("few.cu", target, **shape, BR=block[0], BC=block[1], BF16=narrow)
    if target == "sm_90":
        for wide, bias, activation in ((64, 0, 0), (128, 0, 4), *((128, 1, a) for a in range(5))):
            kind = {"BIAS": bias, "ACT": activation, "BF16": narrow}
            compiles("hopper.cu", "sm_90a", BC=wide, STAGES=4, **kind)
            compiles("halves.cu", "sm_90a", STAGES=5, **kind)
        tiles = [(*tile, 0) for tile in whole_plan.TILES] + [(128, *p) for p in whole_plan.PAIRS]
        for rows, weight, given in tiles:
            shape = {"HEIGHT": rows, "WEIGHT": weight, "INPUT": given}
            shape |= {"STAGES": whole_grad.stages_of(rows, max(weight, given))}
            compiles("whole_grad.cu", "sm_90a", **shape, BF16=narrow)
    for high, wide, depth in itertools.product((1, 2, 4), (1, 2, 4), (2, 3)):
        shape = {"MT": high, "NT": wide, "WARPS": 16 if wide == 4 else 24, "BF16": narrow}
        compiles("expand.cu", target, **shape, DEPTH=depth, COPIES=3)


@pytest.mark.parametrize("activation", [0, 4])
@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("hopper.cu", {"BC": 64, "STAGES": 4}),
        ("hopper.cu", {"BC": 128, "STAGES": 4}),
        ("halves.cu", {"STAGES": 5}),
        ("whole_grad.cu", {"HEIGHT": 128, "WEIGHT": 256, "INPUT": 0, "STAGES": 4}),
        ("whole_grad.cu", {"HEIGHT": 128, "WEIGHT": 192, "INPUT": 0, "STAGES": 4}),
        ("whole_grad.cu", {"HEIGHT": 64, "WEIGHT": 64, "INPUT": 0, "STAGES": 12}),
        *(
            (
                "whole_grad.cu",
                {"HEIGHT": 128, "WEIGHT": w, "INPUT": i}
                | {"STAGES": whole_grad.stages_of(128, max(w, i))},
            )
            for w, i in whole_plan.PAIRS
        ),
    ],
)
def test_products_of_wgmma_overlap(source: str, kind: dict[str, int], activation: int) -> None:
    """ptxas waits for each of them where it cannot see that the next one may begin."""
    defines = kind | {"ACT": activation, "BF16": 1}
    if source != "whole_grad.cu":
        defines["BIAS"] = 1
    options = ["--gpu-architecture=sm_90a", "--std=c++17", "--ptxas-options=-v"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    try:
        _, log = driver.compile_text(driver.source_text(source), source, options)
    except CompileError as error:
        if "was not found" in str(error):
            pytest.skip(str(error))
        raise
    assert "registers" in log and "serialized" not in log
    spilled = re.search(r"(\d+) bytes spill stores", log)
    assert spilled is not None and int(spilled[1]) <= 32


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def triton_makes(
    function: Any, target: int, kinds: dict[str, str], fixed: dict[str, Any], **options: int
) -> str:
    """The PTX of a Triton function, for a compute capability."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: kinds.get(name, "constexpr") for name in function.arg_names}
    source = ASTSource(function, signature, fixed)
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return made.asm["ptx"]


def tiles(shapes: Mapping[str, tuple[int, ...]], bulk: bool) -> dict[str, str]:
    """Types of arguments in bfloat16: tiles of tensors, or where tensors lie."""
    if not bulk:
        return dict.fromkeys(shapes, "*bf16")
    return {
        name: f"tensordesc<bf16[{','.join(map(str, shape))}]>" for name, shape in shapes.items()
    }


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled then")
@pytest.mark.parametrize("places", [False, True])
@pytest.mark.parametrize(("target", "bulk"), [(90, True), (90, False), (80, False)])
@pytest.mark.parametrize(("side", "turned"), [(64, True), (128, False)])
def test_a_product_compiles(
    side: int, turned: bool, target: int, bulk: bool, places: bool
) -> None:
    triton = pytest.importorskip("triton")
    from kernels.cuda import many

    shapes = {"x": (128, 64), "values": (64, side) if places else (side, 64), "y": (128, side)}
    kinds = tiles(shapes, bulk) | {"bias": "*fp32"}
    kinds |= dict.fromkeys(("order", "starts", "columns", "places"), "*i32")
    kinds |= dict.fromkeys(("tokens", "channels", "rows"), "i32")
    fixed: dict[str, Any] = {
        "HEIGHT": side,
        "WIDTH": side,
        "STEP": 64,
        "STEPS": side // 64,
        "TOKENS": 128,
    }
    fixed |= {
        "TURNED": turned,
        "GROUP": 4,
        "SORTED": True,
        "BULK": bulk,
        "EARLY": bulk,
        "PLACES": places,
    }
    fixed |= {"BIAS": True, "ACTIVATION": 4, "PRECISION": "tf32", "OUT": triton.language.bfloat16}
    ptx = triton_makes(many._linear, target, kinds, fixed, num_warps=4, num_stages=2)
    assert ("wgmma.mma_async" if target == 90 else "mma.sync") in ptx
    assert ("cp.async.bulk.tensor" in ptx) == bulk


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled then")
@pytest.mark.parametrize(("target", "bulk"), [(90, True), (90, False), (80, False)])
@pytest.mark.parametrize(("block", "group"), [((64, 64), 4), ((128, 128), 1), ((16, 32), 4)])
def test_a_sampled_product_compiles(
    block: tuple[int, int], group: int, target: int, bulk: bool
) -> None:
    triton = pytest.importorskip("triton")
    from kernels.cuda import sampled

    kinds = tiles({"grad": (64, block[0]), "x": (64, block[1])}, bulk)
    kinds |= {"groups": "*i32", "sums": "*fp32"}
    kinds |= dict.fromkeys(("tokens", "rows", "channels", "blocks", "count", "split"), "i32")
    fixed: dict[str, Any] = {"HEIGHT": block[0], "WIDTH": block[1], "SIZE": group, "STEP": 64}
    fixed["WHOLE"] = group == 1
    fixed |= {"BULK": bulk, "PRECISION": "tf32", "OUT": triton.language.float32}
    ptx = triton_makes(sampled._sampled, target, kinds, fixed, num_warps=4, num_stages=2)
    fast = target == 90 and block[0] >= 64
    assert ("wgmma.mma_async" if fast else "mma.sync") in ptx
    assert ("cp.async.bulk.tensor" in ptx) == bulk
    kinds = {"sums": "*fp32", "to": "*bf16", "count": "i32"}
    triton_makes(sampled._add, target, kinds, {"SPLIT": 4, "SIZE": 1024}, num_warps=4)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled then")
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("block", [(16, 16), (128, 128), (16, 128)])
def test_moving_blocks_compiles(block: tuple[int, int], target: int) -> None:
    pytest.importorskip("triton")
    from kernels.cuda import whole

    kinds = {"matrix": "*bf16", "values": "*bf16", "starts": "*i32", "columns": "*i32"}
    height, width = block
    group = max(1, 4096 // (height * width))
    fixed = {"HEIGHT": height, "WIDTH": width, "GROUP": group, "EARLY": target >= 90}
    for function in (whole._unpacked, whole._gathered, whole._masked):
        ptx = triton_makes(function, target, kinds | {"count": "i32"}, fixed)
        assert "st.global" in ptx and "ld.global" in ptx
        assert ("griddepcontrol.wait" in ptx) == (target >= 90)


def walking(stride: int, padding: int) -> dict[str, Any]:
    """What kernels are compiled for, of a 3x3 over 256 channels."""
    from kernels.cuda import implicit

    pairs = ((stride, stride), (padding, padding), (1, 1))
    return dict(implicit.constants(Window((3, 3), *pairs), 256))


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled then")
@pytest.mark.parametrize(("target", "bulk"), [(90, True), (90, False), (80, False)])
@pytest.mark.parametrize(
    ("stride", "padding", "places"), [(1, 1, False), (2, 1, False), (1, 1, True), (1, -2, True)]
)
def test_a_convolution_compiles(
    stride: int, padding: int, places: bool, target: int, bulk: bool
) -> None:
    """To products that read their tiles where the copy engine put them."""
    triton = pytest.importorskip("triton")
    from kernels.cuda import implicit

    boxes = {"x": (16, 4, 1, 4, 64), "values": (64, 64), "y": (16, 4, 4, 64)}
    kinds = tiles(boxes, bulk) | {"bias": "*fp32"}
    kinds |= dict.fromkeys(("order", "starts", "columns", "places"), "*i32")
    sizes = ("images", "height", "width", "out_height", "out_width", "rows")
    kinds |= dict.fromkeys(sizes, "i32")
    fixed: dict[str, Any] = {"HEIGHT": 64, "WIDTH": 64, "STEP": 64, "STEPS": 1}
    fixed |= walking(stride, padding) | {"IMAGES": 16, "TALL": 4, "WIDE": 4, "GROUP": 1}
    fixed |= {
        "SORTED": True,
        "BULK": bulk,
        "EARLY": bulk,
        "PLACES": places,
        "BIAS": True,
        "ACTIVATION": 1,
    }
    fixed |= {"PRECISION": "tf32", "OUT": triton.language.bfloat16}
    ptx = triton_makes(implicit._conv2d, target, kinds, fixed, num_warps=4, num_stages=3)
    assert ("wgmma.mma_async" in ptx and "ldmatrix" not in ptx) == (target == 90)
    assert ("cp.async.bulk.tensor.5d" in ptx) == bulk


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled then")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("target", "bulk"), [(90, True), (90, False), (80, False)])
@pytest.mark.parametrize(("block", "group"), [((64, 64), 2), ((128, 128), 1), ((16, 32), 2)])
@pytest.mark.parametrize("box", [(64, 1, 1), (4, 4, 4)])
def test_a_sampled_convolution_compiles(
    box: tuple[int, int, int],
    block: tuple[int, int],
    group: int,
    target: int,
    bulk: bool,
    stride: int,
) -> None:
    """Tiles of one pixel of each image are multiplied where the copy engine put them."""
    triton = pytest.importorskip("triton")
    from kernels.cuda import sampled_conv2d

    images, tall, wide = box
    shapes = {"grad": (tall, wide, images, block[0]), "x": (tall, 1, wide, images, block[1])}
    kinds = tiles(shapes, bulk) | {"groups": "*i32", "sums": "*fp32"}
    sizes = ("images", "height", "width", "out_height", "out_width", "rows")
    kinds |= dict.fromkeys((*sizes, "blocks", "count", "split"), "i32")
    fixed: dict[str, Any] = {"HEIGHT": block[0], "WIDTH": block[1], "SIZE": group}
    fixed |= walking(stride, 1) | {"IMAGES": images, "TALL": tall, "WIDE": wide}
    fixed |= {"BULK": bulk, "PRECISION": "tf32", "OUT": triton.language.float32}
    ptx = triton_makes(sampled_conv2d._sampled, target, kinds, fixed, num_warps=4, num_stages=3)
    fast = target == 90 and block[0] >= 64
    assert ("wgmma.mma_async" if fast else "mma.sync") in ptx
    assert not (fast and bulk and images == 64) or "ldmatrix" not in ptx
    assert ("cp.async.bulk.tensor.5d" in ptx and "cp.async.bulk.tensor.4d" in ptx) == bulk
