"""On a pretend GPU a step of every family beyond LLaVA is what it is on a CPU."""

import pytest
from support import gpu_cases, pretend_cuda, zoo
from support.gpu_cases import Case

pytestmark = pytest.mark.skipif(bool(pretend_cuda.unavailable()), reason=pretend_cuda.unavailable() or "available")


# The pretend device cannot count the tokens of each expert (`histc` of whole numbers).
@pytest.mark.parametrize("family", [name for name in zoo.KINDS if "moe" not in name])
@pytest.mark.parametrize("mode", ["full", "fast", "slow"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_what_it_is_on_a_cpu(family, mode, precision):
    assert not gpu_cases.unlike(Case(family=family, mode=mode, precision=precision))
