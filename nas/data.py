"""Readers of published data sets, and a quick check that they are there."""

import gzip
import math
import os
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The shape (C, H, W) of a named task's images.
TASKS = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}

_CIFAR_BATCHES = (*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch")
_CIFAR_BIN = tuple(f"{batch}.bin" for batch in _CIFAR_BATCHES)
_CIFAR_FOLDERS = tuple(
    str(Path(parent, kind))
    for parent in ("", "cifar10", "CIFAR10")
    for kind in ("cifar-10-batches-bin", "cifar-10-batches-py", "")
)
_CIFAR_SHAPE = (3, 32, 32)
_FASHION_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_FASHION_FOLDERS = (".", "FashionMNIST/raw", "FashionMNIST", "fashion-mnist", "fashion_mnist")
_FASHION_SIZE = (28, 28)
_CLASSES = 10
_IDX_UBYTE = 0x08
_IDX_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images (N, C, H, W) uint8 and their class labels (N,) int64."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def check_data(name: str, data: Path | None = None) -> None:
    """Check, without reading them, that the files of a named task are there.

    Args:
        name: One of `TASKS`.
        data: The data folder; None takes the environment variable NAS_DATA.

    Raises:
        ValueError: No task has this name.
        FileNotFoundError: The folder is not given or does not hold the files.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    if name != "digits":
        {"fashion-mnist": _find_fashion_mnist, "cifar10": _find_cifar10}[name](data)


def read_fashion_mnist(data: Path | None = None) -> tuple[LabelledImages, LabelledImages]:
    """Read Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): train and test, (N, 1, 28, 28).

    Reads the published IDX files, plain or .gz, from `data` or a usual folder below it.

    Raises:
        FileNotFoundError: The folder is not given or does not hold the four files.
        ValueError: A file is damaged or is not what its name says.
    """
    train_images, train_labels, test_images, test_labels = _find_fashion_mnist(data)
    return _fashion_part(train_images, train_labels), _fashion_part(test_images, test_labels)


def read_cifar10(data: Path | None = None) -> tuple[LabelledImages, LabelledImages]:
    """Read CIFAR-10 (Krizhevsky 2009): train and test, (N, 3, 32, 32).

    Reads the published binary or python batches, the latter without running what a pickle
    may ask for, from `data` or a usual folder below it.

    Raises:
        FileNotFoundError: The folder is not given or does not hold the six batches.
        ValueError: A batch is damaged, has another size than the rest, or is no CIFAR-10 batch.
    """
    paths = _find_cifar10(data)
    batches = [_cifar_batch(path) for path in paths]
    _check_equal_lengths(paths, batches)
    return _joined(batches[:-1]), batches[-1]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, plain or .gz.

    Raises:
        ValueError: Wrong magic number, or another length than the header says.
    """
    content = _content(path)
    if len(content) < 4 or content[:3] != bytes([0, 0, _IDX_UBYTE]) or content[3] == 0:
        raise ValueError(f"{path}: IDX magic must be 00 00 08 0n, got {content[:4].hex(' ')!r}")
    header = 4 + 4 * content[3]
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4))
    _check_length(path, shape, header, len(content))
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def stratified_split(
    labels: NDArray[np.int64], shares: Sequence[float], seed: int
) -> tuple[NDArray[np.int64], ...]:
    """Deal out the indices of `labels` so that every part has each class in the same share.

    Args:
        labels: Class labels (N,).
        shares: Share of every part; they sum to 1.
        seed: Of `numpy.random.default_rng`.

    Returns:
        Sorted indices of every part; together they are 0 .. N - 1, each once.
    """
    rng = np.random.default_rng(seed)
    ends = np.cumsum(shares)[:-1]
    by_class = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    cut = [np.split(one, np.rint(ends * len(one)).astype(int)) for one in by_class]
    return tuple(np.sort(np.concatenate(part)) for part in zip(*cut, strict=True))


def _find_fashion_mnist(data: Path | None) -> list[Path]:
    named = [(name, f"{name}.gz") for name in _FASHION_FILES]
    return _find("fashion-mnist", data, _FASHION_FOLDERS, [named])


def _find_cifar10(data: Path | None) -> list[Path]:
    forms = [[(name,) for name in _CIFAR_BIN], [(name,) for name in _CIFAR_BATCHES]]
    return _find("cifar10", data, _CIFAR_FOLDERS, forms)


def _find(
    task: str,
    data: Path | None,
    folders: Sequence[str],
    forms: Sequence[Sequence[tuple[str, ...]]],
) -> list[Path]:
    """Return the files of the first form that one of the folders holds whole.

    A form is a list of files, each with the names it may have.
    """
    wanted = " or ".join(f"{form[0][-1]} .. {form[-1][-1]}" for form in forms)
    root = _root(task, data, wanted)
    for folder in folders:
        for form in forms:
            found = list(_present(root / folder, form))
            if len(found) == len(form):
                return found
    below = ", ".join(folder for folder in folders if folder != ".")
    raise FileNotFoundError(
        f"{task}: {root} does not hold all of {wanted} ({len(forms[0])} files), nor do {below} "
        "below it; name the data folder by --data or NAS_DATA"
    )


def _root(task: str, data: Path | None, wanted: str) -> Path:
    named = data or os.environ.get("NAS_DATA")
    if not named:
        raise FileNotFoundError(
            f"{task}: no data folder given; name the one that holds {wanted} by --data or NAS_DATA"
        )
    return Path(named)


def _present(folder: Path, form: Sequence[tuple[str, ...]]) -> Iterator[Path]:
    for names in form:
        yield from [folder / name for name in names if (folder / name).is_file()][:1]


def _content(path: Path) -> bytes:
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content: bytes = file.read(_IDX_LIMIT_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from error
    return content


def _check_length(path: Path, shape: tuple[int, ...], header: int, length: int) -> None:
    expected = header + math.prod(shape)
    if length != expected:
        raise ValueError(
            f"{path}: IDX shape {shape} needs {expected} bytes, header included, got {length}"
        )


def _fashion_part(images: Path, labels: Path) -> LabelledImages:
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim != 3 or pixels.shape[1:] != _FASHION_SIZE or not len(pixels):
        raise ValueError(f"{images}: images must be (N, 28, 28) with N >= 1, got {pixels.shape}")
    if classes.shape != pixels.shape[:1]:
        raise ValueError(
            f"{labels}: needs one label per image {pixels.shape}, got {classes.shape}"
        )
    return LabelledImages(pixels[:, None], _checked_labels(labels, classes))


def _checked_labels(path: Path, labels: NDArray[Any]) -> NDArray[np.int64]:
    if labels.min() < 0 or labels.max() >= _CLASSES:
        raise ValueError(f"{path}: labels must be 0 .. 9, got {labels.min()} .. {labels.max()}")
    return labels.astype(np.int64)


def _cifar_batch(path: Path) -> LabelledImages:
    pixels, labels = (_binary_batch if path.suffix == ".bin" else _python_batch)(path)
    return LabelledImages(pixels.reshape(-1, *_CIFAR_SHAPE), _checked_labels(path, labels))


def _binary_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    record, content = 1 + math.prod(_CIFAR_SHAPE), np.fromfile(path, np.uint8)
    if not len(content) or len(content) % record:
        raise ValueError(f"{path}: needs whole records of {record} bytes, got {len(content)}")
    records = content.reshape(-1, record)
    return records[:, 1:], records[:, 0]


def _python_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    batch = _unpickled(path)
    pixels, labels = (batch.get(key, batch.get(key.encode())) for key in ("data", "labels"))
    width = math.prod(_CIFAR_SHAPE)
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8):
        raise ValueError(f"{path}: 'data' must be a uint8 array, got {_described(pixels)}")
    if pixels.ndim != 2 or pixels.shape[1] != width or not len(pixels):
        raise ValueError(f"{path}: 'data' must be (N, {width}) with N >= 1, got {pixels.shape}")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise ValueError(f"{path}: 'labels' must be a list of int, got {_described(labels)}")
    if len(labels) != len(pixels):
        raise ValueError(f"{path}: needs one label per image {pixels.shape}, got {len(labels)}")
    return pixels, np.array(labels)


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return type(value).__name__


def _unpickled(path: Path) -> Mapping[Any, Any]:
    with open(path, "rb") as file:
        try:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
        except Exception as error:  # a damaged pickle raises nearly anything
            raise ValueError(f"{path}: cannot be read as a CIFAR-10 batch: {error}") from error
    if not isinstance(batch, dict):
        raise ValueError(f"{path}: a CIFAR-10 batch must be a dict, got {_described(batch)}")
    return batch


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes must be written as latin1, got {encoding!r}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Makes plain containers and numpy arrays; whatever else a pickle names is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a numpy array: refused")
        return _ADMITTED[module, name]


def _check_equal_lengths(paths: Sequence[Path], batches: Sequence[LabelledImages]) -> None:
    for path, batch in zip(paths, batches, strict=True):
        if len(batch.labels) != len(batches[0].labels):
            raise ValueError(
                f"{path}: every CIFAR-10 batch has equally many images; {paths[0].name} has "
                f"{len(batches[0].labels)}, this one {len(batch.labels)}"
            )


def _joined(batches: Sequence[LabelledImages]) -> LabelledImages:
    images = np.concatenate([batch.images for batch in batches])
    return LabelledImages(images, np.concatenate([batch.labels for batch in batches]))
