"""Every model family with every plugin in every mode, on a pretend GPU: the same numbers as on a CPU, and no waits."""

import itertools

import pytest
from support import gpu_cases, pretend_cuda
from support.gpu_cases import Case

from tinyspeed import pruning
from tinyspeed.rows import POSITIONS

pytestmark = pytest.mark.skipif(bool(pretend_cuda.unavailable()), reason=pretend_cuda.unavailable() or "available")


def walk() -> list[Case]:
    """Families x plugins x modes. Along it the other settings take turns, each at a rhythm of its own, so that any two
    of their values meet."""
    turns = [
        itertools.cycle(values)
        for values in (
            POSITIONS, gpu_cases.LAYOUTS, (*gpu_cases.TUNING, "lora", "qlora"),
            (*gpu_cases.SYSTEMS, "sts", "views", "none"),
            ("fp32",) * 7 + ("bf16",) * 4, (False,) * 11 + (True,) * 2,
            pruning.WEIGHTS + pruning.WEIGHTS[:1] * 14,
        )
    ]  # fmt: skip
    modes = [*itertools.product(pruning.names(), ("fast", "slow")), *[("divprune", "full")] * 7]
    every = itertools.product(gpu_cases.EVERY, modes)
    cases = [Case(family, *how, *(next(turn) for turn in turns)) for family, how in every]
    return [case for case in cases if case.possible]


@pytest.mark.parametrize("family", gpu_cases.EVERY)
@pytest.mark.parametrize("mode", gpu_cases.MODES)
def test_a_step_is_what_it_is_on_a_cpu_and_waits_for_nothing(family, mode):
    cases = [case for case in walk() if (case.family, case.mode) == (family, mode)]
    assert cases
    assert {case: said for case in cases if (said := gpu_cases.unlike(case))} == {}


def test_the_walk_meets_every_pair_of_settings():
    cases = walk()
    for one, other in itertools.combinations(("positions", "layout", "tuning", "system", "mode", "family"), 2):
        values = [{getattr(case, name) for case in cases} for name in (one, other)]
        met = {(getattr(case, one), getattr(case, other)) for case in cases}
        impossible = {(a, b) for a, b in itertools.product(*values) if {a, b} & {"views"} and {a, b} & {"full"}}
        impossible |= {(a, b) for a, b in itertools.product(*values) if {a, b} == {"regate", "slow"}}
        assert set(itertools.product(*values)) - met <= impossible, (one, other)
