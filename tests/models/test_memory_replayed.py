"""A step of a 7B model's width, replayed on a pretend GPU: the formulas of memory and FLOPs say what it takes."""

import dataclasses

import pytest
import replays
from support import pretend_cuda
from support.replay import cut, replay

from tinyspeed.bench import estimate
from tinyspeed.models.memory import Settings, Shape

pytestmark = pytest.mark.skipif(bool(pretend_cuda.unavailable()), reason=pretend_cuda.unavailable() or "available")


@pytest.mark.parametrize(
    ("name", "mode", "samples", "recompute"),
    [("llava-1.5-7b-stage2-lora", "slow", 3, False), ("llava-1.5-7b-qlora-8gb", "fast", 12, True)],
)
def test_a_step_takes_what_the_formulas_say(name, mode, samples, recompute):
    chosen, case, config = replays.case_of(name)
    config = cut(config, 2)
    case, (sample,) = dataclasses.replace(case, shape=Shape(config)), case.samples
    found = replay(chosen, "train", mode, config, sample, samples=samples, recompute=recompute)
    said = replays.formula(chosen, "train", mode, case, samples=samples, recompute=recompute)
    assert said == pytest.approx(found.peak, rel=0.03)
    work = sum(times * operation.flops for operation, times in found.operations.items())
    said = samples * estimate.flops(case.shape, Settings.of(chosen, "train", "bf16"), mode, sample, recompute)
    if chosen.model.quantise == "none":  # the kernel of 4-bit weights is not counted
        assert said == pytest.approx(work, rel=0.03)
