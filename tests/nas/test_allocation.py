from math import prod

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nas.allocation import ALLOCATIONS, allocate
from nas.sparsity import Unstructured, kept

dims = st.integers(1, 12)
shape_lists = st.lists(
    st.one_of(st.tuples(dims, dims), st.tuples(dims, dims, st.just(3), st.just(3))),
    min_size=1,
    max_size=5,
)
ratios = st.floats(0, 0.99)


def named(shapes: list[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"layer{index}": shape for index, shape in enumerate(shapes)}


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("name", ALLOCATIONS)
@given(shape_lists, ratios)
def test_the_total_kept_is_the_budget_and_every_ratio_is_legal(
    name: str, shape_list: list[tuple[int, ...]], ratio: float
) -> None:
    shapes = named(shape_list)
    total = sum(map(prod, shapes.values()))
    assume(round((1 - ratio) * total) >= len(shapes))
    found = allocate(name, shapes, ratio, drawn(shapes))
    assert found.keys() == shapes.keys()
    assert all(0 <= share < 1 for share in found.values())
    keep = sum(kept(Unstructured(found[key]), shape) for key, shape in shapes.items())
    assert abs(keep - (1 - ratio) * total) <= 0.5 * len(shapes) + 1e-6


def test_uniform_gives_every_weight_the_same_ratio() -> None:
    assert allocate("uniform", {"a": (4, 4), "b": (2, 8, 3, 3)}, 0.9) == {"a": 0.9, "b": 0.9}


def test_erk_densities_follow_the_sum_over_the_product_of_the_dimensions() -> None:
    shapes = {"conv": (64, 32, 3, 3), "fc": (100, 400)}
    found = allocate("erk", shapes, 0.9)
    expected = (64 + 32 + 3 + 3) / prod(shapes["conv"]) / ((100 + 400) / prod(shapes["fc"]))
    assert (1 - found["conv"]) / (1 - found["fc"]) == pytest.approx(expected)


def test_erk_leaves_a_small_layer_dense_and_spreads_its_excess() -> None:
    shapes = {"stem": (4, 2, 1, 1), "wide": (100, 200), "wider": (200, 200)}
    found = allocate("erk", shapes, 0.5)
    assert found["stem"] == 0
    densities = (1 - found["wide"], 1 - found["wider"])
    assert densities[0] / densities[1] == pytest.approx((300 / 20000) / (400 / 40000))


def test_global_keeps_the_largest_magnitudes_of_the_network() -> None:
    weights = {"a": torch.tensor([[1.0, -8.0], [7.0, 6.0]]), "b": torch.tensor([[5.0, 2.0]])}
    shapes = {"a": (2, 2), "b": (1, 2)}
    assert allocate("global", shapes, 1 / 3, weights) == {"a": 0.25, "b": 0.5}


def test_global_leaves_no_weight_without_an_element() -> None:
    weights = {"big": torch.full((10, 10), 9.0), "small": torch.full((10, 10), 0.1)}
    found = allocate("global", {"big": (10, 10), "small": (10, 10)}, 0.9, weights)
    assert found == pytest.approx({"big": 0.81, "small": 0.99})


def test_lamp_scores_do_not_depend_on_the_scale_of_a_layer() -> None:
    shapes = {"a": (8, 8), "b": (8, 4, 3, 3)}
    weights = drawn(shapes)
    scaled = weights | {"a": 1000 * weights["a"]}
    assert allocate("lamp", shapes, 0.8, weights) == allocate("lamp", shapes, 0.8, scaled)


def test_lamp_keeps_what_its_formula_ranks_highest() -> None:
    weights = {"a": torch.tensor([[3.0, 2.0, 1.0]]), "b": torch.ones(1, 4)}
    # scores of a: 1, 4/13, 1/14; of b: 1, 1/2, 1/3, 1/4
    assert allocate("lamp", {"a": (1, 3), "b": (1, 4)}, 3 / 7, weights) == pytest.approx(
        {"a": 2 / 3, "b": 1 / 4}
    )


def test_bad_requests_are_refused_by_name() -> None:
    shapes = {"a": (2, 2)}
    with pytest.raises(ValueError, match="needs one of uniform, erk, global, lamp, got 'even'"):
        allocate("even", shapes, 0.5)
    with pytest.raises(ValueError, match=r"needs a ratio in \[0, 1\), got 1.0"):
        allocate("uniform", shapes, 1.0)
    with pytest.raises(ValueError, match="'lamp': needs the weights, got None"):
        allocate("lamp", shapes, 0.5)
    with pytest.raises(ValueError, match=r"needs a of shape \(2, 2\), got \(3, 2\)"):
        allocate("global", shapes, 0.5, {"a": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="one element for each of 1 weights"):
        allocate("global", shapes, 0.99, {"a": torch.ones(2, 2)})
