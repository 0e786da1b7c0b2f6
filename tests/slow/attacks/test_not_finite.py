"""The short form of `not_finite.py`: one injection of each sort, in a run that has everything with a state."""

from slow.attacks import not_finite

KINDS = ("weight", "moment", "difficulty", "features", "when saving, a weight")


def test_a_number_that_is_not_finite_stops_the_run_before_it_does_harm(tmp_path):
    tried, failures = not_finite.attack(tmp_path, ["all of it"], KINDS, len(KINDS), seed=0)
    assert not failures
    assert tried == dict.fromkeys(KINDS, 1)


def test_a_number_on_one_of_two_ranks_stops_both(tmp_path):
    not_finite.prepare(tmp_path)
    tried, failures = not_finite.on_two_ranks(tmp_path, count=3, starts=0, seed=0)
    assert not failures
    assert tried == {"on one of two ranks: weight": 3}
