"""The short form of `repeatability.py`."""

from slow.attacks import repeatability

SHORT = (("everything", 0),)
CLOSE = ["train.row_budget=60"]


def test_a_recipe_gives_the_same_bits_twice_and_others_with_another_seed(tmp_path):
    tried, lost = repeatability.torture(tmp_path, [*SHORT], CLOSE)
    assert not lost
    assert tried["systems, twice"] == len(SHORT)
