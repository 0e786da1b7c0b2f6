"""A step of a 7B model's width, replayed on a pretend GPU: the formulas of memory and FLOPs say what it takes."""

import dataclasses

import pytest
import replays
from support import pretend_cuda
from support.replay import cut, replay

from tinyspeed.bench import estimate
from tinyspeed.models import lean
from tinyspeed.models.memory import Settings, Shape

pytestmark = pytest.mark.skipif(bool(pretend_cuda.unavailable()), reason=pretend_cuda.unavailable() or "available")


def of_a_layer(replays_of_two_and_three):
    """What is kept for the backward, FLOPs, bytes that are read and written, and kernels."""
    two, three = (
        (
            found.parts["activations"],
            sum(operation.flops * n for operation, n in found.operations.items()),
            sum(operation.bytes * n for operation, n in found.operations.items()),
            found.operations.total(),
        )
        for found in replays_of_two_and_three
    )
    return [b - a for a, b in zip(two, three, strict=True)]


@pytest.mark.parametrize("name", ["llava-1.5-7b-stage2-lora", "llava-1.5-7b-qlora-24gb"])
def test_lean_layers_keep_two_fifths_without_another_product(monkeypatch, name):
    """Of LoRA with dropout, in half precision and in 4 bits. They also move fewer bytes, in fewer kernels."""
    chosen, case, config = replays.case_of(name)
    how = {"samples": 1, "recompute": False}
    step = lambda layers: replay(chosen, "train", "full", cut(config, layers), case.samples[0], **how)
    kept, flops, moved, kernels = of_a_layer(map(step, replays.DEPTHS))
    monkeypatch.setattr(lean, "use", lambda model, on: None)
    kept_before, flops_before, moved_before, kernels_before = of_a_layer(map(step, replays.DEPTHS))
    assert kept < 0.4 * kept_before
    assert flops == pytest.approx(flops_before)
    assert moved < moved_before
    assert kernels < kernels_before


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
