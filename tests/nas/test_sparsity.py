from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.sparsity import (
    DENSE,
    NM,
    Block,
    Channel,
    Dense,
    Sparsity,
    Unstructured,
    admits,
    check,
    kept,
    mask,
    parse,
)

ratios = st.floats(0, 1, exclude_max=True)
small = st.integers(1, 4)
nms = st.tuples(small, small).map(lambda pair: NM(min(pair), max(pair)))
sparsities = st.one_of(
    st.just(Dense()),
    st.builds(Unstructured, ratios),
    nms,
    st.builds(Block, small, small, ratios),
    st.builds(Channel, ratios),
)


@st.composite
def shapes(draw: st.DrawFn, rows: int = 1, cols: int = 1) -> tuple[int, ...]:
    kernel = draw(st.lists(st.integers(1, 3), max_size=2))
    return (rows * draw(st.integers(1, 4)), cols * draw(st.integers(1, 4)), *kernel)


@st.composite
def scored(draw: st.DrawFn, rows: int = 1, cols: int = 1) -> torch.Tensor:
    """Scores from few levels, so that ties are common."""
    shape = draw(shapes(rows, cols))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return torch.randint(0, draw(st.integers(1, 20)), shape, generator=generator).float()


def best(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count])


def kept_indices(keep: torch.Tensor) -> set[int]:
    return set(keep.flatten().nonzero().flatten().tolist())


@given(sparsities)
def test_a_label_is_read_back_as_the_same_sparsity(sparsity: Sparsity) -> None:
    assert parse(sparsity.label) == sparsity
    assert hash(parse(sparsity.label)) == hash(sparsity)


@pytest.mark.parametrize(
    ("sparsity", "label", "ratio"),
    [
        (Dense(), "dense", 0),
        (Unstructured(0.9), "0.9", 0.9),
        (NM(2, 4), "2:4", 0.5),
        (NM(1, 4), "1:4", 0.75),
        (Block(4, 1, 0.9), "block4x1:0.9", 0.9),
        (Channel(0.5), "channel:0.5", 0.5),
    ],
)
def test_labels_are_short_and_the_ratio_is_that_of_zeros(
    sparsity: Sparsity, label: str, ratio: float
) -> None:
    assert sparsity.label == label
    assert sparsity.ratio == ratio


@pytest.mark.parametrize("label", ["", "1.0", "4:2", "block4:0.9", "channel:", "sparse", "nan"])
def test_a_label_that_is_none_is_named(label: str) -> None:
    with pytest.raises(ValueError, match=f"sparsity label '{label}'"):
        parse(label)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"Block: needs a ratio in \[0, 1\), got {ratio}"):
        Block(4, 1, ratio)


def test_impossible_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match=r"NM\(0, 4\): needs 0 < n <= m"):
        NM(0, 4)
    with pytest.raises(ValueError, match=r"rows and cols of at least 1, got rows=0, cols=1"):
        Block(0, 1, 0.5)


@pytest.mark.parametrize(
    ("sparsity", "shape", "reason"),
    [
        (NM(2, 4), (8, 30), "NM(2, 4) needs in_features divisible by 4, got 30"),
        (NM(2, 4), (8, 1, 3, 3), "NM(2, 4) needs in_channels / groups divisible by 4, got 1"),
        (NM(2, 4), (8,), "NM(2, 4) needs a weight of 2 or more dimensions, got 1"),
        (Block(4, 1, 0.9), (6, 8), "Block(4, 1, 0.9) needs out_features divisible by 4, got 6"),
        (Block(4, 3, 0.9), (8, 8), "Block(4, 3, 0.9) needs in_features divisible by 3, got 8"),
        (Unstructured(0.5), (0, 8), "Unstructured(0.5) needs a weight with elements"),
        (Unstructured(0.5), (7,), None),
        (Channel(0.5), (7, 3, 3, 3), None),
        (Dense(), (), None),
    ],
)
def test_a_shape_that_does_not_admit_a_pattern_is_told_why(
    sparsity: Sparsity, shape: tuple[int, ...], reason: str | None
) -> None:
    found = admits(sparsity, shape)
    if reason is None:
        assert found is None
        check(sparsity, shape, "layer")
    else:
        assert found is not None and found.startswith(reason)
        with pytest.raises(ValueError) as error:
            check(sparsity, shape, "layer")
        assert str(error.value) == f"layer: {found}"


@given(scored(), ratios)
def test_unstructured_keeps_exactly_the_best_with_ties_by_the_lower_index(
    scores: torch.Tensor, ratio: float
) -> None:
    keep = mask(scores, Unstructured(ratio))
    count = round((1 - ratio) * scores.numel())
    assert keep.dtype == torch.bool and keep.shape == scores.shape
    assert kept_indices(keep) == best(scores.flatten().tolist(), count)
    assert kept(Unstructured(ratio), scores.shape) == count


@given(scored(), ratios, ratios)
def test_masks_of_one_ranking_are_nested(scores: torch.Tensor, one: float, two: float) -> None:
    sparser, denser = sorted([one, two], reverse=True)
    assert not (mask(scores, Unstructured(sparser)) & ~mask(scores, Unstructured(denser))).any()


@given(scored(cols=4), st.integers(1, 4))
def test_nm_keeps_the_best_n_of_every_m_input_channels(scores: torch.Tensor, n: int) -> None:
    keep = mask(scores, NM(n, 4))
    rows = scores.movedim(1, -1).reshape(-1, 4).tolist()
    for row, found in zip(rows, keep.movedim(1, -1).reshape(-1, 4), strict=True):
        assert kept_indices(found) == best(row, n)
    assert int(keep.sum()) == kept(NM(n, 4), scores.shape)


@given(scored(rows=4, cols=2), ratios)
def test_blocks_are_kept_whole_and_are_the_best(scores: torch.Tensor, ratio: float) -> None:
    keep = mask(scores, Block(4, 2, ratio))
    shape = (scores.shape[0] // 4, scores.shape[1] // 2, *scores.shape[2:])
    sums, alive = torch.empty(shape), torch.empty(shape, dtype=torch.bool)
    for row in range(shape[0]):
        for col in range(shape[1]):
            place = (slice(4 * row, 4 * row + 4), slice(2 * col, 2 * col + 2))
            sums[row, col] = scores[place].sum((0, 1))
            alive[row, col] = keep[place].all(0).all(0)
            assert torch.equal(alive[row, col], keep[place].any(0).any(0))
    count = round((1 - ratio) * prod(shape))
    assert kept_indices(alive) == best(sums.flatten().tolist(), count)
    assert int(keep.sum()) == kept(Block(4, 2, ratio), scores.shape) == 8 * count


@given(scored(), ratios)
def test_channels_are_kept_whole_and_are_the_best(scores: torch.Tensor, ratio: float) -> None:
    rows = mask(scores, Channel(ratio)).reshape(len(scores), -1)
    assert torch.equal(rows.any(1), rows.all(1))
    sums = scores.reshape(len(scores), -1).sum(1).tolist()
    assert kept_indices(rows.all(1)) == best(sums, round((1 - ratio) * len(scores)))
    assert int(rows.sum()) == kept(Channel(ratio), scores.shape)


@given(scored(rows=4, cols=4))
def test_no_zeros_asked_for_keeps_everything(scores: torch.Tensor) -> None:
    for sparsity in (DENSE, Unstructured(0), NM(4, 4), Block(4, 4, 0), Channel(0)):
        assert mask(scores, sparsity).all()
        assert kept(sparsity, scores.shape) == scores.numel()


def test_a_vector_of_weights_can_be_unstructured_or_of_channels() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 4.0])
    for sparsity in (Unstructured(0.5), Channel(0.5)):
        assert mask(scores, sparsity).tolist() == [True, False, False, True]


def test_blocks_and_channels_are_scored_by_absolute_sums() -> None:
    scores = torch.tensor([[-3.0, -3.0], [2.0, 2.0]])
    assert mask(scores, Channel(0.5)).tolist() == [[True, True], [False, False]]
    assert mask(scores, Block(1, 2, 0.5)).tolist() == [[True, True], [False, False]]


def test_scores_of_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="got NaN"):
        mask(torch.tensor([1.0, float("nan")]), Unstructured(0.5))


def test_a_mask_of_a_shape_that_does_not_admit_it_is_refused() -> None:
    with pytest.raises(ValueError, match="mask: NM"):
        mask(torch.ones(4, 6), NM(2, 4))


@settings(max_examples=20)
@given(st.sampled_from([torch.float64, torch.float16, torch.bfloat16]), ratios)
def test_other_float_types_keep_the_same_counts(dtype: torch.dtype, ratio: float) -> None:
    scores = torch.rand(8, 8, 3, 3).to(dtype)
    for sparsity in (Unstructured(ratio), NM(2, 4), Block(4, 1, ratio), Channel(ratio)):
        assert int(mask(scores, sparsity).sum()) == kept(sparsity, scores.shape)
