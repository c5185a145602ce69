import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nas.masks import Mixture, attach, original, sparse_weights
from nas.recipes import (
    RECIPES,
    LearnedScores,
    Magnitude,
    OneShot,
    RandomMask,
    Recipe,
    recipe_from,
    to_json,
)
from nas.sparsity import DENSE, NM, Block, Channel, Sparsity, Unstructured, kept, mask

PATTERNS: tuple[Sparsity, ...] = (
    Unstructured(0.9),
    NM(1, 4),
    Block(4, 1, 0.5),
    Channel(0.25),
    DENSE,
)


def network(*sparsities: Sparsity) -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(16, 16) for _ in sparsities))
    for index, sparsity in enumerate(sparsities):
        attach(module, f"{index}.weight", (sparsity,))
    return module


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def counts(module: nn.Module) -> list[int]:
    return [int(m.sum()) for weight in sparse_weights(module).values() for m in weight.masks]


def targets(*sparsities: Sparsity) -> list[int]:
    return [kept(sparsity, (16, 16)) for sparsity in sparsities]


def masks(module: nn.Module) -> list[torch.Tensor]:
    return [weight.masks.clone() for weight in sparse_weights(module).values()]


def trained(recipe: Recipe, module: nn.Module, steps: int) -> nn.Module:
    """Trains with decay, so that magnitudes move as they do in earnest."""
    recipe.start(module, generator())
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05, weight_decay=0.05)
    for step in range(steps):
        recipe.step(module, step, steps - 1)
        optimiser.zero_grad()
        module(torch.randn(8, 16)).square().mean().backward()
        optimiser.step()
    recipe.finish(module)
    return module


@pytest.mark.parametrize("recipe", [kind() for kind in RECIPES.values()], ids=list(RECIPES))
@pytest.mark.parametrize("steps", [1, 7, 200])
def test_every_recipe_ends_at_the_targets(recipe: Recipe, steps: int) -> None:
    module = trained(recipe, network(*PATTERNS), steps)
    assert counts(module) == targets(*PATTERNS)


@given(st.integers(0, 400))
def test_the_gradual_schedule_is_cubic(step: int) -> None:
    module = network(Unstructured(0.9))
    recipe = Magnitude(begin=0.25, end=0.75, every=1 / 400)
    for earlier in range(step + 1):
        recipe.step(module, earlier, 400)
    progress = min(max((step / 400 - 0.25) / 0.5, 0), 1)
    expected = (1 - 0.9 * (1 - (1 - progress) ** 3)) * 256
    assert counts(module)[0] == pytest.approx(expected, abs=3)


def test_masks_change_in_stairs_and_stay_after_the_end() -> None:
    module = network(Unstructured(0.9))
    recipe = Magnitude(begin=0.0, end=0.5, every=0.1)
    changes, before = [], masks(module)
    for step in range(101):
        with torch.no_grad():
            original(module, "0.weight").normal_()
        recipe.step(module, step, 100)
        if not torch.equal(masks(module)[0], before[0]):
            changes.append(step)
        before = masks(module)
    assert changes == [0, 10, 20, 30, 40, 50]


def test_the_first_mask_is_open_and_pruning_takes_the_smallest_magnitudes() -> None:
    module = network(Unstructured(0.9))
    recipe = Magnitude()
    recipe.start(module, generator())
    assert counts(module) == [256]
    recipe.step(module, 75, 100)
    dense = original(module, "0.weight").abs()
    assert torch.equal(masks(module)[0][0].bool(), mask(dense.detach(), Unstructured(0.9)))


def test_nm_goes_down_from_m_one_by_one() -> None:
    module = network(NM(1, 4))
    recipe = Magnitude(end=1.0)
    seen: list[int] = []
    for step in range(101):
        recipe.step(module, step, 100)
        groups = set(masks(module)[0].reshape(-1, 4).sum(1).tolist())
        seen += groups - set(seen[-1:])
    assert seen == [4, 3, 2, 1]


def test_every_option_of_an_open_weight_follows_its_own_ratio() -> None:
    options = (DENSE, Unstructured(0.5), Unstructured(0.9), NM(2, 4))
    layer = nn.Linear(16, 16)
    attach(layer, "weight", options, "level", Mixture())
    recipe = Magnitude(end=1.0, every=0.5)
    recipe.start(layer, generator())
    assert counts(layer) == [256] * 4
    recipe.step(layer, 5, 10)
    half = [1 - 0.875 * option.ratio for option in options[:3]]
    assert counts(layer) == [*(round(density * 256) for density in half), 128]
    recipe.step(layer, 10, 10)
    assert counts(layer) == targets(*options)


def test_finishing_moves_no_mask_that_is_at_its_target() -> None:
    module = network(Unstructured(0.9))
    recipe = Magnitude(end=0.5)
    recipe.step(module, 50, 100)
    before = masks(module)
    with torch.no_grad():
        original(module, "0.weight").normal_()
    recipe.finish(module)
    assert torch.equal(masks(module)[0], before[0])


def test_one_shot_takes_the_magnitudes_of_the_start() -> None:
    module = network(*PATTERNS)
    for sparse in sparse_weights(module).values():
        sparse.masks.zero_()
    OneShot().start(module, generator())
    for index, sparsity in enumerate(PATTERNS):
        dense = original(module, f"{index}.weight").detach().abs()
        assert torch.equal(masks(module)[index][0].bool(), mask(dense, sparsity))


def test_random_masks_are_drawn_from_the_generator_alone_and_stay() -> None:
    first, second, third = (network(*PATTERNS) for _ in range(3))
    recipe = RandomMask()
    recipe.start(first, generator(1))
    torch.manual_seed(7)
    recipe.start(second, generator(1))
    recipe.start(third, generator(2))
    for index in range(4):
        assert torch.equal(masks(first)[index], masks(second)[index])
        assert not torch.equal(masks(first)[index], masks(third)[index])
    before = masks(first)
    trained_again = first(torch.randn(2, 16)).sum()
    trained_again.backward()
    recipe.step(first, 1, 2)
    recipe.finish(first)
    assert all(torch.equal(a, b) for a, b in zip(before, masks(first), strict=True))


def test_erk_replaces_the_ratios_and_keeps_the_total() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 16))
    attach(module, "0.weight", (Unstructured(0.5),))
    attach(module, "1.weight", (Unstructured(0.9),))
    attach(module, "2.weight", (NM(2, 4),))
    before = counts(module)
    RandomMask("erk").start(module, generator())
    after = counts(module)
    assert sum(after) == pytest.approx(sum(before), abs=1)
    assert after[2] == before[2]
    weights = list(sparse_weights(module).values())
    densities = [1 - weight.sparsities[0].ratio for weight in weights]
    assert densities[0] / densities[1] == pytest.approx((80 / 1024) / (128 / 4096))
    assert [kept(w.sparsities[0], w.masks.shape[1:]) for w in weights] == after


def test_uniform_gives_layers_one_ratio_and_an_unasked_recipe_leaves_their_own() -> None:
    module = network(Unstructured(0.5), Unstructured(0.9))
    RandomMask().start(module, generator())
    assert counts(module) == targets(Unstructured(0.5), Unstructured(0.9))
    RandomMask("uniform").start(module, generator())
    assert counts(module) == [77, 77]


def test_an_allocation_needs_closed_weights() -> None:
    layer = nn.Linear(16, 16)
    attach(layer, "weight", (DENSE, Unstructured(0.5)), "level")
    with pytest.raises(ValueError, match=r"needs closed weights, got open \['weight'\]"):
        RandomMask("erk").start(layer, generator())


def test_learned_scores_are_trained_and_then_frozen() -> None:
    module = network(Unstructured(0.5))
    recipe = LearnedScores()
    recipe.start(module, generator())
    names = [name for name, _ in module.named_parameters() if name.endswith("scores")]
    assert len(names) == 1
    scores = module.get_parameter(names[0])
    first = masks(trained(OneShot(), network(Unstructured(0.5)), 1))
    module(torch.ones(4, 16)).square().mean().backward()
    assert scores.grad is not None
    with torch.no_grad():
        scores.sub_(100 * scores.grad)
    recipe.finish(module)
    assert counts(module) == targets(Unstructured(0.5))
    assert not torch.equal(masks(module)[0], first[0])
    assert torch.equal(masks(module)[0][0].bool(), mask(scores.detach().abs(), Unstructured(0.5)))
    frozen = masks(module)[0]
    with torch.no_grad():
        scores.normal_()
    module(torch.ones(4, 16))
    assert torch.equal(masks(module)[0], frozen)


@pytest.mark.parametrize(
    "recipe", [Magnitude(0.1, 0.5, 0.02), OneShot(), RandomMask("erk"), LearnedScores()]
)
def test_a_recipe_survives_json(recipe: Recipe) -> None:
    again = recipe_from(**to_json(recipe))
    assert again == recipe and type(again) is type(recipe)


def test_bad_recipes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="needs one of magnitude, one_shot, random"):
        recipe_from("magic")
    with pytest.raises(ValueError, match=r"0 <= begin < end <= 1 .* got begin=0.5, end=0.5"):
        Magnitude(begin=0.5, end=0.5)
    with pytest.raises(ValueError, match="needs allocation uniform, erk or None, got 'lamp'"):
        RandomMask("lamp")
