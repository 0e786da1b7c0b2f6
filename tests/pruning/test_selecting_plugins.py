"""Each plugin against naive float64 code written from its description. The laws for all are in `test_pruning.py`."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.features import cosine_distances, distinct, greedy_values, pictures, row_counts, seeds, select
from torch import Tensor

from tinyspeed import pruning

# What a plugin's next pick maximises: (rows of one image, picks so far) -> value of each row that is left.
Values = Callable[[Tensor, list[int]], dict[int, float]]


def units(features: Tensor) -> Tensor:
    return torch.nn.functional.normalize(features.double(), dim=1, eps=1e-150)


def centre(features: Tensor) -> Tensor:
    return features.double() - features.double().mean(0)


def distinctiveness(features: Tensor) -> list[float]:
    """-mean cosine to the others, stretched to 0 .. 1; all 1 if all are alike."""
    n, cosine = len(features), units(features) @ units(features).T
    score = [-sum(float(cosine[i, j]) for j in range(n) if j != i) / max(n - 1, 1) for i in range(n)]
    span = max(score) - min(score)
    return [1.0 if span < 1e-6 else (value - min(score)) / span for value in score]


def covered(features: Tensor, chosen: list[int]) -> float:
    likeness = torch.exp((1 - cosine_distances(features)) / 0.2)
    total = 0.0
    for row in likeness:
        total += max((float(row[j] / row.sum()) for j in chosen), default=0.0)
    return total


def coverage_values(features: Tensor, chosen: list[int]) -> dict[int, float]:
    now = covered(features, chosen)
    return {j: covered(features, [*chosen, j]) - now for j in range(len(features)) if j not in chosen}


def volume_values(rows: Tensor, weights: list[float], chosen: list[int]) -> dict[int, float]:
    """(weight times distance from the span of the chosen rows)^2, by the pseudo-inverse: what det(L) grows by."""
    basis = rows[chosen].T
    outside = rows if not chosen else rows - (basis @ torch.linalg.pinv(basis, rtol=1e-9) @ rows.T).T
    return {j: weights[j] ** 2 * float(outside[j].square().sum()) for j in range(len(rows)) if j not in chosen}


def dpp_values(features: Tensor, chosen: list[int]) -> dict[int, float]:
    return volume_values(units(features), [1.0] * len(features), chosen)


def dpp_centred_values(features: Tensor, chosen: list[int]) -> dict[int, float]:
    return volume_values(units(centre(features)), distinctiveness(features), chosen)


def divprune_centred_values(features: Tensor, chosen: list[int]) -> dict[int, float]:
    distances = cosine_distances(features)
    if not chosen:
        return greedy_values(distances, [])
    weights = distinctiveness(features)
    return {j: weights[j] * v for j, v in greedy_values(cosine_distances(centre(features)), chosen).items()}


VALUES: dict[str, Values] = {
    "coverage": coverage_values,
    "divprune_centred": divprune_centred_values,
    "dpp": dpp_values,
    "dpp_centred": dpp_centred_values,
}


@pytest.mark.parametrize("name", VALUES)
@given(seeds, st.integers(3, 20), st.integers(2, 16), st.floats(0, 1))
def test_a_greedy_plugin_equals_its_definition_where_there_are_no_ties(name, seed, n, width, share):
    features = distinct(seed, 1, n, width)
    rank = n if name in ("coverage", "divprune_centred") else width
    count, chosen = 1 + int(share * (min(n - 1, rank) - 1)), []
    for _ in range(count):
        values = VALUES[name](features[0], chosen)
        best, runner_up = sorted(values, key=values.get, reverse=True)[:2]
        if name == "dpp" and not chosen:
            best = 0  # all rows are as good; the first is taken
        else:
            assume(values[best] - values[runner_up] > 1e-4)
        chosen.append(best)
    assert select(name, features, count=count).tolist() == [sorted(chosen)]


@pytest.mark.parametrize("name", ["coverage", "dpp"])
@given(pictures(max_images=2, max_rows=16), st.data())
def test_a_greedy_plugin_is_greedy_ties_or_not(name, features, data):
    """Among duplicates no float arithmetic can say which comes first, so each pick is only asked to be as good."""
    count = data.draw(row_counts(features))
    valid = torch.ones(features.shape[:2], dtype=torch.bool)
    picks = pruning.registry.PLUGINS[name].plugin(features, most=count, valid=valid)
    for image, order in zip(features, picks.tolist(), strict=True):
        for turn, pick in enumerate(order):
            values = VALUES[name](image, order[:turn])
            assert values[pick] > max(values.values()) - 2e-4


def test_coverage_stands_for_the_crowd_and_divprune_for_the_outliers():
    """A crowd, and three rows unlike it and unlike each other: three picks."""
    crowd = torch.eye(8)[0] + 0.1 * distinct(0, 30, 8).abs()
    features = torch.cat([crowd, torch.eye(8)[5:]])[None]
    assert select("divprune", features, count=3).tolist() == [[30, 31, 32]]
    assert select("coverage", features, count=3)[0, 0] < 30


@given(seeds, st.integers(2, 8), st.data())
def test_the_rows_of_dpp_are_those_of_the_largest_determinant_pick_by_pick(seed, n, data):
    """With relevance, by determinants themselves: det(L) of what is chosen, one row more at a time."""
    features, count = distinct(seed, 1, n, 8), data.draw(st.integers(1, n - 1))
    relevance = torch.rand(1, n, generator=torch.Generator().manual_seed(seed)) + 0.2
    kernel = units(features[0]) @ units(features[0]).T * relevance[0].double().outer(relevance[0].double())
    chosen = []
    for _ in range(count):
        value = {
            j: math.sqrt(max(0, float(torch.linalg.det(kernel[[*chosen, j]][:, [*chosen, j]]))))
            for j in range(n)
            if j not in chosen
        }
        best, *others = sorted(value, key=value.get, reverse=True)
        assume(not others or value[best] > 1.001 * value[others[0]] + 1e-4)
        chosen.append(best)
    assert select("dpp", features, count=count, signals={"relevance": relevance}).tolist() == [sorted(chosen)]


@given(seeds, st.integers(1, 9))
def test_dpp_takes_by_relevance_where_nothing_is_new(seed, more):
    """Rows of a plane, of which two say everything."""
    features, relevance = distinct(seed, 1, 12, 2), 0.01 * torch.arange(2.0, 14)[None]
    relevance = relevance[:, torch.randperm(12, generator=torch.Generator().manual_seed(seed))]
    relevance[0, :2] = 1
    first = select("dpp", features, count=2, signals={"relevance": relevance})[0].tolist()
    others = sorted({*range(12)} - {*first}, key=lambda row: -relevance[0, row])
    kept = select("dpp", features, count=2 + more, signals={"relevance": relevance})[0].tolist()
    assert kept == sorted(first + others[:more])


def test_dpp_never_takes_what_lies_in_the_span_of_what_it_has_while_there_is_more():
    """Rows of rank 4, far more of them than that: DivPrune takes differing rows of a plane, dpp one for each axis."""
    axes = torch.eye(6)[[0, 1, 2, 3]]
    plane = torch.tensor([[math.cos(t), math.sin(t), 0, 0, 0, 0] for t in torch.linspace(0.2, 6.2, 20).tolist()])
    features = torch.cat([plane, axes])[None]
    kept = select("dpp", features, count=4)[0]
    assert torch.linalg.matrix_rank(features[0, kept]) == 4
    assert torch.linalg.matrix_rank(features[0, select("divprune", features, count=4)[0]]) < 4


@given(seeds, st.integers(4, 20))
def test_relevance_decides_first_and_a_row_without_any_is_last(seed, n):
    features = distinct(seed, 2, n, 32)
    relevance = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) + 0.1
    relevance[:, 2] = 0 if seed % 2 else -5.0  # less than none is none
    assert (select("dpp", features, count=n - 1, signals={"relevance": relevance}) != 2).all()
    # Of the centred plugin's rows the least distinctive has no weight either.
    assert (select("dpp_centred", features, count=n - 2, signals={"relevance": relevance}) != 2).all()
    assert torch.equal(select("dpp", features, count=1, signals={"relevance": relevance})[:, 0], relevance.argmax(1))


@pytest.mark.parametrize("name", ["divprune_centred", "dpp_centred"])
@given(seeds, st.integers(4, 20))
def test_centred_plugins_take_the_least_distinctive_row_last(name, seed, n):
    features = distinct(seed, 1, n, 12)
    weights = distinctiveness(features[0])
    least = weights.index(min(weights))
    assume(sorted(weights)[1] > 1e-3)
    kept = select(name, features, count=n - 1)[0].tolist()
    assert least not in kept or (name == "divprune_centred" and least == int(select("divprune", features, count=1)))


# Plugins that know what [CLS] looks at


@given(seeds, st.integers(2, 30), st.data())
def test_cls_topk_keeps_the_rows_with_most_attention(seed, n, data):
    attention, count = distinct(seed, 2, n).abs(), data.draw(st.integers(1, n - 1))
    kept = select("cls_topk", torch.ones(2, n, 1), count=count, signals={"cls_attention": attention})
    for row, values in zip(kept.tolist(), attention.tolist(), strict=True):
        assert row == sorted(sorted(range(n), key=values.__getitem__)[n - count :])


def vispruner_by_hand(attention: np.ndarray, tower: Tensor, count: int, gap: float = 0) -> list[int]:
    """Equal rows have equal cosines because these are computed once. Others must differ by `gap` at least."""
    kinds, kind = np.unique(tower.double().numpy(), axis=0, return_inverse=True)
    length = np.sqrt((kinds**2).sum(1, keepdims=True))
    unit = kinds / np.where(length == 0, 1, length)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, length[:, 0] > 0)
    cosine = cosine[kind][:, kind]
    ranking = np.argsort(-attention, kind="stable")
    important, rest = ranking[: count // 2], ranking[count // 2 :]
    while len(rest) > count - len(important):
        even, odd = rest[::2], rest[1::2]
        nearest = cosine[np.ix_(even, odd)].max(1)
        if gap:
            assume((np.diff(np.unique(nearest)) > gap).all())
        even = even[np.argsort(-nearest, kind="stable")]
        rest = np.concatenate([even[min(8, len(rest) - (count - len(important))) :], odd])
    return sorted([*important.tolist(), *rest.tolist()])


@given(seeds, st.integers(2, 60) | st.just(576), st.data())
@settings(max_examples=30)
def test_vispruner_equals_its_definition(seed, n, data):
    """Ties included: of rows that are equal, or equally looked at, those that stand first are the first."""
    attention, tower = distinct(seed, 1, n).abs(), distinct(seed + 1, 1, n, 8)
    if data.draw(st.booleans()):
        tower[0, 0] *= data.draw(st.integers(0, 1))  # perhaps a row of zeros
        tower = tower[:, torch.randint(data.draw(st.integers(1, n)), (n,), generator=torch.manual_seed(seed))]
        attention = (attention * data.draw(st.sampled_from([1, 3, 1000]))).round()
    count = data.draw(st.integers(1, n - 1))
    signals = {"cls_attention": attention, "tower": tower}
    wanted = vispruner_by_hand(attention[0].numpy(), tower[0], count, gap=1e-11)
    assert select("vispruner", torch.ones(1, n, 1), count=count, signals=signals).tolist() == [wanted]


def test_vispruner_equals_its_definition_for_as_many_rows_as_an_image_of_llava_next_has():
    """Of rows with much in common, as features have it, some cosines differ by less than a billionth, or not."""
    attention, tower = distinct(3, 1, 2880).abs(), 10 + distinct(4, 1, 2500, 8)
    tower = tower[:, torch.arange(2880) * 7919 % 2500]
    signals = {"cls_attention": attention, "tower": tower}
    wanted = vispruner_by_hand(attention[0].numpy(), tower[0], 2560)
    assert select("vispruner", torch.ones(1, 2880, 1), count=2560, signals=signals).tolist() == [wanted]


def test_vispruner_keeps_what_is_looked_at_and_drops_its_duplicates():
    """20 rows looked at, all alike, and 4 that are not, each of its own kind."""
    tower = torch.eye(5)[[0] * 20 + [1, 2, 3, 4]][None]
    attention = torch.linspace(1, 0.5, 24)[None]
    signals = {"cls_attention": attention, "tower": tower}
    kept = select("vispruner", tower, count=12, signals=signals)[0].tolist()
    assert set(range(6)) <= set(kept)
    assert len({20, 21, 22, 23} & set(kept)) >= 2  # a round of drops is blunt: not all
    assert select("cls_topk", tower, count=12, signals=signals)[0].tolist() == list(range(12))
