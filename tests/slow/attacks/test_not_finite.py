"""The short form of `not_finite.py`: one injection of each sort, in a run that has everything with a state."""

from slow.attacks import not_finite

KINDS = ("weight", "moment", "difficulty", "features", "when saving, a weight")


def test_a_number_that_is_not_finite_stops_the_run_before_it_does_harm(tmp_path):
    tried, failures = not_finite.attack(tmp_path, ["all of it"], KINDS, len(KINDS), seed=0)
    assert not failures
    assert tried == dict.fromkeys(KINDS, 1)
