"""Order and micro-batches: nothing lost, nothing twice, budgets kept, and a position is all the state there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyspeed.rows import plan_rows
from tinyspeed.scheduler import Plan
from tinyspeed.training.batching import Order, cut

rows_lists = st.lists(st.integers(1, 3000), min_size=1, max_size=40)


@given(n=st.integers(1, 60), seed=st.integers(0, 2**32), epochs=st.integers(1, 4))
def test_every_epoch_shows_every_sample_once(n, seed, epochs):
    order = Order(n, seed)
    for epoch in range(epochs):
        assert sorted(order[p] for p in range(epoch * n, (epoch + 1) * n)) == list(range(n))


@given(n=st.integers(1, 60), seed=st.integers(0, 999), positions=st.lists(st.integers(0, 300), max_size=30))
def test_a_position_means_the_same_sample_whatever_was_asked_before(n, seed, positions):
    used, fresh = Order(n, seed), [Order(n, seed)[p] for p in positions]
    assert [used[p] for p in positions] == fresh


@given(n=st.integers(1, 50), size=st.integers(1, 20), step=st.integers(0, 30))
def test_batches_are_consecutive_positions(n, size, step):
    order = Order(n, 3)
    assert order.batch(step, size) == [order[p] for p in range(step * size, step * size + size)]


def test_epochs_are_in_different_orders():
    order = Order(100, 0)
    assert [order[p] for p in range(100)] != [order[p] for p in range(100, 200)]


@given(rows=rows_lists, budget=st.integers(1, 20_000))
def test_cutting_keeps_every_sample_once_and_the_budget(rows, budget):
    parts = list(cut(rows, budget))
    assert sorted(s for part in parts for s in part) == list(range(len(rows)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(rows[s] for s in part) <= budget


@given(rows=rows_lists)
def test_no_budget_means_one_batch(rows):
    assert len(list(cut(rows, 0))) == 1


@given(rows=rows_lists, budget=st.integers(1, 20_000))
def test_a_micro_batch_is_closed_only_when_the_next_sample_would_not_fit(rows, budget):
    parts = list(cut(rows, budget))
    for part in parts[:-1]:
        assert rows[part[0]] * (len(part) + 1) > budget


@pytest.mark.parametrize(("mode", "expected"), [("full", 40 + 576), ("slow", 40 + 576), ("fast", 40 + 57 + 4)])
def test_rows_of_llava_1_5(mode, expected):
    assert plan_rows(40, [576], Plan(mode, keep=0.1), isolator=4) == expected


def test_text_has_no_isolator():
    assert plan_rows(40, [], Plan("fast", keep=0.1), isolator=4) == 40
