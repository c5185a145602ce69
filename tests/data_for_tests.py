"""Small image sets, written in the forms that their authors publish."""

import gzip
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
CIFAR = [*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"]


def idx(array: Bytes) -> bytes:
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def random_images(shape: tuple[int, ...], seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_fashion(folder: Path, suffix: str = "", n: int = 12) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, part in enumerate(("train", "t10k")):
        pixels, labels = random_images((n, 28, 28), seed), np.arange(n, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            content = idx(array)
            target = folder / f"{part}-{kind}-ubyte{suffix}"
            target.write_bytes(gzip.compress(content) if suffix else content)


def write_cifar_bin(folder: Path, n: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(CIFAR):
        records = random_images((n, 3073), seed)
        records[:, 0] = (np.arange(n) + seed) % 10
        records.tofile(folder / f"{name}.bin")


def as_python_2(pixels: Bytes, labels: list[int]) -> bytes:
    """A batch as the published ones are: cPickle of Python 2, protocol 2, byte strings."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    shape = number(pixels.shape[0]) + number(pixels.shape[1]) + b"\x86"
    made = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n"
    made += b"K\x00\x85" + text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    content = pixels.tobytes()
    data = b"T" + struct.pack("<i", len(content)) + content
    array = made + b"(K\x01" + shape + dtype + b"\x89" + data + b"tb"
    numbers = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def as_python_3(protocol: int) -> Callable[[Bytes, list[int]], bytes]:
    return lambda pixels, labels: pickle.dumps(
        {"data": pixels, "labels": labels}, protocol=protocol
    )


def write_cifar_py(
    binary: Path, folder: Path, write: Callable[[Bytes, list[int]], bytes] = as_python_2
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in CIFAR:
        records = np.fromfile(binary / f"{name}.bin", np.uint8).reshape(-1, 3073)
        (folder / name).write_bytes(write(records[:, 1:], records[:, 0].tolist()))
