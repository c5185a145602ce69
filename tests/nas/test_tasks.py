import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nas.images import Normalise
from nas.tasks import (
    Metric,
    Split,
    Task,
    binomial_interval,
    cifar10,
    classification_error,
    cross_entropy,
    digits,
    fashion_mnist,
    load_task,
)
from tests.data_for_tests import write_cifar_bin, write_fashion
from tests.tasks_for_tests import (
    next_character_network,
    next_character_task,
    regression_task,
    train_network,
)

real_data = pytest.mark.skipif("NAS_DATA" not in os.environ, reason="NAS_DATA is not set")
MAKERS: list[Callable[[], Task]] = [digits, regression_task, next_character_task]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered_task(n: int, **changes: object) -> Task:
    """Example i of train has input and target i, of validation 1000 + i, of test 2000 + i."""
    parts = [torch.arange(n, dtype=torch.float32)[:, None] + 1000 * part for part in range(3)]
    train, validation, test = (Split(part, part) for part in parts)
    task = Task("numbered", train, validation, test, nn.functional.mse_loss, {}, (), outputs=1)
    return replace(task, **changes)  # type: ignore[arg-type]


def add_one(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + 1


def halve(inputs: Tensor) -> Tensor:
    return inputs / 2


class Shouting(nn.Module):
    """Passes its input through, and says how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(1).eval()
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled()))
        return inputs


def test_a_split_of_unequal_or_no_examples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"same first dimension.*\(3, 2\) and \(4,\)"):
        Split(torch.zeros(3, 2), torch.zeros(4))
    with pytest.raises(ValueError, match=r"at least 1, got \(0, 2\) and \(0,\)"):
        Split(torch.zeros(0, 2), torch.zeros(0))


def test_a_subset_keeps_inputs_and_targets_together() -> None:
    split = Split(torch.arange(5.0)[:, None], torch.arange(5))
    subset = split.subset(torch.tensor([4, 1]))
    assert subset.inputs.tolist() == [[4.0], [1.0]]
    assert subset.targets.tolist() == [4, 1]
    assert (len(split), len(subset)) == (5, 2)


@pytest.mark.parametrize("names", [[], ["error", "other"], ["error", "error"], ["rmse"]])
def test_metrics_and_measures_must_have_the_same_names(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"got metrics .* and measures \['error'\]"):
        replace(digits(), metrics=tuple(Metric(name) for name in names))


def test_no_measure_may_be_called_loss() -> None:
    with pytest.raises(ValueError, match="none of them 'loss'"):
        numbered_task(2, measures={"loss": classification_error}, metrics=(Metric("loss"),))


@given(n=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.none() | st.integers(0, 99))
def test_batches_hold_every_example_once(n: int, batch_size: int, seed: int | None) -> None:
    generator = None if seed is None else seeded(seed)
    batches = list(numbered_task(n).batches("validation", batch_size, generator))
    assert [len(inputs) for inputs, _ in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1][0]) <= batch_size
    seen = torch.cat([inputs for inputs, _ in batches])
    assert sorted(seen.flatten().tolist()) == [1000 + i for i in range(n)]
    assert torch.equal(seen, torch.cat([targets for _, targets in batches]))


def test_only_a_generator_shuffles_and_equal_seeds_shuffle_equally() -> None:
    def order(generator: torch.Generator | None) -> list[float]:
        batches = numbered_task(50).batches("train", 8, generator)
        return torch.cat([inputs for inputs, _ in batches]).flatten().tolist()

    assert order(None) == list(range(50))
    assert order(seeded(1)) == order(seeded(1)) != order(seeded(2))
    generator = seeded(1)
    assert order(generator) != order(generator)


def test_only_shuffled_training_batches_are_augmented() -> None:
    task = numbered_task(4, augment=add_one)
    for part in ("train", "validation", "test"):
        for generator in (None, seeded()):
            inputs, targets = next(task.batches(part, 4, generator))
            augmented = part == "train" and generator is not None
            assert torch.equal(inputs, targets + 1 if augmented else targets)


def test_every_batch_and_the_example_are_prepared_after_augmentation() -> None:
    task = numbered_task(4, augment=add_one, prepare=halve)
    inputs, targets = next(task.batches("train", 4, seeded()))
    assert torch.equal(inputs, (targets + 1) / 2)
    inputs, targets = next(task.batches("test", 4))
    assert torch.equal(inputs, targets / 2)
    assert task.example_input().tolist() == [[0.0], [0.5]]


def test_what_a_network_does_to_its_batch_leaves_the_task_alone() -> None:
    task = numbered_task(4)
    for inputs, targets in task.batches("train", 2):
        inputs.zero_()
        targets.zero_()
    task.example_input().sub_(5)
    assert task.train.inputs.flatten().tolist() == [0, 1, 2, 3]
    assert task.train.targets.flatten().tolist() == [0, 1, 2, 3]


def test_wrong_parts_and_sizes_fail_before_the_first_batch() -> None:
    task = digits()
    with pytest.raises(ValueError, match="train, validation, test, got 'dev'"):
        task.batches("dev", 8)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        task.batches("train", 0)
    for batch in (0, 1079):
        with pytest.raises(ValueError, match=rf"example batch must be 1 \.\. 1078, got {batch}"):
            task.example_input(batch)


def test_the_example_input_comes_from_train() -> None:
    assert numbered_task(9).example_input(3).flatten().tolist() == [0, 1, 2]
    assert digits().example_input().shape == (2, 1, 8, 8)


def test_evaluating_runs_in_eval_mode_without_gradients_and_puts_every_mode_back() -> None:
    network = Shouting()
    numbered_task(5).evaluate(network, batch_size=2)
    assert network.calls == [(False, False)] * 3
    assert network.training and not network.frozen.training


def test_the_modes_are_put_back_after_a_network_has_failed() -> None:
    network = nn.Sequential(nn.Linear(7, 7))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        numbered_task(5).evaluate(network)
    assert network.training and network[0].training


@pytest.mark.parametrize(("part", "offset"), [("train", 0), ("validation", 1000), ("test", 2000)])
def test_evaluating_reads_the_part_it_is_told(part: str, offset: int) -> None:
    task = numbered_task(
        3,
        measures={"largest": lambda outputs, targets: outputs.max().item()},
        metrics=(Metric("largest", direction="maximize"),),
    )
    assert task.evaluate(nn.Identity(), part) == {"largest": offset + 2, "loss": 0.0}


def test_search_never_sees_test_unless_asked() -> None:
    poisoned = numbered_task(3)
    poisoned = replace(poisoned, test=Split(*[torch.full((3, 1), torch.nan)] * 2))
    assert poisoned.evaluate(nn.Identity())["loss"] == 0.0
    assert poisoned.example_input().isfinite().all()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
def test_measures_and_loss_do_not_depend_on_the_batch_size(
    make: Callable[[], Task], batch_size: int
) -> None:
    task, network = make(), network_for(make())
    whole = task.evaluate(network, batch_size=len(task.validation))
    assert task.evaluate(network, batch_size=batch_size) == pytest.approx(whole, rel=1e-4)
    assert set(whole) == {metric.name for metric in task.metrics} | {"loss"}


def test_outputs_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"last dimension must be 10, got outputs .*\(360, 64\)"):
        digits().evaluate(nn.Flatten())


def network_for(task: Task) -> nn.Module:
    torch.manual_seed(0)
    if task.name == "next-character":
        return next_character_network()
    width = task.example_input().flatten(1).shape[1]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, task.outputs)
    )


@pytest.mark.parametrize(
    ("make", "epochs", "metric", "reached"),
    [
        (digits, 6, "error", lambda error: error < 0.08),
        (regression_task, 60, "r2", lambda r2: r2 > 0.85),
        (next_character_task, 16, "error", lambda error: error < 0.25),
    ],
)
def test_tasks_of_every_kind_are_learned_by_one_loop(
    make: Callable[[], Task], epochs: int, metric: str, reached: Callable[[float], bool]
) -> None:
    task, network = make(), network_for(make())
    before = task.evaluate(network, "test")
    train_network(network, task, epochs)
    after = task.evaluate(network, "test")
    assert not reached(before[metric])
    assert reached(after[metric])
    assert after["loss"] < before["loss"] / 2


def test_resplitting_cuts_train_in_two_by_its_seed() -> None:
    task = numbered_task(10)
    first, second = task.resplit((0.7, 0.3), seed=3)
    assert (len(first), len(second)) == (7, 3)
    assert sorted(torch.cat([first.inputs, second.inputs]).flatten().tolist()) == list(range(10))
    assert torch.equal(first.inputs, first.targets)
    assert torch.equal(task.resplit((0.7, 0.3), seed=3)[0].inputs, first.inputs)
    assert not torch.equal(task.resplit((0.7, 0.3), seed=4)[0].inputs, first.inputs)


def test_the_halves_make_the_task_of_a_bilevel_search() -> None:
    weights, architecture = digits().resplit((0.5, 0.5), seed=0)
    task = replace(digits(), train=weights, validation=architecture)
    assert (len(task.train), len(task.validation)) == (539, 539)
    assert next(task.batches("validation", 64, seeded()))[0].shape == (64, 1, 8, 8)


@pytest.mark.parametrize("parts", [(0.5, 0.6), (1.0, 0.0), (-0.5, 1.5), (0.2, 0.2)])
def test_parts_that_are_no_shares_of_a_whole_are_refused(parts: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"parts must be positive and sum to 1, got \("):
        digits().resplit(parts, seed=0)


@pytest.mark.parametrize("make", MAKERS)
def test_a_task_travels_to_a_worker_as_a_pickle(make: Callable[[], Task]) -> None:
    task, network = make(), network_for(make())
    arrived: Task = pickle.loads(pickle.dumps(task))
    assert arrived.evaluate(network) == task.evaluate(network)


def test_digits_are_normalised_and_split_60_20_20_in_every_class() -> None:
    task = digits()
    assert [len(part) for part in (task.train, task.validation, task.test)] == [1078, 360, 359]
    assert task.train.inputs.dtype == torch.float32
    assert task.train.inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert task.train.inputs.std().item() == pytest.approx(1, abs=1e-5)
    assert task.validation.targets.bincount(minlength=10).min() >= 34
    assert task.test.targets.bincount(minlength=10).min() >= 34
    whole = torch.cat([part.inputs for part in (task.train, task.validation, task.test)])
    assert len(torch.unique(whole.flatten(1), dim=0)) == 1797


def test_the_seed_draws_the_parts() -> None:
    assert torch.equal(digits(1).train.inputs, digits(1).train.inputs)
    assert not torch.equal(digits(1).train.targets, digits(2).train.targets)


def test_images_stay_bytes_and_are_normalised_by_what_train_holds(tmp_path: Path) -> None:
    write_fashion(tmp_path, n=100)
    task = fashion_mnist(tmp_path)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [90, 10, 100]
    assert task.validation.targets.bincount(minlength=10).tolist() == [1] * 10
    assert task.train.inputs.dtype == torch.uint8
    inputs, _ = next(task.batches("train", 90))
    assert inputs.dtype == torch.float32
    assert inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert inputs.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_the_published_test_part_is_the_test_part_whatever_the_seed(tmp_path: Path) -> None:
    write_cifar_bin(tmp_path, n=20)
    one, other = cifar10(tmp_path, seed=0), cifar10(tmp_path, seed=1)
    assert torch.equal(one.test.inputs, other.test.inputs)
    assert not torch.equal(one.validation.inputs, other.validation.inputs)
    assert [len(part) for part in (one.train, one.validation, one.test)] == [90, 10, 20]


def test_cifar_10_is_augmented_and_fashion_mnist_is_not(tmp_path: Path) -> None:
    write_cifar_bin(tmp_path, n=20)
    write_fashion(tmp_path, n=100)
    for task, augmented in ((cifar10(tmp_path), True), (fashion_mnist(tmp_path), False)):
        plain = torch.cat([inputs for inputs, _ in task.batches("train", 32)])
        shuffled = torch.cat([inputs for inputs, _ in task.batches("train", 32, seeded())])
        assert shuffled.shape == plain.shape
        same = torch.equal(*(torch.unique(one.flatten(1), dim=0) for one in (plain, shuffled)))
        assert same != augmented


def test_a_task_is_loaded_by_its_name() -> None:
    assert load_task("digits", seed=3).name == "digits"
    with pytest.raises(ValueError, match="digits, fashion-mnist, cifar10, got 'mnist'"):
        load_task("mnist")


def test_a_task_without_its_data_says_what_is_missing(tmp_path: Path) -> None:
    for name in ("fashion-mnist", "cifar10"):
        with pytest.raises(FileNotFoundError, match=f"{name}: .*--data or NAS_DATA"):
            load_task(name, tmp_path)


def test_error_and_cross_entropy_count_every_position_of_a_sequence() -> None:
    outputs = torch.tensor([[[5.0, 0.0], [5.0, 0.0]], [[0.0, 5.0], [0.0, 5.0]]])
    targets = torch.tensor([[0, 1], [1, 1]])
    assert classification_error(outputs, targets) == 0.25
    assert classification_error(outputs[:, 0], targets[:, 0]) == 0.0
    low, high = (nn.functional.softplus(torch.tensor(x)) for x in (-5.0, 5.0))
    torch.testing.assert_close(cross_entropy(outputs, targets), (3 * low + high) / 4)


@pytest.mark.parametrize(
    ("error", "n", "expected"),
    [
        (0.0, 10, (0.0, 0.27753)),
        (0.5, 10, (0.23659, 0.76341)),
        (0.1, 1000, (0.08291, 0.12015)),
        (1.0, 10, (0.72247, 1.0)),
    ],
)
def test_wilson_intervals_of_known_counts(
    error: float, n: int, expected: tuple[float, float]
) -> None:
    assert binomial_interval(error, n) == pytest.approx(expected, abs=1e-4)


@given(error=st.floats(0, 1), n=st.integers(1, 10**6), confidence=st.floats(0.5, 0.999))
def test_an_interval_holds_its_error_and_narrows_with_more_examples(
    error: float, n: int, confidence: float
) -> None:
    low, high = binomial_interval(error, n, confidence)
    assert 0 <= low <= error + 1e-12 and error - 1e-12 <= high <= 1
    finer = binomial_interval(error, 4 * n, confidence)
    assert finer[1] - finer[0] < high - low
    mirrored = binomial_interval(1 - error, n, confidence)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize(
    ("error", "n", "confidence"), [(-0.1, 5, 0.9), (1.1, 5, 0.9), (0.5, 0, 0.9), (0.5, 5, 1.0)]
)
def test_an_interval_of_nothing_is_refused(error: float, n: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=f"got {error}, {n} and {confidence}"):
        binomial_interval(error, n, confidence)


@real_data
@pytest.mark.parametrize(
    ("name", "sizes", "shape", "mean"),
    [
        ("fashion-mnist", (54000, 6000, 10000), (1, 28, 28), [0.286]),
        ("cifar10", (45000, 5000, 10000), (3, 32, 32), [0.4914, 0.4822, 0.4465]),
    ],
)
def test_real_tasks_have_their_sizes_and_known_statistics(
    name: str, sizes: tuple[int, ...], shape: tuple[int, ...], mean: list[float]
) -> None:
    task = load_task(name)
    assert tuple(len(part) for part in (task.train, task.validation, task.test)) == sizes
    assert set(task.validation.targets.bincount().tolist()) == {sizes[1] // 10}
    assert isinstance(task.prepare, Normalise)
    assert [one / 255 for one in task.prepare.mean] == pytest.approx(mean, abs=2e-3)
    assert next(task.batches("train", 16, seeded()))[0].shape == (16, *shape)


@real_data
def test_a_linear_network_learns_real_fashion_mnist() -> None:
    task = load_task("fashion-mnist")
    small = replace(task, train=task.train.subset(torch.arange(4000)))
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    train_network(network, small, epochs=2, learning_rate=1e-3)
    assert task.evaluate(network)["error"] < 0.25
