"""Layers that steps skip: the laws of the choice, what is measured, and that skipped work is not done."""

import itertools
import json
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny
from support.runs import settings as settings_of
from torch.utils.flop_counter import FlopCounterMode

from tinyspeed import DualSpeed, UserError, recipe
from tinyspeed.bench.estimate import Estimate, estimate
from tinyspeed.data import loader
from tinyspeed.recipe import schedules
from tinyspeed.scheduler import Combined, FastSchedule, FullSchedule, PeriodicSchedule, Plan
from tinyspeed.sts import LayerSkipper
from tinyspeed.training import build
from tinyspeed.training.loop import StageRun, Totals

FAST, FULL, SLOW = Plan("fast", keep=0.3), Plan("full"), Plan("slow", keep=0.3, distill=1.0)
seeds, steps = st.integers(0, 2**32 - 1), st.integers(0, 10**6)


@st.composite
def how(draw, choices=("random", "influence")):
    layers = draw(st.integers(2, 40))
    first = draw(st.integers(0, layers - 1))
    last = draw(st.integers(0, layers - 1 - first))
    count = draw(st.integers(1, layers - max(first + last, 1)))
    return {
        "layers": layers, "skip": count / layers, "choose": draw(st.sampled_from(choices)),
        "protect_first": first, "protect_last": last,
        "every": draw(st.integers(0, 5)), "seed": draw(seeds),
    }  # fmt: skip


def measured(skipper: LayerSkipper, draw) -> LayerSkipper:
    changes = st.lists(st.floats(0, 100, width=32), min_size=skipper.layers, max_size=skipper.layers)
    for _ in range(draw(st.integers(1, 3))):
        skipper.observe(Plan("full", measure=True), {"influence": draw(changes), "answers": draw(st.integers(1, 9))})
    return skipper


# The choice


@given(how=how(), step=steps, plan=st.sampled_from([FAST, FULL, SLOW]), data=st.data())
def test_exactly_the_share_is_skipped_and_never_a_protected_layer(how, step, plan, data):
    skipper = measured(LayerSkipper(**how), data.draw)
    changed, every, layers = skipper.change(plan, step), how["every"], how["layers"]
    whole = plan.mode == "slow" or (every > 0 and (step + 1) % every == 0)
    assert (changed.layers is None) == whole
    assert changed.measure == (whole and how["choose"] == "influence")
    assert (changed.mode, changed.keep, changed.distill) == (plan.mode, plan.keep, plan.distill)
    if not whole:
        skipped = set(range(layers)) - set(changed.layers)
        assert list(changed.layers) == sorted(set(changed.layers))
        assert len(skipped) == round(how["skip"] * layers)
        assert all(how["protect_first"] <= layer < layers - how["protect_last"] for layer in skipped)


@given(how=how(), plan=st.sampled_from([FAST, FULL, SLOW]), asked=st.lists(steps, max_size=5), data=st.data())
def test_the_same_seed_step_and_state_give_the_same_layers(how, plan, asked, data):
    """Whatever was asked before, and after a trip through a checkpoint."""
    one, other = measured(LayerSkipper(**how), data.draw), LayerSkipper(**how)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    first = [one.change(plan, step) for step in asked]
    assert [other.change(plan, step) for step in reversed(asked)] == first[::-1]
    seen = {"influence": [1.0] * how["layers"], "answers": 3}
    for skipper in (one, other):
        skipper.observe(Plan("slow", measure=True), seen)
    assert [one.change(plan, step) for step in asked] == [other.change(plan, step) for step in asked]


@given(how=how(), data=st.data())
def test_a_checkpoint_of_other_settings_is_refused(how, data):
    state = LayerSkipper(**how).state_dict()
    with pytest.raises(UserError, match="this run asks for"):
        LayerSkipper(**{**how, "seed": how["seed"] + 1}).load_state_dict(state)


def drawn_by_weight(layers: int, first: int, last: int, count: int) -> list[float]:
    """How often each layer is among `count` drawn one after the other with weights 1, 2, 3 ...: every order, summed."""
    chance = [Fraction(0)] * layers
    for order in itertools.permutations(range(first, layers - last), count):
        left, p = sum(layer + 1 for layer in range(first, layers - last)), Fraction(1)
        for layer in order:
            p *= Fraction(layer + 1, left)
            left -= layer + 1
        for layer in order:
            chance[layer] += p
    return [float(p) for p in chance]


@pytest.mark.parametrize(("layers", "first", "last", "count"), [(8, 1, 1, 2), (6, 0, 0, 3), (7, 2, 0, 1)])
def test_deeper_layers_are_skipped_more_often_by_their_weight(layers, first, last, count):
    skipper, draws = LayerSkipper(layers, count / layers, "random", first, last, 0, seed=5), 4000
    found = Counter()
    for step in range(draws):
        found.update(set(range(layers)) - set(skipper.change(FAST, step).layers))
    for layer, want in enumerate(drawn_by_weight(layers, first, last, count)):
        assert abs(found[layer] / draws - want) < 4 * (want * (1 - want) / draws) ** 0.5 + 1e-12  # four deviations


def test_seeds_and_steps_draw_differently():
    skippers = [LayerSkipper(32, 0.25, seed=seed) for seed in range(5)]
    made = {skipper.change(FAST, step).layers for skipper in skippers for step in range(9)}
    assert len(made) == 45


@given(how=how(choices=["influence"]), data=st.data())
def test_influence_skips_the_layers_that_changed_least(how, data):
    skipper, layers = LayerSkipper(**{**how, "every": 0}), how["layers"]
    assert skipper.change(FAST, 0) == Plan("fast", keep=0.3, measure=True), "nothing is known yet: all run"
    size = {"min_size": layers, "max_size": layers}
    means = [data.draw(st.lists(st.integers(1, 10**6), unique=True, **size)) for _ in range(2)]
    for mean in means:  # as sums over 4 answer rows
        skipper.observe(Plan("slow", measure=True), {"influence": [4.0 * m for m in mean], "answers": 4})
    skipper.observe(Plan("fast"), {"influence": [], "answers": 9}), "a step that measured nothing changes nothing"
    mean = [(0.9 * a + b) / 1.9 for a, b in zip(*means, strict=True)]
    free = range(how["protect_first"], layers - how["protect_last"])
    skipped = set(range(layers)) - set(skipper.change(FAST, 1).layers)
    stays = max([mean[layer] for layer in skipped], default=0)
    assert all(mean[layer] >= stays * (1 - 1e-12) for layer in set(free) - skipped)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layers": 2, "skip": 0.25}, r"none or all; give at least 0\.5"),
        ({"layers": 32, "skip": 0.031}, r"none or all; give at least 0\.032"),
        ({"layers": 4, "skip": 0.75}, "3 layers of 4, but beside the first 1 and the last 1, .*there are 2"),
        ({"layers": 4, "skip": 1.0}, "none or all"),
        ({"layers": 4, "skip": 0.5, "protect_first": -1}, "there are"),
        ({"layers": 8, "skip": 0.25, "choose": "influense"}, "did you mean 'influence'"),
        ({"layers": 8, "skip": 0.25, "every": -1}, "every = -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        LayerSkipper(**wrong)


# What is measured


def changes_of(hf, batch) -> tuple[torch.Tensor, int]:
    """In float64, from transformers' own hidden states: for each layer, the sum of 1 - cos over the answer rows. The
    last one comes behind the norm, so the last layer's output is taken where it goes into that."""
    seen = []
    hook = hf.model.language_model.norm.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    out = hf(**batch, output_hidden_states=True, use_cache=False)
    hook.remove()
    hidden = [*out.hidden_states[:-1], seen[0]]
    answers = (batch["labels"][:, 1:] != tiny.IGNORE).nonzero().tolist()
    sums = []
    for before, after in itertools.pairwise(hidden):
        total = 0.0
        for b, i in answers:
            x, y = before[b, i].detach().double(), after[b, i].detach().double()
            total += 1 - float(x @ y) / (float(x @ x) * float(y @ y)) ** 0.5
        sums.append(total)
    return torch.tensor(sums), len(answers)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("mode", ["full", "slow"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_influence_is_the_angle_that_a_layer_turns_the_answer_rows_by(family, layout, mode, recompute):
    """Of the student, once, also where the backward computes the layers again."""
    net, batch = tiny.model(family), tiny.batch(family)
    want, answers = changes_of(tiny.twin(net), batch)
    model = DualSpeed(net, keep=0.3, layout=layout).train()
    if recompute:
        model.activation_checkpointing_enable()
    out = model(**batch, plan=Plan(mode, keep=0.3, distill=float(mode == "slow"), measure=True))
    out.loss.backward()
    assert out.metrics["answers"] == answers
    assert out.metrics["influence"].tolist() == pytest.approx(want.tolist(), rel=1e-4, abs=1e-5)
    assert not any(layer._forward_hooks for layer in model.vlm.language_model.layers)


def test_measuring_changes_no_gradient(family):
    batch, found = tiny.batch(family), []
    for measure in (False, True):
        model = DualSpeed(tiny.model(family), keep=0.3).train()
        out = model(**batch, plan=Plan("slow", keep=0.3, distill=1.0, measure=measure))
        out.loss.backward()
        found.append(tiny.gradients(model))
        assert len(out.metrics["influence"]) == 3 * measure
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_step_that_skips_layers_does_not_measure():
    with pytest.raises(UserError, match="cannot measure"):
        Plan("fast", layers=(0, 1), measure=True)


# What is skipped


@given(seed=st.integers(0, 99), some=st.sets(st.integers(0, 4), min_size=1, max_size=4))
@settings(max_examples=12)
def test_a_plan_is_a_model_built_with_only_its_layers(seed, some):
    net, batch, run = tiny.model(layers=5, seed=seed), tiny.batch("llava", seed), tuple(sorted(some))
    hf = tiny.twin(net)
    hf.model.language_model.layers = torch.nn.ModuleList(hf.model.language_model.layers[layer] for layer in run)
    hf.config.text_config.num_hidden_layers = len(run)
    model = DualSpeed(net).train()
    loss = model(**batch, plan=Plan("full", layers=run)).loss
    theirs = hf(**batch, use_cache=False).loss  # divided by the answers, as ours
    assert not tiny.difference(loss, theirs)
    loss.backward()
    theirs.backward()
    got = {n.removeprefix("model."): g for n, g in tiny.gradients(model).items()}
    for place, layer in enumerate(run):
        ours, want = (
            {n.partition(f"layers.{i}.")[2]: g for n, g in of.items() if f"language_model.layers.{i}." in n}
            for of, i in ((got, layer), (tiny.gradients(hf), place))
        )
        assert want
        assert not tiny.difference(ours, want)


@given(seed=seeds, skip=st.sampled_from([0.25, 0.5]), schedule=st.sampled_from([FullSchedule(), FastSchedule(0.3)]))
@settings(max_examples=6)
def test_skipped_layers_stay_bit_for_bit_through_decay_and_momentum(seed, skip, schedule):
    model = DualSpeed(tiny.model(layers=4), schedule=Combined(schedule, LayerSkipper(4, skip, seed=seed, every=3)))
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.1, weight_decay=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for step in range(3):
        plan, model.step = model.schedule.plan(step), step
        model.zero_grad(set_to_none=True)
        model(**tiny.batch("llava")).loss.backward()
        layers = model.vlm.language_model.layers
        before = [[p.detach().clone() for p in layer.parameters()] for layer in layers]
        assert (plan.layers is None) == (step == 2)
        optimizer.step()
        for number, layer in enumerate(layers):
            runs = plan.layers is None or number in plan.layers
            assert {p.grad is not None for p in layer.parameters()} == {runs}
            moved = [not torch.equal(p, was) for p, was in zip(layer.parameters(), before[number], strict=True)]
            assert moved == [runs] * len(moved)


def flops(model, plan) -> int:
    """Forward and backward, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        model(**tiny.batch("llava"), plan=plan).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


@pytest.mark.parametrize("plan", [FULL, FAST], ids=["full", "fast"])
def test_a_step_saves_the_work_of_its_skipped_layers_forward_and_backward(plan):
    """At least 80 % of the share, of a model with 16 layers: what remains is its tower, and the answers' logits."""
    model = DualSpeed(tiny.model(layers=16)).train()
    skipping = LayerSkipper(16, 0.25).change(plan, 0)
    whole, less = flops(model, plan), flops(model, skipping)
    one = whole - flops(model, Plan(plan.mode, keep=plan.keep, layers=tuple(range(15))))
    assert whole - less == 4 * one
    assert 1 - less / whole > 0.8 * 0.25


# Runs


def test_what_a_run_measures_chooses_what_it_skips(home, tmp_path):
    """Two steps of a run, beside what its own model says of their samples one by one, before it moves."""
    changes = ("sts.skip=0.34", "sts.layers=influence", "sts.protect_first=0", "sts.protect_last=0")
    made = settings_of(home, tmp_path, "run", "train.row_budget=60", *changes)
    model, source = build.build(made)
    run = StageRun(made, model, source, "train", 0, made.train, Totals())
    skipper, batches = model.schedule.parts[0], loader.batches(source, run._ahead(), run.pad)
    skipper.every = 1  # which no recipe may ask for: it would skip nothing
    sums, answers = torch.zeros(3), 0.0
    for step in range(2):
        plan = model.schedule.plan(step)
        assert plan.measure
        sums, answers = 0.9 * sums, 0.9 * answers
        for sample in run.order.batch(step, made.train.batch):
            with torch.no_grad():
                out = model(**next(loader.batches(source, [[sample]], run.pad)), plan=plan)
            sums, answers = sums + out.metrics["influence"], answers + out.metrics["answers"]
        run._step(step, batches, None)
        assert skipper.answers == pytest.approx(answers)
        assert skipper.sums == pytest.approx(sums.tolist(), rel=1e-4)
    skipper.every = 0
    assert set(range(3)) - set(skipper.change(FAST, 2).layers) == {int(sums.argmin())}


def test_compressing_has_its_own_plugin_and_share():
    made = recipe.read("digits", ["sts.compress=0.4", "sts.compressor=divprune", "dualspeed.keep=0.2"])
    assert schedules.schedule_of(made, "align", 3).plan(7) == Plan("fast", keep=0.4)
    assert schedules.schedule_of(made, "train", 3).plan(3).keep == 0.2
    assert made.pruning("align") == ("divprune", 0.4)
    full = recipe.read("digits", ["sts.compress=0.4", "dualspeed.schedule=full"])
    assert schedules.schedule_of(full, "align", 3).plan(7) == Plan("fast", keep=0.4)
    assert schedules.schedule_of(full, "train", 3).plan(3) == Plan("full")


def test_off_is_the_default_and_changes_nothing():
    made = recipe.read("digits")
    assert not isinstance(schedules.schedule_of(made, "train", 3), Combined)
    aligning = schedules.schedule_of(recipe.read("digits", ["sts.skip=0.34"]), "align", 3)
    assert aligning.plan(0) == Plan("fast", keep=made.dualspeed.keep)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("sts.skip=1.5", "at most 1"),
        ("sts.layers=influense", "did you mean 'influence'"),
        ("sts.compressor=divprune", "set sts.compress too"),
        ("sts.compress=0.1 sts.compressor=tokenlearner", "the same in all stages"),
        ("sts.compress=0.1 dualspeed.plugin=dynamicvit sts.compressor=grid", "the same in all stages"),
        ("sts.protect_last=-1", "negative"),
        ("sts.every=-1", "negative"),
        ("sts.skipp=0.1", "did you mean 'sts.skip'"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(UserError, match=says):
        recipe.read("digits", change.split())


def test_a_section_without_its_stage_is_a_mistake():
    with pytest.raises(UserError, match="for aligning"):
        recipe.read("digits", ["sts.compress=0.5", "align.steps=0"])
    with pytest.raises(UserError, match="for tuning"):
        recipe.read("digits", ["sts.skip=0.34", "train.steps=0"])


@pytest.mark.parametrize("which", ["full", "fast", "bernoulli"])
def test_an_estimate_knows_what_is_skipped(which):
    """Layers are nearly all of a 7B model's work: a share of them is a share of it, on steps that are not slow."""

    def work(*changes) -> float:
        asked = ["dualspeed.slow=0.1", f"dualspeed.schedule={which}", *changes]
        found: Estimate = estimate(recipe.read("llava-1.5-7b-qlora-12gb", asked), 12)
        return found.work("train")[2]

    plain = work()
    for every, mean in ((0, 0.25), (5, 0.2)):
        saved = 1 - work("sts.skip=0.25", f"sts.every={every}") / plain
        if which == "bernoulli":
            slow = work("dualspeed.schedule=full") * 0.1 / plain  # about: a slow step costs a teacher more
            assert 0.7 * mean * (1 - slow * 1.2) < saved < mean * (1 - slow)
        else:
            assert 0.8 * mean < saved < mean


def test_a_slow_steps_student_and_teacher_run_every_layer():
    skipper = LayerSkipper(16, 0.25, every=0)
    schedule = Combined(PeriodicSchedule(slow=0.5, keep=0.3, distill=1.0), skipper)
    found = {plan.mode: plan.layers and len(plan.layers) for plan in map(schedule.plan, range(8))}
    assert found == {"slow": None, "fast": 12}
