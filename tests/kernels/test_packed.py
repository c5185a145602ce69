import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from kernels import blob as b
from kernels.checks import check
from kernels.packed import unpack
from tests.kernels import draws

EXAMPLE = {
    "linear": kernels.pack_linear(draws.weight(0, (33, 300), 0.1, 1)),
    "blocks": kernels.pack_linear(draws.weight(0, (32, 70), 0.2, 4)),
    "ordered": kernels.pack_conv2d(draws.weight(2, (16, 9, 3, 3), 0.5, 0), 2),
    "conv": kernels.pack_conv2d(draws.weight(0, (8, 40, 3, 3), 0.1, 1), 2),
    "bfloat16": kernels.pack_linear(draws.weight(0, (33, 300), 0.1, 1).bfloat16()),
}


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 300),
    block=draws.equal_rows,
    density=draws.densities,
    dtype=draws.storage,
    seed=draws.seeds,
)
def test_linear_weights_come_back_exactly(
    rows: int, columns: int, block: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    weight = draws.weight(seed, (rows, columns), density, block).to(dtype)
    packed = kernels.pack_linear(weight)
    assert torch.equal(kernels.dense(packed), weight)
    assert packed.data.dtype == torch.uint8 and packed.data.is_contiguous()


@settings(max_examples=60, deadline=None)
@given(
    case=draws.general,
    block=draws.equal_rows,
    density=draws.densities,
    dtype=draws.storage,
    seed=draws.seeds,
)
def test_convolution_weights_come_back_exactly(
    case: draws.Conv, block: int, density: float, dtype: torch.dtype, seed: int
) -> None:
    weight = draws.weight(seed, case.weight_shape, density, block).to(dtype)
    assert torch.equal(kernels.dense(kernels.pack_conv2d(weight, case.groups)), weight)


def test_meta_is_json_and_says_what_was_packed() -> None:
    weight = draws.weight(3, (8, 6, 3, 3), 0.3, 1)
    meta = kernels.pack_conv2d(weight, groups=2).meta
    assert json.loads(json.dumps(meta)) == meta
    assert meta == {
        "format": 2,
        "operation": "sparse_conv2d",
        "shape": [8, 6, 3, 3],
        "groups": 2,
        "dtype": "float32",
        "pattern": "unstructured",
        "block": "1x1",
        "nonzeros": int(weight.count_nonzero()),
    }


def test_blocks_of_four_rows_are_found() -> None:
    assert EXAMPLE["blocks"].meta["block"] == "4x1"
    assert EXAMPLE["linear"].meta["block"] == "1x1"
    assert EXAMPLE["ordered"].meta["block"] == "4x1"
    assert kernels.pack_linear(torch.ones(6, 8)).meta["block"] == "1x1"


def test_rows_of_a_block_stay_in_one_group() -> None:
    assert kernels.pack_conv2d(torch.ones(8, 2, 1, 1), 4).meta["block"] == "1x1"
    assert kernels.pack_conv2d(torch.ones(8, 2, 1, 1), 2).meta["block"] == "4x1"


def test_a_channels_last_weight_packs_to_the_same_bytes() -> None:
    weight = draws.weight(3, (8, 6, 3, 3), 0.3, 1)
    other = weight.to(memory_format=torch.channels_last)
    assert torch.equal(kernels.pack_conv2d(weight).data, kernels.pack_conv2d(other).data)


def test_packing_refuses_other_shapes_and_types() -> None:
    with pytest.raises(
        ValueError, match=r"pack_linear: weight must be float32 or bfloat16 \(out, in\)"
    ):
        kernels.pack_linear(torch.ones(2, 2, 2))
    with pytest.raises(ValueError, match=r"torch\.float16"):
        kernels.pack_linear(torch.ones(2, 2).half())
    with pytest.raises(ValueError, match="groups must divide out=6, got 4"):
        kernels.pack_conv2d(torch.ones(6, 2, 1, 1), 4)
    with pytest.raises(ValueError, match="must not be empty, got 0x3"):
        kernels.pack_conv2d(torch.ones(6, 2, 0, 3))


def test_validate_takes_what_pack_made() -> None:
    for packed in EXAMPLE.values():
        kernels.validate(packed.data, packed.meta)


@pytest.mark.parametrize("name", EXAMPLE)
@settings(max_examples=80, deadline=None)
@given(place=st.integers(0, 2**31), flip=st.integers(1, 255), header=st.booleans())
def test_any_flipped_byte_is_refused(name: str, place: int, flip: int, header: bool) -> None:
    packed = EXAMPLE[name]
    data = packed.data.clone()
    data[place % (b.HEADER.itemsize if header else len(data))] ^= flip
    with pytest.raises(ValueError, match="packed weight: "):
        kernels.validate(data, packed.meta)


@pytest.mark.parametrize("name", EXAMPLE)
@settings(max_examples=100, deadline=None)
@given(place=st.integers(28, b.HEADER.itemsize - 1), value=st.integers(0, 255))
def test_a_header_changed_with_its_checksum_is_refused_or_harmless(
    name: str, place: int, value: int
) -> None:
    raw = EXAMPLE[name].data.numpy().copy()
    raw[place] = value
    b.seal(raw, 24)
    try:
        check(raw)
    except ValueError as error:
        assert "packed weight: " in str(error)
    else:
        unpack(torch.from_numpy(raw))


@pytest.mark.parametrize("cut", [0, 1, 8, 135, 192, 1000])
def test_a_cut_blob_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="packed weight: "):
        kernels.validate(EXAMPLE["linear"].data[:cut].clone(), EXAMPLE["linear"].meta)


def forge(name: str, section: str, place: int, value: int) -> b.Bytes:
    """A blob with one number of a section changed, and a checksum that fits."""
    raw = EXAMPLE[name].data.numpy().copy()
    entries, slices = b.entries_of(raw), b.slices_of(raw)
    sections: dict[str, npt.NDArray[Any]] = {
        "order": entries.order,
        "starts": entries.starts,
        "columns": entries.columns,
        "slice_starts": slices.starts,
        "slice_bases": slices.bases,
        "slice_lanes": slices.lanes.reshape(-1),
    }
    sections[section][place] = value
    return b.seal(raw, 24)


@pytest.mark.parametrize(
    ("name", "section", "place", "value", "rule"),
    [
        ("linear", "columns", -1, 300, "columns must be inside"),
        ("linear", "columns", 0, -1, "columns must be inside"),
        ("linear", "columns", 0, 299, "columns must be inside"),
        ("conv", "columns", 5, 360, "columns must be inside"),
        ("linear", "columns", 1, 0, "columns must be"),
        ("ordered", "order", 0, 16, "order must be the 16 rows"),
        ("ordered", "order", 0, -1, "order must be the 16 rows"),
        ("ordered", "order", 0, 15, "order must be the 16 rows"),
        ("linear", "starts", 0, 1, "starts must be ascending from 0"),
        ("linear", "starts", 3, 2**30, "starts must be ascending"),
        ("linear", "starts", -1, 2**30, "starts must be ascending"),
        ("linear", "slice_starts", 1, -5, "slice starts must be ascending"),
        ("linear", "slice_bases", 0, 269, "slice bases must be in"),
        ("linear", "slice_bases", 0, -1, "slice bases must be in"),
        ("linear", "slice_lanes", 0, 32, "slice lanes must be inside"),
    ],
)
def test_forged_offsets_and_columns_are_named(
    name: str, section: str, place: int, value: int, rule: str
) -> None:
    raw = torch.from_numpy(forge(name, section, place, value))
    with pytest.raises(ValueError, match=rule):
        kernels.validate(raw, EXAMPLE[name].meta)


def test_an_operator_checks_a_blob_before_it_reads_it() -> None:
    raw = torch.from_numpy(forge("linear", "columns", -1, 2**30))
    with pytest.raises(ValueError, match="columns must be inside"):
        torch.ops.sparse_nas.sparse_linear(torch.ones(1, 300), raw, None, 33)


def test_meta_that_does_not_fit_its_data_is_refused() -> None:
    packed = EXAMPLE["conv"]
    with pytest.raises(ValueError, match=r"meta shape must be \[8, 40, 3, 3\].*got \[8, 4\]"):
        kernels.validate(packed.data, {**packed.meta, "shape": [8, 4]})
    with pytest.raises(ValueError, match="meta extra must be None"):
        kernels.validate(packed.data, {**packed.meta, "extra": 1})
    with pytest.raises(ValueError, match="uint8"):
        kernels.validate(packed.data.to(torch.int32), packed.meta)


def test_every_nonzero_has_one_lane_in_the_slices() -> None:
    weight = draws.weight(5, (33, 300), 0.2, 1)
    slices = b.slices_of(kernels.pack_linear(weight).data.numpy())
    found = np.zeros((48, 300), np.float32)
    for s in range(3):
        for step in range(slices.starts[s], slices.starts[s + 1]):
            for lane in range(16):
                found[16 * s + lane, slices.bases[step] + slices.lanes[step, lane]] += (
                    slices.values[step, lane]
                )
    assert np.array_equal(found[:33], weight.numpy())
    assert not found[33:].any()
