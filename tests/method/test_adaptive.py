"""The adaptive share of slow steps: bounded, known ahead, deaf to all but the gap; and the gap that it follows."""

import json
import math
from fractions import Fraction

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from support.runs import ADAPTIVE, settings
from torch.nn import functional as F

from tinyspeed import DualSpeed, UserError, adaptive, recipe
from tinyspeed.adaptive import AdaptiveSchedule
from tinyspeed.bench import estimate
from tinyspeed.data import loader
from tinyspeed.data.examples import Example
from tinyspeed.recipe import schedules
from tinyspeed.scheduler import Combined, DualSpeedSchedule, Plan
from tinyspeed.sts import LayerSkipper
from tinyspeed.training import train
from tinyspeed.training.loop import StageRun

SLOW = Plan("slow", keep=0.1, distill=1.0)
seeds = st.integers(0, 2**31)
starts = st.floats(0.01, 1)
gaps = st.floats(0.001, 10)
losses = st.floats(0, 100)
seen = st.lists(st.tuples(st.integers(0, 40), losses, losses, st.integers(1, 50)), max_size=30)  # steps in order
everything = st.floats()  # infinities and NaN too


def made(slow=0.1, gap=0.05, seed=0, block=4) -> AdaptiveSchedule:
    schedule = AdaptiveSchedule(slow, seed=seed, gap=gap)
    schedule.block = block
    return schedule


@pytest.mark.parametrize("share", [math.nan, math.inf, -math.inf])
def test_a_share_that_is_not_finite_is_no_share(share):
    """Nothing is below NaN: no step would be slow again, and nobody would be told."""
    schedule = made()
    schedule.shares[1] = share
    schedule.plan(0)
    with pytest.raises(UserError, match=f"share of slow steps is {share}"):
        schedule.plan(4)


def watch(schedule, history):
    for step, full, fast, answers in sorted(history):
        schedule.observe(SLOW, {"step": step, "ce": full, "ce_teacher": fast, "answers": answers})
    return schedule


def slow_steps(schedule, steps) -> list[int]:
    return [step for step in steps if schedule.plan(step).mode == "slow"]


# The share


@given(starts, gaps, st.integers(1, 5), seen)
def test_the_share_is_its_definition(slow, gap, block, history):
    """In exact fractions: only blocks up to two before a step's own count, and each changes the share once."""
    schedule = watch(made(slow, gap, block=block), history)
    for now in range(0, 60, block):
        share = Fraction(slow)
        for b in range(now // block - 1):
            of = [(full, fast, n) for step, full, fast, n in history if step // block == b]
            if of:
                mean = sum((Fraction(full) - Fraction(fast)) * n for full, fast, n in of) / sum(n for _, _, n in of)
                x = min(max(mean / Fraction(gap), 0), 2)
                share *= (1 + x) / 2 if x < 1 else x
                share = min(max(share, Fraction(slow) / 4), min(1, 4 * Fraction(slow)))
        known = min(now // block, len(schedule.shares) - 1)
        assert schedule.shares[known] == pytest.approx(float(share), rel=1e-6)


@given(starts, gaps, st.lists(st.tuples(st.integers(0, 40), everything, everything, st.integers(0, 50)), max_size=20))
def test_the_share_stays_within_its_bounds_whatever_was_seen(slow, gap, history):
    schedule = watch(made(slow, gap), history)
    assert all(slow / 4 <= share <= min(1, 4 * slow) for share in schedule.shares)


@given(starts, gaps, seeds, seen, st.permutations(range(60)), st.integers(1, 5))
def test_a_plan_that_may_be_asked_for_stays_what_it_was(slow, gap, seed, history, order, block):
    """Whoever asks, in whatever order, whatever is seen afterwards: a step's plan is settled `ahead` steps before."""
    schedule, fresh, settled = made(slow, gap, seed, block), made(slow, gap, seed, block), {}
    for step in range(41):
        for other in [other for other in order if other <= step + schedule.ahead]:
            settled.setdefault(other, schedule.plan(other))
        now = [entry for entry in history if entry[0] == step]
        watch(schedule, now), watch(fresh, now)
    assert {step: fresh.plan(step) for step in settled} == settled


@given(starts, gaps, seeds, seen, st.integers(0, 29), st.floats(0, 50))
def test_a_larger_gap_never_gives_fewer_slow_steps(slow, gap, seed, history, which, more):
    worse = [(s, full + more * (i == which), fast, n) for i, (s, full, fast, n) in enumerate(history)]
    few, many = (set(slow_steps(watch(made(slow, gap, seed), h), range(80))) for h in (history, worse))
    assert few <= many


def closed_loop(schedule, steps: range, full: float, fast: float) -> list[int]:
    """The slow steps of a run whose losses are always these."""
    found = []
    for step in steps:
        plan = schedule.plan(step)
        if plan.mode == "slow":
            found.append(step)
        schedule.observe(plan, {"step": step, "ce": full, "ce_teacher": fast, "answers": 7})
    return found


@pytest.mark.parametrize(
    ("gap", "factor"),
    [(0.0, 1 / 4), (-0.5, 1 / 4), (0.05, 1), (0.1, 4), (5.0, 4)],
    ids=["none", "better", "fine", "twice", "huge"],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_gap_that_stays_leads_to_a_bound_and_so_do_the_steps(gap, factor, seed):
    schedule = AdaptiveSchedule(0.1, seed=seed, gap=0.05)
    found = closed_loop(schedule, range(8_000), 2.0 + gap, 2.0)
    assert schedule.shares[-1] == pytest.approx(0.1 * factor, rel=1e-9)
    late, share = [step for step in found if step >= 4_000], 0.1 * factor
    assert abs(len(late) - 4_000 * share) < 5 * math.sqrt(4_000 * share * (1 - share))


@given(seeds, st.floats(0.05, 1), st.integers(1, 20))
def test_a_share_at_its_lower_bound_finds_its_way_up_again(seed, slow, block):
    """It is never 0, so slow steps come, and a gap is seen."""
    schedule = watch(made(slow, seed=seed, block=block), [(step, 1.0, 1.0, 1) for step in range(0, 4 * block, block)])
    assert schedule.shares[-1] == slow / 4
    closed_loop(schedule, range(4 * block, 2_000), 2.0, 1.0)
    assert schedule.shares[-1] == min(1, 4 * slow)


def test_a_block_without_slow_steps_and_a_fast_step_change_nothing():
    schedule = watch(made(), [(0, 1.0, 1.0, 3), (21, 1.0, 1.0, 3)])
    before = list(schedule.shares)
    schedule.observe(Plan("fast", keep=0.1), {"step": 22, "ce": 9.0, "ce_teacher": 0.0, "answers": 3})
    assert schedule.shares == before
    assert before == [0.1, 0.1, *[0.05] * 5, 0.025]
    assert schedule.plan(10**6) == made(slow=0.025).plan(10**6), "beyond what is known: the newest share"


# State


@given(starts, gaps, seeds, seen, st.integers(1, 5), st.integers(0, 40))
def test_the_state_survives_json_and_goes_on_as_if_nothing_had_been(slow, gap, seed, history, block, cut):
    whole = watch(made(slow, gap, seed, block), history)
    first = watch(made(slow, gap, seed, block), [entry for entry in history if entry[0] < cut])
    state = first.state_dict()
    said = json.dumps(state)
    watch(first, [entry for entry in history if entry[0] >= cut])
    assert json.dumps(state) == said, "what is seen later does not reach a state that was taken before"
    second = made(slow, gap, seed, block)
    second.load_state_dict(json.loads(said))
    watch(second, [entry for entry in history if entry[0] >= cut])
    assert [second.plan(step) for step in range(60)] == [whole.plan(step) for step in range(60)]
    assert second.state_dict() == whole.state_dict() == first.state_dict()


@pytest.mark.parametrize("changed", [{"gap": 0.1}, {"slow": 0.2}, {"seed": 1}, {"block": 5}], ids=str)
def test_the_state_of_other_settings_is_refused(changed):
    with pytest.raises(UserError, match="checkpoint was made with schedule"):
        made(**changed).load_state_dict(made().state_dict())
    with pytest.raises(UserError, match="checkpoint was made with schedule"):
        made().load_state_dict(DualSpeedSchedule(0.1, 0.1, 1, 0).state_dict())


# The gap


@hypothesis.settings(max_examples=10)  # three forwards each
@given(seeds, st.sampled_from([0.5, 1.0, 3.0]), st.integers(1, 9), st.sampled_from([0.2, 0.6]))
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_teachers_cross_entropy_is_that_of_a_fast_forward_of_its_own(family, seed, temperature, chunk, keep):
    model = DualSpeed(tiny.model(family), temperature=temperature, chunk=chunk)
    batch = tiny.batch(family, seed % 1000)
    slow = model(**batch, plan=Plan("slow", keep=keep, distill=1.0)).metrics
    fast = model(**batch, plan=Plan("fast", keep=keep), return_logits=True)
    want = F.cross_entropy(fast.logits.float(), fast.targets)
    assert slow["ce_teacher"].item() == pytest.approx(want.item(), rel=1e-5)
    assert slow["answers"] == len(fast.targets)
    for plan in (Plan("fast", keep=keep), Plan("full"), Plan("slow", keep=keep)):  # nobody teaches
        assert model(**batch, plan=plan).metrics["ce_teacher"].item() == 0


# In a run


def test_nothing_is_made_further_ahead_than_plans_are_known(home, tmp_path, monkeypatch):
    """How far a worker is ahead is torch's business, and changing it must not pass unnoticed."""
    monkeypatch.setattr(loader, "at_most", lambda workers: workers)
    asked, begun, ahead = [], [], []
    plan, step = AdaptiveSchedule.plan, StageRun._step
    monkeypatch.setattr(AdaptiveSchedule, "plan", lambda self, step: asked.append(step) or plan(self, step))

    def watched(self, number, *given):
        begun.append(number)
        entry = step(self, number, *given)
        ahead.append(max(asked[before[0] :]) - number)
        return entry

    before = []
    monkeypatch.setattr(StageRun, "_step", watched)
    monkeypatch.setattr(StageRun, "_announce", lambda self: None)
    monkeypatch.setattr(StageRun, "_probe", lambda self: before.append(len(asked)))
    monkeypatch.setattr(adaptive, "BLOCK", 4)
    made = settings(home, tmp_path, "run", *ADAPTIVE, "data.workers=9", "train.row_budget=0", "train.steps=12")
    train.train(made, bar=False)
    assert max(ahead) == 4, "two workers of nine, two batches each"


class Counted:
    def example(self, i):
        return Example(torch.tensor([i]), torch.tensor([i]))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_is_as_far_ahead_as_the_loader_says(workers, monkeypatch):
    monkeypatch.setattr(loader, "at_most", lambda workers: workers)
    pulled = []

    def parts():
        for i in range(12):
            pulled.append(i)
            yield [i]

    for number, _ in enumerate(loader.batches(Counted(), parts(), 0, workers=workers)):
        assert pulled[-1] <= number + workers * loader.PREFETCH
    assert pulled == list(range(12))


# Asked for


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("dualspeed.distill=0", "there is no teacher"),
        ("dualspeed.slow=0", "a share above 0"),
        ("dualspeed.gap=0", "must be above 0"),
        ("dualspeed.gap=-1", "must be above 0"),
        ("dualspeed.gapp=1", "did you mean 'dualspeed.gap'"),
    ],
)
def test_what_it_cannot_follow_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        recipe.read("digits", ["dualspeed.schedule=adaptive", change])


@pytest.mark.parametrize("gap", [0.0, -1.0, math.nan, math.inf])
def test_a_gap_that_means_nothing_is_refused(gap):
    with pytest.raises(UserError, match="gap"):
        AdaptiveSchedule(gap=gap)


def test_a_recipes_schedule_is_it_in_tuning_only():
    made = recipe.read("digits", ["dualspeed.schedule=adaptive", "dualspeed.slow=0.3", "dualspeed.gap=0.2"])
    schedule = schedules.schedule_of(made, "train", 3)
    assert schedule.state_dict() == {
        "kind": "AdaptiveSchedule", "slow": 0.3, "keep": made.dualspeed.keep, "distill": 1.0, "seed": 0, "gap": 0.2,
        "block": adaptive.BLOCK, "sums": [],
    }  # fmt: skip
    assert schedules.schedule_of(made, "align", 3).plan(0) == Plan("fast", keep=made.dualspeed.keep)
    assert estimate.shares(made, "train") == {"fast": 0.7, "slow": 0.3}
    assert estimate.shares(made, "align") == {"fast": 1.0}


def test_beside_skipped_layers_each_part_hears_what_it_wants():
    skipper = LayerSkipper(3, 0.34, "influence", 0, 0, every=0)
    both = Combined(made(block=2), skipper)
    assert both.ahead == 2
    plan = Plan("slow", keep=0.1, distill=1.0, measure=True)
    both.observe(plan, {"step": 0, "ce": 1.0, "ce_teacher": 1.0, "answers": 5, "influence": [3.0, 1.0, 2.0]})
    assert both.schedule.shares == [0.1, 0.1, 0.05]
    assert (skipper.sums, skipper.answers) == ([3.0, 1.0, 2.0], 5)
    other = Combined(made(block=2), LayerSkipper(3, 0.34, "influence", 0, 0, every=0))
    other.load_state_dict(json.loads(json.dumps(both.state_dict())))
    assert [other.plan(step) for step in range(20)] == [both.plan(step) for step in range(20)]
