"""The short form of `hosts`: a link that is cut in a step."""

import pytest
from slow.attacks.hosts import cases, network

REASON = network.why_not()


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_link_that_is_cut_ends_every_rank_who_says_which_host_is_gone_and_loses_nothing(tmp_path):
    attack = cases.Attack(tmp_path)
    attack.go("cut", cases.cut, 2, "beta", "in a .* of step 5$")
    assert not attack.failures
