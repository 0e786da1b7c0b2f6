"""The short form of `disk.py`: a run in which everything has a state of its own, and each kind of trouble."""

import pytest
from torture import disk, volume

REASON = volume.refused()


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_disk_that_says_no_loses_nothing_and_says_how_to_go_on(tmp_path):
    torture = disk.Torture(tmp_path, ["digits"], seed=0)
    torture.go(4)
    assert not torture.lost
    assert sum(torture.tried.values()) >= 4
