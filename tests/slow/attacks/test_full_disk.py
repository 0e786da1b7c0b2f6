"""The short form of `full_disk.py`: a run that has everything with a state of its own, and some faults."""

import pytest
from slow.attacks import full_disk, small_disk

REASON = small_disk.why_not()


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_disk_that_fails_loses_nothing_and_the_line_says_how_to_go_on(tmp_path):
    attack = full_disk.Attack(tmp_path, ["digits"], seed=0)
    attack.go(4)
    assert not attack.failures
    assert sum(attack.tried.values()) >= 4
