"""The short form of `kills.py`: everything that has a state of its own in one run."""

from torture import kills

SHORT = 2


def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path):
    (one,) = kills.torture(tmp_path, ["all of it"], [1], SHORT, seed=0)
    assert sum(one.kills.values()) == SHORT
    assert one.ends >= 1
