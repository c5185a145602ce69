"""A task: batches of three parts, a loss, and metrics with unit and direction."""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nas.data import (
    TASKS,
    LabelledImages,
    check_data,
    read_cifar10,
    read_fashion_mnist,
    stratified_split,
)
from nas.images import Normalise, crop_and_flip

__all__ = [
    "TASKS",
    "Metric",
    "Split",
    "Task",
    "binomial_interval",
    "cifar10",
    "classification_error",
    "cross_entropy",
    "digits",
    "fashion_mnist",
    "load_task",
]

_PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Metric:
    """What a number is: its name, its unit ("" for none) and which way is better."""

    name: str
    unit: str = ""
    direction: Literal["minimize", "maximize"] = "minimize"


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a task, in memory: inputs (N, ...) and their targets (N, ...)."""

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets) or not len(self.inputs):
            raise ValueError(
                "Split: inputs and targets need the same first dimension, at least 1, got "
                f"{tuple(self.inputs.shape)} and {tuple(self.targets.shape)}"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, indices: Tensor) -> "Split":
        """Return a copy of the examples at `indices` (M,) int64, in that order."""
        return Split(self.inputs[indices], self.targets[indices])


@dataclass(frozen=True, eq=False)
class Task:
    """What a network is trained and judged on.

    A search reads train and validation; test is for the report and the final front.

    Attributes:
        name: Named in logs and errors.
        train: Examples that weights are trained on.
        validation: Examples that architectures are compared on.
        test: Examples that nothing is chosen by.
        loss: Differentiable scalar, a mean over examples, of (outputs, targets).
        measures: Functions of (outputs, targets), each called once with those of a whole part.
        metrics: What the measures are; the same names. "loss" is taken: `evaluate` adds it.
        outputs: Size of the network's last dimension: classes, or regression targets.
        prepare: Turns stored inputs into what the network reads, batch by batch and in every
            part, so that images may be stored as bytes; None gives them as they are stored.
        augment: Random change of stored inputs, before `prepare`, in shuffled training
            batches only.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    loss: Callable[[Tensor, Tensor], Tensor]
    measures: Mapping[str, Callable[[Tensor, Tensor], float]]
    metrics: tuple[Metric, ...]
    outputs: int
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    prepare: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        described = [metric.name for metric in self.metrics]
        if sorted(described) != sorted(self.measures) or "loss" in described:
            raise ValueError(
                f"Task {self.name}: metrics must describe each of the measures once, none of them "
                f"'loss'; got metrics {described} and measures {list(self.measures)}"
            )

    def example_input(self, batch: int = 2) -> Tensor:
        """Return the first `batch` training inputs as a network reads them, (batch, ...)."""
        if not 1 <= batch <= len(self.train):
            raise ValueError(
                f"Task {self.name}: example batch must be 1 .. {len(self.train)}, got {batch}"
            )
        return self._prepared(self.train.inputs[:batch].clone())

    def batches(
        self,
        part: str,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go once through a part in batches of (inputs, targets); the last may be smaller.

        Args:
            part: "train", "validation" or "test".
            batch_size: Examples in a batch.
            generator: A CPU generator that shuffles, and augments if the part is "train";
                None keeps the stored order and examples.
            device: Where the batches are wanted.

        Raises:
            ValueError: No such part, or a batch size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"Task {self.name}: batch_size must be at least 1, got {batch_size}")
        return self._batches(self._part(part), part == "train", batch_size, generator, device)

    def evaluate(
        self,
        network: nn.Module,
        part: str = "validation",
        device: str | torch.device = "cpu",
        batch_size: int = 512,
    ) -> dict[str, float]:
        """Return every measure and "loss" of a network over a whole part.

        The network, already on `device`, runs in eval mode and without gradients; the training
        mode of each of its modules is put back afterwards.

        Raises:
            ValueError: No such part, or outputs whose last dimension is not `self.outputs`.
        """
        training = {module: module.training for module in network.modules()}
        network.eval()
        try:
            outputs, targets = self._predicted(network, part, device, batch_size)
        finally:
            for module, mode in training.items():
                module.training = mode
        measured = {name: float(of(outputs, targets)) for name, of in self.measures.items()}
        return measured | {"loss": float(self.loss(outputs, targets))}

    def resplit(self, parts: tuple[float, float], seed: int) -> tuple[Split, Split]:
        """Cut train in two at random, as bilevel search wants it: weights, then architecture.

        `dataclasses.replace(task, train=first, validation=second)` is the task of that search.

        Args:
            parts: The share of each; they sum to 1.
            seed: Of the cut.

        Raises:
            ValueError: Shares that are not positive or do not sum to 1, or an empty part.
        """
        if min(parts) <= 0 or abs(sum(parts) - 1) > 1e-9:
            raise ValueError(f"Task {self.name}: parts must be positive and sum to 1, got {parts}")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        cut = round(parts[0] * len(self.train))
        return self.train.subset(order[:cut]), self.train.subset(order[cut:])

    def _part(self, part: str) -> Split:
        if part not in _PARTS:
            raise ValueError(
                f"Task {self.name}: part must be one of {', '.join(_PARTS)}, got {part!r}"
            )
        return {"train": self.train, "validation": self.validation, "test": self.test}[part]

    def _prepared(self, inputs: Tensor) -> Tensor:
        return inputs if self.prepare is None else self.prepare(inputs)

    def _batches(
        self,
        split: Split,
        training: bool,
        batch_size: int,
        generator: torch.Generator | None,
        device: str | torch.device,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(split)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        for chunk in torch.split(order, batch_size):
            inputs = split.inputs[chunk]
            if training and generator is not None and self.augment is not None:
                inputs = self.augment(inputs, generator)
            yield self._prepared(inputs.to(device)), split.targets[chunk].to(device)

    @torch.no_grad()
    def _predicted(
        self, network: nn.Module, part: str, device: str | torch.device, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        outputs, targets = [], []
        for inputs, target in self.batches(part, batch_size, device=device):
            outputs.append(network(inputs).cpu())
            targets.append(target.cpu())
        if outputs[0].shape[-1] != self.outputs:
            raise ValueError(
                f"Task {self.name}: the network's last dimension must be {self.outputs}, "
                f"got outputs of shape {tuple(outputs[0].shape)}"
            )
        return torch.cat(outputs), torch.cat(targets)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits (N, ..., K) against classes (N, ...) int64."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def classification_error(outputs: Tensor, targets: Tensor) -> float:
    """Share of wrong predictions of logits (N, ..., K) against classes (N, ...) int64."""
    return (outputs.argmax(dim=-1) != targets).double().mean().item()


def binomial_interval(error: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of an error rate seen on `n` independent examples.

    Wilson 1927, "Probable inference, the law of succession, and statistical inference",
    Journal of the American Statistical Association 22.

    Raises:
        ValueError: An error outside 0 .. 1, n below 1, or a confidence not inside 0 .. 1.
    """
    if not (0 <= error <= 1 and n >= 1 and 0 < confidence < 1):
        raise ValueError(
            "binomial_interval: needs error in [0, 1], n >= 1 and confidence in (0, 1), got "
            f"{error}, {n} and {confidence}"
        )
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (error + z * z / (2 * n)) / (1 + z * z / n)
    spread = z / (1 + z * z / n) * (error * (1 - error) / n + (z / (2 * n)) ** 2) ** 0.5
    return max(0.0, centre - spread), min(1.0, centre + spread)


def digits(seed: int = 0) -> Task:
    """Handwritten digits of scikit-learn, (N, 1, 8, 8) float32, normalised: 1797 in 60/20/20."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    parts = [torch.from_numpy(one) for one in stratified_split(labels, (0.6, 0.2, 0.2), seed)]
    deviation, mean = torch.std_mean(images[parts[0]])
    whole = Split((images - mean) / deviation, torch.from_numpy(labels))
    return _image_task("digits", [whole.subset(part) for part in parts])


def fashion_mnist(data: Path | None = None, seed: int = 0) -> Task:
    """Fashion-MNIST, (N, 1, 28, 28): 54000 train, 6000 validation, the published 10000 test.

    Args:
        data: The data folder; None takes the environment variable NAS_DATA.
        seed: Draws the validation part from the published training part, stratified.

    Raises:
        FileNotFoundError: The folder is not given or does not hold the files.
        ValueError: A file is damaged.
    """
    return _byte_task("fashion-mnist", *read_fashion_mnist(data), seed)


def cifar10(data: Path | None = None, seed: int = 0) -> Task:
    """CIFAR-10, (N, 3, 32, 32): 45000 train, 5000 validation, the published 10000 test.

    Args:
        data: The data folder; None takes the environment variable NAS_DATA.
        seed: Draws the validation part from the published training part, stratified.

    Raises:
        FileNotFoundError: The folder is not given or does not hold the files.
        ValueError: A file is damaged.
    """
    return _byte_task("cifar10", *read_cifar10(data), seed, crop_and_flip)


def load_task(name: str, data: Path | None = None, seed: int = 0) -> Task:
    """Make the task of a name in `TASKS`; digits comes with scikit-learn and reads no folder.

    Raises:
        ValueError: No task has this name, or a file is damaged.
        FileNotFoundError: The folder is not given or does not hold the files.
    """
    check_data(name, data)
    if name == "digits":
        return digits(seed)
    return {"fashion-mnist": fashion_mnist, "cifar10": cifar10}[name](data, seed)


def _byte_task(
    name: str,
    published_train: LabelledImages,
    published_test: LabelledImages,
    seed: int,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> Task:
    train, validation = stratified_split(published_train.labels, (0.9, 0.1), seed)
    test = np.arange(len(published_test.labels))
    parts = [
        _split(published_train, train),
        _split(published_train, validation),
        _split(published_test, test),
    ]
    return _image_task(name, parts, augment, Normalise.of(parts[0].inputs))


def _split(part: LabelledImages, indices: NDArray[np.int64]) -> Split:
    images, labels = part.images[indices], part.labels[indices]
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _image_task(
    name: str,
    parts: Sequence[Split],
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> Task:
    train, validation, test = parts
    return Task(
        name=name,
        train=train,
        validation=validation,
        test=test,
        loss=cross_entropy,
        measures={"error": classification_error},
        metrics=(Metric("error"),),
        outputs=10,
        augment=augment,
        prepare=prepare,
    )
