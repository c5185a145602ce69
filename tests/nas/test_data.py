import codecs
import gzip
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from nas.data import (
    TASKS,
    check_data,
    read_cifar10,
    read_fashion_mnist,
    read_idx,
    stratified_split,
)
from tests.data_for_tests import (
    CIFAR,
    Bytes,
    as_python_2,
    as_python_3,
    idx,
    random_images,
    write_cifar_bin,
    write_cifar_py,
    write_fashion,
)

real_data = pytest.mark.skipif("NAS_DATA" not in os.environ, reason="NAS_DATA is not set")


@given(array=hnp.arrays(np.uint8, hnp.array_shapes(max_dims=4, max_side=5)), zipped=st.booleans())
def test_an_idx_file_reads_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, array: Bytes, zipped: bool
) -> None:
    path = tmp_path_factory.mktemp("idx") / ("array.gz" if zipped else "array")
    path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    np.testing.assert_array_equal(read_idx(path), array)


@given(data=st.data())
def test_a_cut_or_prolonged_idx_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = idx(random_images((3, 4, 5)))
    damaged = data.draw(
        st.integers(0, len(whole) - 1).map(lambda end: whole[:end])
        | st.binary(min_size=1, max_size=9).map(lambda more: whole + more)
    )
    path = tmp_path_factory.mktemp("idx") / "damaged"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged: IDX (magic must be|shape .* bytes)"):
        read_idx(path)


@pytest.mark.parametrize("magic", [b"\1\0\x08\x01", b"\0\0\x0d\x01", b"\0\0\x08\0", b"PK\3\4"])
def test_a_wrong_idx_magic_is_refused(tmp_path: Path, magic: bytes) -> None:
    (tmp_path / "wrong").write_bytes(magic + b"\0\0\0\1" + b"\7")
    with pytest.raises(ValueError, match="wrong: IDX magic must be 00 00 08 0n, got"):
        read_idx(tmp_path / "wrong")


@pytest.mark.parametrize("damage", [lambda z: z[:-9], lambda z: b"no gzip", lambda z: z[:20]])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(idx(random_images((50,))))))
    with pytest.raises(ValueError, match=r"images\.gz: damaged gzip file"):
        read_idx(path)


def test_an_idx_header_that_promises_too_much_is_refused_without_taking_memory(
    tmp_path: Path,
) -> None:
    header = struct.pack(">4B3I", 0, 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)
    (tmp_path / "huge").write_bytes(header)
    with pytest.raises(ValueError, match=f"needs {(2**32 - 1) ** 3 + 16} bytes"):
        read_idx(tmp_path / "huge")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", [".", "FashionMNIST/raw", "fashion-mnist"])
def test_fashion_mnist_is_found_in_the_usual_folders(
    tmp_path: Path, folder: str, suffix: str
) -> None:
    write_fashion(tmp_path / folder, suffix)
    check_data("fashion-mnist", tmp_path)
    train, test = read_fashion_mnist(tmp_path)
    np.testing.assert_array_equal(train.images[:, 0], random_images((12, 28, 28), 0))
    np.testing.assert_array_equal(test.images[:, 0], random_images((12, 28, 28), 1))
    assert train.labels.tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-images-idx3-ubyte", np.zeros((12, 32, 32)), r"\(N, 28, 28\) .*got \(12, 32, 32\)"),
        ("train-images-idx3-ubyte", np.zeros((0, 28, 28)), r"N >= 1, got \(0, 28, 28\)"),
        ("t10k-images-idx3-ubyte", np.zeros(12), r"\(N, 28, 28\) .*got \(12,\)"),
        ("t10k-labels-idx1-ubyte", np.zeros(11), r"one label per image .*got \(11,\)"),
        ("train-labels-idx1-ubyte", np.full(12, 10), r"labels must be 0 \.\. 9, got 10 \.\. 10"),
    ],
)
def test_a_fashion_mnist_file_of_another_shape_is_refused_by_name(
    tmp_path: Path, name: str, array: NDArray[Any], message: str
) -> None:
    write_fashion(tmp_path)
    (tmp_path / name).write_bytes(idx(array.astype(np.uint8)))
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        read_fashion_mnist(tmp_path)


@pytest.mark.parametrize("folder", ["", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin"])
def test_cifar_10_binary_batches_become_planes_of_red_green_and_blue(
    tmp_path: Path, folder: str
) -> None:
    write_cifar_bin(tmp_path / folder)
    check_data("cifar10", tmp_path)
    train, test = read_cifar10(tmp_path)
    assert train.images.shape == (20, 3, 32, 32) and test.images.shape == (4, 3, 32, 32)
    second_batch = random_images((4, 3073), 1)
    assert train.images[5, 2, 7, 9] == second_batch[1, 1 + 2 * 1024 + 7 * 32 + 9]
    assert train.labels.tolist() == [(i + batch) % 10 for batch in range(5) for i in range(4)]


@pytest.mark.parametrize(
    "write", [as_python_2, *map(as_python_3, (2, 3, 4))], ids=["py2", "2", "3", "4"]
)
def test_cifar_10_python_batches_hold_what_the_binary_ones_do(
    tmp_path: Path, write: Callable[[Bytes, list[int]], bytes]
) -> None:
    write_cifar_bin(tmp_path / "binary")
    write_cifar_py(tmp_path / "binary", tmp_path / "python" / "cifar-10-batches-py", write)
    read = read_cifar10(tmp_path / "python")
    for part, expected in zip(read, read_cifar10(tmp_path / "binary"), strict=True):
        np.testing.assert_array_equal(part.images, expected.images)
        np.testing.assert_array_equal(part.labels, expected.labels)


class Call:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.mkdir, eval, np.memmap, pickle.loads])
def test_a_pickle_that_wants_to_run_something_is_refused_unrun(
    tmp_path: Path, function: Callable[..., object], protocol: int
) -> None:
    trap = tmp_path / "sprung"
    argument = f"__import__('os').mkdir({str(trap)!r})" if function is eval else str(trap)
    write_cifar_bin(tmp_path / "binary")
    write_cifar_py(tmp_path / "binary", tmp_path)
    evil = {"data": Call(function, argument), "labels": [0]}
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(evil, protocol=protocol))
    with pytest.raises(ValueError, match=r"data_batch_3: .*is no part of a numpy array: refused"):
        read_cifar10(tmp_path)
    assert not trap.exists()


def test_a_pickle_may_not_pick_the_codec_of_its_bytes(tmp_path: Path) -> None:
    write_cifar_bin(tmp_path / "binary")
    write_cifar_py(tmp_path / "binary", tmp_path)
    bomb = {"data": Call(codecs.encode, b"", "zlib"), "labels": [0]}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(bomb, protocol=4))
    with pytest.raises(ValueError, match=r"test_batch: .*must be written as latin1, got b?'zlib'"):
        read_cifar10(tmp_path)


@given(st.data())
def test_a_damaged_python_batch_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cifar")
    for name in CIFAR:
        (folder / name).write_bytes(as_python_2(random_images((1, 3072)), [1]))
    whole = (folder / "data_batch_1").read_bytes()
    damaged = data.draw(
        st.binary(max_size=50) | st.sampled_from([whole[:at] for at in range(200)])
    )
    (folder / "data_batch_1").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"data_batch_1: .*CIFAR-10 batch"):
        read_cifar10(folder)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": [0]}, "'data' must be a uint8 array, got NoneType"),
        ({"data": np.zeros((1, 3072)), "labels": [0]}, r"uint8 array, got float64 \(1, 3072\)"),
        ({"data": np.zeros((1, 784), np.uint8), "labels": [0]}, r"\(N, 3072\).*got \(1, 784\)"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "'labels' must be a list of int, got NoneType"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["0"]}, "list of int, got list"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [0, 1]}, "one label per image .*got 2"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, "labels must be 0 .. 9, got -1"),
        ([1, 2], "must be a dict, got list"),
    ],
)
def test_a_python_batch_of_other_content_is_refused(
    tmp_path: Path, batch: object, message: str
) -> None:
    for name in CIFAR:
        (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ValueError, match=f"data_batch_1: .*{message}"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (3073 * 4 - 1, "needs whole records of 3073 bytes, got 12291"),
        (3073 * 3, "data_batch_1.bin has 4, this one 3"),
        (0, "needs whole records of 3073 bytes, got 0"),
    ],
)
def test_a_cut_binary_batch_is_refused(tmp_path: Path, end: int, message: str) -> None:
    write_cifar_bin(tmp_path)
    path = tmp_path / "data_batch_4.bin"
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ValueError, match=f"data_batch_4.bin: .*{message}"):
        read_cifar10(tmp_path)


def test_a_binary_batch_with_an_eleventh_class_is_refused(tmp_path: Path) -> None:
    write_cifar_bin(tmp_path)
    path = tmp_path / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"test_batch.bin: labels must be 0 \.\. 9, got .* 10"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("fashion-mnist", "train-images-idx3-ubyte.gz"),
        ("cifar10", "data_batch_1.bin .. test_batch.bin or data_batch_1 .. test_batch"),
    ],
)
def test_missing_data_is_one_line_that_names_folder_files_and_the_way_out(
    tmp_path: Path, name: str, files: str
) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        check_data(name, tmp_path)
    line = str(caught.value)
    assert "\n" not in line
    for part in (name, str(tmp_path), files, "--data", "NAS_DATA"):
        assert part in line


def test_one_missing_file_of_a_set_counts_as_missing(tmp_path: Path) -> None:
    write_cifar_bin(tmp_path)
    (tmp_path / "data_batch_5.bin").unlink()
    with pytest.raises(FileNotFoundError, match="cifar10"):
        check_data("cifar10", tmp_path)


def test_without_an_argument_the_folder_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fashion(tmp_path)
    monkeypatch.setenv("NAS_DATA", str(tmp_path))
    check_data("fashion-mnist")
    monkeypatch.setenv("NAS_DATA", str(tmp_path / "elsewhere"))
    check_data("fashion-mnist", tmp_path)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_no_folder_at_all_is_one_line_with_the_way_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NAS_DATA", "")
    with pytest.raises(FileNotFoundError, match=rf"{name}: no data folder.*--data or NAS_DATA"):
        check_data(name)
    monkeypatch.delenv("NAS_DATA")
    with pytest.raises(FileNotFoundError, match=rf"{name}: no data folder.*--data or NAS_DATA"):
        check_data(name)


def test_digits_needs_no_folder_and_an_unknown_name_is_refused(tmp_path: Path) -> None:
    check_data("digits", tmp_path / "absent")
    with pytest.raises(ValueError, match="digits, fashion-mnist, cifar10, got 'imagenet'"):
        check_data("imagenet")


def test_looking_for_data_imports_neither_torch_nor_sklearn() -> None:
    look = "import sys, nas.data; print([m for m in ('torch', 'sklearn') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@given(
    labels=hnp.arrays(np.int64, st.integers(1, 80), elements=st.integers(0, 4)),
    first=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**32),
)
def test_a_stratified_split_deals_every_class_out_in_the_same_share(
    labels: NDArray[np.int64], first: float, seed: int
) -> None:
    parts = stratified_split(labels, (first, 1 - first), seed)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    for label in np.unique(labels):
        share = first * (labels == label).sum()
        assert abs((labels[parts[0]] == label).sum() - share) <= 0.5 + 1e-9


def test_a_stratified_split_is_fixed_by_its_seed() -> None:
    labels = np.arange(100) % 10
    one, same, other = (stratified_split(labels, (0.5, 0.5), seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one[0], same[0])
    assert (one[0] != other[0]).any()


@real_data
@pytest.mark.parametrize("name", TASKS)
def test_real_data_is_there(name: str) -> None:
    check_data(name)


@real_data
@pytest.mark.parametrize(
    ("read", "train_shape", "test_shape"),
    [
        (read_fashion_mnist, (60000, 1, 28, 28), (10000, 1, 28, 28)),
        (read_cifar10, (50000, 3, 32, 32), (10000, 3, 32, 32)),
    ],
)
def test_real_sets_have_their_published_sizes(
    read: Callable[[], Any], train_shape: tuple[int, ...], test_shape: tuple[int, ...]
) -> None:
    train, test = read()
    assert (train.images.shape, test.images.shape) == (train_shape, test_shape)
    assert set(np.bincount(test.labels)) == {1000}
    assert set(np.bincount(train.labels)) == {train_shape[0] // 10}
