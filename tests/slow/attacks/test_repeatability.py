"""The short form of `repeatability.py`: one recipe with everything."""

from slow.attacks import repeatability

SYSTEMS = (("everything", 0),)
NEARLY = ["train.row_budget=60"]


def test_a_recipe_gives_the_same_bits_twice_and_others_with_another_seed(tmp_path):
    tried, failures = repeatability.attack(tmp_path, [*SYSTEMS], NEARLY)
    assert not failures
    assert tried["systems, twice"] == len(SYSTEMS)
