"""The short form of `kills.py`: everything that has a state of its own in one run."""

import kills
import pytest

SHORT = 2


@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(tmp_path, seed):
    (one,) = kills.torture(tmp_path, ["all of it"], [1], SHORT, seed)
    assert sum(one.kills.values()) == SHORT
    assert one.ends >= 1
