"""The laws of DESIGN.md 6 for every plugin, and DivPrune against its definition in float64; others: test_plugins.py."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support.features import (
    beside,
    cosine_distances,
    distinct,
    greedy_values,
    pictures,
    row_counts,
    scatter_images,
    seeds,
    select,
)
from torch import Tensor

from tinyspeed import UserError, pruning

every_plugin = pytest.mark.parametrize("name", pruning.names())


# The laws that hold for every plugin


@every_plugin
@given(pictures(), st.data())
def test_exactly_k_rows_are_kept_ascending_unique_and_in_range(name, features, data):
    count = data.draw(row_counts(features))
    index = select(name, features, count=count)
    assert index.dtype == torch.int64
    assert index.shape == (len(features), count)
    assert (index.diff(dim=1) > 0).all()  # strictly ascending, so unique
    assert index.min() >= 0
    assert index.max() < features.shape[1]


@every_plugin
@given(pictures(), st.floats(0.001, 1))
def test_a_share_keeps_its_floor_and_at_least_one_row(name, features, keep):
    n = features.shape[1]
    index = select(name, features, keep=keep)
    # A hair of share is forgiven, so that 0.1 * 30 = 2.9999999999999996 means 3.
    assert index.shape[1] == max(1, math.floor(n * keep + 1e-6))


@pytest.mark.parametrize(("keep", "n", "k"), [(0.1, 576, 57), (0.1, 30, 3), (0.7, 10, 7), (0.01, 9, 1), (1, 9, 9)])
def test_k_rounds_down_but_forgives_float_dust(keep, n, k):
    assert pruning.keep_count(keep, n) == k
    assert select("grid", torch.ones(1, n, 1), keep=keep).shape == (1, k)


@every_plugin
@given(pictures())
def test_keeping_all_is_the_identity(name, features):
    everything = torch.arange(features.shape[1]).expand(features.shape[:2])
    assert torch.equal(select(name, features, keep=1.0), everything)


@pytest.mark.parametrize("name", [name for name in pruning.names() if name != "divprune"])
@given(pictures(max_images=4), st.data())
def test_a_batch_equals_its_images_one_by_one(name, features, data):
    """(DivPrune leaves it to rounding which of several copies it takes: `test_a_ragged_batch_equals_its_images_alone`
    asks this of rows that differ, and `test_divprune_picks_greedily_ties_or_not` of the others what can be asked.)"""
    count = data.draw(row_counts(features))
    alone = [select(name, image[None], count=count) for image in features]
    assert torch.equal(select(name, features, count=count), torch.cat(alone))


@every_plugin
@given(seeds, st.lists(st.integers(1, 24), min_size=1, max_size=4), st.integers(0, 6), st.floats(0.05, 1))
def test_with_a_mask_each_image_has_its_own_k_and_padding_is_never_kept(name, seed, sizes, padding, keep):
    images = [distinct(seed + i, n, 6) for i, n in enumerate(sizes)]
    features, mask, places = scatter_images(images, max(sizes) + padding, seed)
    index, counts = select(name, features, keep=keep, mask=mask)
    assert counts.tolist() == [max(1, math.floor(n * keep + 1e-6)) for n in sizes]
    assert index.shape == (len(sizes), max(counts.tolist()))
    for row, k, place in zip(index.tolist(), counts.tolist(), places, strict=True):
        assert row[k:] == [-1] * (len(row) - k)  # nothing that a gather would accept in silence
        assert row[:k] == sorted(set(row[:k]))
        assert set(row[:k]) <= set(place.tolist())


@pytest.mark.parametrize("name", [name for name in pruning.names() if name != "random"])
@given(seeds, st.lists(st.integers(2, 24), min_size=1, max_size=4), st.integers(0, 6), st.floats(0.05, 1))
def test_a_ragged_batch_equals_its_images_alone(name, seed, sizes, padding, keep):
    images = [distinct(seed + i, n, 6) for i, n in enumerate(sizes)]
    features, mask, places = scatter_images(images, max(sizes) + padding, seed)
    index, counts = select(name, features, keep=keep, mask=mask)
    for b, image in enumerate(images):
        alone = select(name, image[None], keep=keep)[0]
        assert torch.equal(index[b, : counts[b]], places[b][alone])


@pytest.mark.parametrize("name", [name for name in pruning.names() if name not in ("random", "divprune")])
@pytest.mark.parametrize("kinds", [1, 3, 6])
def test_equal_rows_are_equally_good_whatever_is_beside_their_image(name, kinds):
    """A ragged batch rounds a product otherwise than an image alone does, and equal rows differ by that. (Of seeds that
    are fixed: a tie within rounding of where ties begin is rare, and no float arithmetic could rule it out. DivPrune
    takes the farthest row however near the next is, so which of several copies it takes is left to rounding.)"""
    for seed in range(20):
        images = []
        for i, n in enumerate((23, 9, 14)):
            which = torch.randint(kinds, (n,), generator=torch.Generator().manual_seed(seed + 100 * i))
            images.append(distinct(seed + 100 * i, kinds, 6)[which])
        features, mask, places = scatter_images(images, 25, seed)
        for keep in (0.2, 0.6):
            index, counts = select(name, features, keep=keep, mask=mask)
            for b, image in enumerate(images):
                alone = select(name, image[None], keep=keep)[0]
                assert torch.equal(index[b, : counts[b]], places[b][alone])


@given(seeds, st.lists(st.integers(1, 24), min_size=1, max_size=4), st.integers(0, 6), st.floats(0.05, 1))
def test_a_ragged_batch_of_the_random_plugin_equals_its_images_alone_in_the_same_places(seed, sizes, padding, keep):
    """`random` draws by position: alone means without the other images, and not moved to other rows."""
    images = [distinct(seed + i, n, 6) for i, n in enumerate(sizes)]
    features, mask, _ = scatter_images(images, max(sizes) + padding, seed)
    index, counts = select("random", features, keep=keep, mask=mask)
    for b in range(len(images)):
        alone, _ = select("random", features[b : b + 1], keep=keep, mask=mask[b : b + 1])
        assert torch.equal(index[b, : counts[b]], alone[0])


@every_plugin
@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=3), st.data())
def test_each_image_may_have_its_own_exact_count(name, seed, sizes, data):
    features, mask, _ = scatter_images([distinct(seed + i, n, 4) for i, n in enumerate(sizes)], max(sizes) + 2, seed)
    wanted = [data.draw(st.integers(1, n)) for n in sizes]
    index, counts = select(name, features, count=wanted, mask=mask)
    assert counts.tolist() == wanted == (index >= 0).sum(1).tolist()


@every_plugin
@given(pictures(), st.data())
def test_the_same_input_gives_the_same_output_and_is_left_as_it_was(name, features, data):
    count = data.draw(row_counts(features))
    before = features.clone()
    first = select(name, features, count=count)
    assert torch.equal(features, before)
    assert torch.equal(select(name, features, count=count), first)


@every_plugin
@given(pictures(), st.integers(-20, 20), st.data())
# As far as fp32 reaches: squares of 2^100 are infinite and squares of 2^-90 are zero, the features are neither.
@example(distinct(0, 2, 12, 6), 100, None)
@example(distinct(0, 2, 12, 6), -90, None)
def test_scaling_features_by_a_power_of_two_changes_nothing(name, features, exponent, data):
    count = 5 if data is None else data.draw(row_counts(features))
    scaled = select(name, features * 2.0**exponent, count=count, signals=beside(name, features))
    assert torch.equal(scaled, select(name, features, count=count))


@every_plugin
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(pictures(), st.data())
def test_half_precision_features_give_the_answer_of_their_fp32_copies(name, dtype, features, data):
    features, count = features.to(dtype), data.draw(row_counts(features))
    assert torch.equal(select(name, features, count=count), select(name, features.float(), count=count))


@every_plugin
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@given(seeds, st.data())
def test_nan_and_infinite_features_are_refused(name, poison, seed, data):
    features = distinct(seed, 2, 6, 3)
    features[data.draw(st.integers(0, 1)), data.draw(st.integers(0, 5)), data.draw(st.integers(0, 2))] = poison
    for keep in (0.5, 1.0):  # also where there is nothing to choose
        with pytest.raises(UserError, match="NaN or infinite"):
            select(name, features, keep=keep)
    sound = torch.ones_like(features)
    for signal, values in beside(name, sound).items():
        spoilt = values.clone()
        spoilt[0, 0] = poison
        with pytest.raises(UserError, match="NaN or infinite"):
            select(name, sound, keep=0.5, signals={**beside(name, sound), signal: spoilt})


@every_plugin
def test_selection_leaves_no_graph(name):
    features = distinct(0, 1, 8, 4).requires_grad_()
    assert not select(name, features, count=3).requires_grad


# DivPrune


@given(seeds, st.integers(3, 30), st.integers(2, 16), st.floats(0, 1))
@example(6, 80, 32, 0.5)  # long enough for features rounded to bf16 to lose their way
@example(5, 60, 8, 0.5)
def test_divprune_equals_its_definition_where_there_are_no_ties(seed, n, width, share):
    features = distinct(seed, 1, n, width)
    count = 1 + int(share * (n - 2))
    distances, chosen = cosine_distances(features[0]), []
    for _ in range(count):
        values = greedy_values(distances, chosen)
        best, runner_up = sorted(values, key=values.get, reverse=True)[:2]
        # fp32 cosines are good to about 1e-6. The first pick ties by nature when two rows are each other's nearest.
        assume(values[best] - values[runner_up] > 1e-5)
        chosen.append(best)
    assert select("divprune", features, count=count).tolist() == [sorted(chosen)]


def is_greedy(features: Tensor, picks: list[int], tolerance: float = 1e-5) -> bool:
    """Whether each pick is within `tolerance` of the best there was at its turn."""
    distances = cosine_distances(features)
    for turn, pick in enumerate(picks):
        values = greedy_values(distances, picks[:turn])
        if pick not in values or values[pick] < max(values.values()) - tolerance:
            return False
    return True


@given(pictures(), st.data())
def test_divprune_picks_greedily_ties_or_not(features, data):
    """Among duplicates no float arithmetic can say which comes first, so each pick is only asked to be as good."""
    count = data.draw(row_counts(features))
    valid = torch.ones(features.shape[:2], dtype=torch.bool)
    picks = pruning.registry.PLUGINS["divprune"].plugin(features.float(), most=count, valid=valid)
    for image, order in zip(features, picks.tolist(), strict=True):
        assert is_greedy(image, order)


@given(seeds)
def test_the_check_for_greedy_picks_can_fail(seed):
    """The last pick of the right order, moved to the front, is not greedy: so the property above says something."""
    features = distinct(seed, 1, 10, 3)
    order = (
        pruning.registry.PLUGINS["divprune"]
        .plugin(features, most=10, valid=torch.ones(1, 10, dtype=torch.bool))[0]
        .tolist()
    )
    assert is_greedy(features[0], order)
    assert not is_greedy(features[0], [order[-1], *order[:-1]])


def test_divprune_spends_its_picks_on_what_differs():
    """Of 3 kinds of row, 3 picks take one each, however unevenly the rows are dealt."""
    kinds = torch.eye(3)[[0] * 20 + [1] + [0] * 20 + [2] + [1] * 3]
    index = select("divprune", kinds[None], count=3)
    assert sorted(kinds[index[0]].argmax(1).tolist()) == [0, 1, 2]


# The two controls


@given(st.integers(0, 2**40), st.integers(20, 60))
def test_random_keeps_other_rows_with_another_seed(seed, n):
    features = torch.ones(1, n, 1)
    kept = [pruning.select("random", features, count=n // 2, seed=seed + s).tolist() for s in range(3)]
    assert kept[0] != kept[1] != kept[2] != kept[0]  # equal by luck: once in C(20, 10) = 184,756


def test_random_keeps_every_row_and_every_pair_of_neighbours_equally_often():
    n, k, draws = 36, 9, 4_000
    kept = torch.zeros(draws, n)
    features = torch.ones(1, n, 1)
    for seed in range(draws):
        kept[seed, pruning.select("random", features, count=k, seed=seed)[0]] = 1
    single, pair = k / n, (k / n) * (k - 1) / (n - 1)
    for share, wanted in ((kept.mean(0), single), ((kept[:, 1:] * kept[:, :-1]).mean(0), pair)):
        # Five standard deviations of a share of 4,000 draws; the seeds are fixed, so this passes always or never.
        assert (share - wanted).abs().max() < 5 * math.sqrt(wanted * (1 - wanted) / draws)


@given(st.integers(1, 12), st.data())
def test_grid_covers_every_quadrant_of_a_square_picture(half, data):
    side = 2 * half
    count = data.draw(st.integers(4, side * side))
    index = select("grid", torch.ones(1, side * side, 1), count=count)[0]
    quadrant = 2 * (index // side // half) + index % side // half
    assert set(quadrant.tolist()) == {0, 1, 2, 3}


@given(st.integers(1, 300), st.data())
def test_grid_leaves_no_long_gap_in_any_picture(n, data):
    count = data.draw(st.integers(1, n))
    index = select("grid", torch.ones(1, n, 1), count=count)[0].tolist()
    longest = max(b - a for a, b in itertools.pairwise([-1, *index, n]))
    # Even spacing leaves n / count between picks; a square picture also skips whole lines, about side / sqrt(count).
    square = math.isqrt(n) ** 2 == n
    assert longest <= (math.sqrt(n) * (math.sqrt(n / count) + 2) if square else n / count + 1)


@given(pictures(max_images=1), st.data())
def test_random_and_grid_do_not_look_at_the_features(features, data):
    count = data.draw(row_counts(features))
    for name in ("random", "grid"):
        assert torch.equal(select(name, features, count=count), select(name, torch.ones_like(features), count=count))


# The registry, and what `select` refuses


@pytest.fixture
def first_rows():
    """A user's plugin, registered for one test."""

    @pruning.register("first_rows")
    def plugin(features, *, most, valid, **_):
        return valid.int().argsort(dim=1, descending=True, stable=True)[:, :most].flip(1)  # any order: `select` sorts

    yield plugin
    del pruning.registry.PLUGINS["first_rows"]


def test_a_plugin_of_the_users_is_selected_by_its_name(first_rows):
    assert "first_rows" in pruning.names()
    assert select("first_rows", distinct(0, 2, 9, 3), count=4).tolist() == [[0, 1, 2, 3]] * 2


def test_signals_reach_the_plugins_that_ask_for_them_and_missing_ones_are_named():
    wanted = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.5, 0.0, 0.1, 0.4]], dtype=torch.float16)

    @pruning.register("asks", needs=("mine",), takes=("yours",))
    def asks(features, *, most, mine, yours=None, **signals):
        assert mine.dtype == torch.float32
        assert "other" not in signals
        return (mine if yours is None else -mine).topk(most, dim=1).indices

    try:
        features, other = distinct(0, 2, 4, 3), torch.ones(2, 4)
        assert pruning.select("asks", features, count=2, signals={"mine": wanted}).tolist() == [[1, 3], [0, 3]]
        both = {"mine": wanted, "yours": other, "other": other}
        assert pruning.select("asks", features, count=2, signals=both).tolist() == [[0, 2], [1, 2]]
        with pytest.raises(
            UserError, match=r"'asks' needs mine beside the features; without: .*divprune.*grid"
        ) as said:
            pruning.select("asks", features, count=2, signals={"yours": other})
        assert "asks" not in str(said.value).split("without: ")[1]
        with pytest.raises(UserError, match=r"mine must be \(2, 4\)"):
            pruning.select("asks", features, count=2, signals={"mine": wanted[:, :3]})
    finally:
        del pruning.registry.PLUGINS["asks"]
    with pytest.raises(UserError, match="must be a tuple"):
        pruning.register("letters", needs="mine")


def test_a_taken_name_is_refused_and_the_first_plugin_stays(first_rows):
    with pytest.raises(UserError, match="'first_rows'"):
        pruning.register("first_rows")(lambda features, **_: None)
    assert pruning.registry.PLUGINS["first_rows"].plugin is first_rows


def test_an_unknown_plugin_is_refused_with_the_nearest_known_one():
    with pytest.raises(UserError, match="did you mean 'divprune'"):
        select("div_prune", torch.ones(1, 4, 2), count=2)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({}, "keep"),
        ({"keep": 0.5, "count": 2}, "keep"),
        ({"keep": 0.0}, "keep = 0"),
        ({"keep": -0.5}, "keep = -0.5"),
        ({"keep": 1.5}, "keep = 1.5"),
        ({"keep": math.nan}, "keep = nan"),
        ({"count": 0}, "count = 0"),
        ({"count": 7}, "count = 7"),
        ({"count": [2, 3, 1]}, "3 counts for 2 images"),
        ({"count": [2, 7]}, "count = 7"),
    ],
    ids=str,
)
def test_a_bad_share_or_count_is_refused(how, said):
    with pytest.raises(UserError, match=said):
        select("divprune", distinct(0, 2, 6, 3), **how)


@pytest.mark.parametrize("shape", [(6, 3), (0, 6, 3), (2, 0, 3), (2, 6, 0)], ids=str)
def test_features_of_a_wrong_shape_are_refused(shape):
    with pytest.raises(UserError, match="features"):
        select("divprune", torch.ones(shape), count=1)


def test_features_that_are_not_float_are_refused():
    with pytest.raises(UserError, match="features"):
        select("divprune", torch.ones(2, 6, 3, dtype=torch.long), count=1)


def test_an_image_without_a_row_to_keep_is_refused_by_its_number():
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(UserError, match="image 1"):
        select("divprune", distinct(0, 3, 6, 3), keep=0.5, mask=mask)


def test_a_count_above_an_images_own_rows_is_refused():
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    with pytest.raises(UserError, match="count = 4"):
        select("divprune", distinct(0, 2, 6, 3), count=4, mask=mask)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 5, dtype=torch.bool),
        torch.ones(1, 6, dtype=torch.bool),
        torch.ones(6, dtype=torch.bool),
        torch.ones(2, 6, dtype=torch.long),
    ],
    ids=lambda mask: f"{mask.dtype}{tuple(mask.shape)}",
)
def test_a_mask_that_does_not_fit_the_features_is_refused(mask):
    """An integer mask is easily passed (attention masks are such), and its `~` is -2, which is true."""
    for name in pruning.names():
        with pytest.raises(UserError, match="mask"):
            select(name, distinct(0, 2, 6, 3), keep=0.5, mask=mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(seed=seeds)
def test_autocast_does_not_reach_the_selection(dtype, seed):
    features = 40 * (distinct(seed, 64, 32)[None] + 3)  # a strong common part, as projected features have
    plain = select("divprune", features, keep=0.1)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(select("divprune", features, keep=0.1), plain)
