"""The short form of `not_finite.py`: one of each sort, in a run that has everything with a state of its own."""

from slow.attacks import not_finite

SHORT = ("weight", "moment", "remembered", "features", "when saving, a weight")


def test_a_number_that_is_not_finite_stops_the_run_before_it_does_harm(tmp_path):
    tried, lost = not_finite.torture(tmp_path, ["all of it"], SHORT, len(SHORT), seed=0)
    assert not lost
    assert tried == dict.fromkeys(SHORT, 1)
