"""Replays of true shapes: a few layers tell of all, the published numbers are those of today's code, the formulas of
FLOPs and of weights agree, and lean layers keep less. That the memory formulas agree with the published numbers is in
tests/docs/test_replays.py."""

import dataclasses
import json

import pytest
import replays
from support import pretend_cuda
from support.replay import cut, deeper, replay, steps

from tinyspeed.bench import estimate, step
from tinyspeed.models import lean, published
from tinyspeed.models.memory import Settings, Shape

pytestmark = pytest.mark.skipif(bool(pretend_cuda.unavailable()), reason=pretend_cuda.unavailable() or "available")
STEPS = json.loads((replays.RESULTS / "replays-memory.json").read_text(encoding="utf-8"))["recipes"]


def replayed(name, stage, mode, layers):
    chosen, case, config = replays.case_of(name)
    (found,) = [f for f in STEPS if (f["recipe"], f["stage"], f["mode"]) == (name, stage, mode)]
    how = {name: found[name] for name in ("samples", "recompute")}
    return replay(chosen, stage, mode, cut(config, layers), case.samples[0], **how)


@pytest.mark.parametrize(
    "of",
    [
        ("llava-1.5-7b-stage1", "align", "fast"),
        ("llava-1.5-7b-lora-24gb", "train", "slow"),  # recomputes
        ("llava-1.5-7b-stage2-lora", "train", "slow"),
        ("llava-next-7b-qlora-12gb", "train", "fast"),  # most is alive before the LLM runs
        ("llava-1.5-7b-stage2", "train", "fast"),
    ],
)
def test_two_and_three_layers_tell_of_thirty_two(of):
    """And are what was published."""
    two, three, whole = (replayed(*of, layers) for layers in (*replays.DEPTHS, 32))
    assert deeper(two, three, 32).peak == pytest.approx(whole.peak, rel=0.0001)
    (found,) = [f for f in STEPS if (f["recipe"], f["stage"], f["mode"]) == of]
    assert whole.peak == pytest.approx(found["peak"], rel=0.001)


@pytest.mark.parametrize("family", ["1.5", "next"])
def test_flops_are_those_that_are_estimated(family):
    """By the formulas that `estimate`, the planner and the promises use."""
    config, samples = cut(published.config_of("7b", family), 2), step.samples_of("128", 4, family)
    done = steps("7b", family, 2, 4, "128")
    s = Settings("bf16", rank=64)
    for mode in ("full", "fast", "slow"):
        counted = sum(operation.flops * n for operation, n in done[mode].items())
        said = sum(estimate.flops(Shape(config), s, mode, sample, False) for sample in samples)
        assert said == pytest.approx(counted, rel=0.03), mode
    counted = sum(operation.flops * n for operation, n in done["hf"].items())
    assert counted > 1.2 * sum(operation.flops * n for operation, n in done["full"].items())  # recomputes


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
    ("name", "stage", "mode", "samples", "recompute"),
    [
        ("llava-1.5-7b-stage1", "align", "fast", 12, False),
        ("llava-1.5-7b-stage2", "train", "fast", 12, False),  # keeps a copy of what attention gives
        ("llava-1.5-7b-stage2-lora", "train", "fast", 12, False),
        ("llava-1.5-7b-qlora-8gb", "train", "fast", 12, True),
        ("llava-1.5-7b-stage2-lora", "train", "slow", 3, False),  # only its teacher weighs
    ],
)
def test_weights_take_the_memory_and_flops_that_are_said_and_little_more_time(name, stage, mode, samples, recompute):
    """By count, on a GPU."""
    chosen, case, config = replays.case_of(name)
    config = cut(config, 2)
    case, (sample,) = dataclasses.replace(case, shape=Shape(config)), case.samples
    how, found, said = {"samples": samples, "recompute": recompute}, [], []
    for weights in ("none", "cells"):
        chosen = chosen.replaced(dualspeed={"weights": weights})
        done = replay(chosen, stage, mode, config, sample, **how)
        moved = sum(times * operation.bytes for operation, times in done.operations.items())
        found.append((done.peak, moved, sum(times * operation.flops for operation, times in done.operations.items())))
        flops = estimate.flops(case.shape, Settings.of(chosen, stage, "bf16"), mode, sample, recompute)
        said.append((replays.formula(chosen, stage, mode, case, **how), samples * flops))
    (memory, moved, work), (more_memory, more_moved, more_work) = found
    (formula, flops), (more_formula, more_flops) = said
    assert more_formula - formula == pytest.approx(more_memory - memory, rel=0.01, abs=10_000)
    assert (more_flops - flops) / flops == pytest.approx((more_work - work) / work, abs=0.0005)
    assert work < more_work < 1.01 * work
    assert more_memory < 1.03 * memory  # with LoRA they keep one more copy of what attention gives
    assert moved < more_moved < 1.03 * moved
