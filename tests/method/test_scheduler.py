"""Plans and schedules: a schedule is a function of (seed, step), and of nothing else."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyspeed import UserError, scheduler
from tinyspeed.recipe import from_tables
from tinyspeed.scheduler import Combined, DualSpeedSchedule, FastSchedule, FullSchedule, PeriodicSchedule, Plan

shares = st.floats(0, 1)
seeds = st.integers(-(2**31), 2**63)
steps = st.integers(0, 10**7)
kinds = st.sampled_from([kind for kind in scheduler.KINDS if kind != "adaptive"])  # see test_adaptive.py


def build(kind: str = "bernoulli", slow: float = 0.1, keep: float = 0.1, distill: float = 1.0, seed: int = 0):
    if kind in ("full", "fast"):
        return FullSchedule() if kind == "full" else FastSchedule(keep)
    rare = {"bernoulli": DualSpeedSchedule, "periodic": PeriodicSchedule}
    return rare[kind](slow, keep, distill, seed)


def modes(schedule, n: int) -> list[str]:
    return [schedule.plan(step).mode for step in range(n)]


# Plan


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": 0},
        {"keep": -0.1},
        {"keep": 1.01},
        {"keep": math.nan},
        {"answer_keep": 0},
        {"answer_keep": 1.5},
        {"distill": -1.0},
        {"distill": math.inf},
        {"distill": math.nan},
        {"layers": ()},
        {"layers": (2, 1)},
        {"layers": (1, 1)},
        {"layers": (-1, 0)},  # -1 would run the last layer first, and again in its own place
    ],
    ids=str,
)
def test_a_plan_refuses_what_it_cannot_mean(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Plan("slow", **wrong)


def test_an_unknown_mode_is_refused_with_the_nearest_known_one():
    with pytest.raises(UserError, match="did you mean 'fast'"):
        Plan("fats")


def test_a_plan_is_a_value():
    plan = Plan("slow", keep=0.1, distill=1.0, layers=(0, 2))
    assert plan == Plan("slow", keep=0.1, distill=1.0, layers=(0, 2))
    assert hash(plan) == hash(plan)
    with pytest.raises(AttributeError):
        plan.keep = 0.5


# The draw


@given(seeds, steps)
def test_the_draw_is_the_top_53_bits_of_a_blake2b_hash(seed, step):
    digest = hashlib.blake2b(f"{seed}/{step}".encode("ascii"), digest_size=8).hexdigest()
    assert scheduler.uniform(seed, step) == (int(digest, 16) // 2**11) * 2.0**-53
    assert 0 <= scheduler.uniform(seed, step) < 1


def test_the_draw_is_the_same_in_a_process_that_hashes_strings_differently():
    """Every rank is a process of its own, with its own PYTHONHASHSEED: what leans on hash() or set order differs."""
    code = (
        "from tinyspeed.scheduler import DualSpeedSchedule as S; "
        "print([S(slow=0.5, seed=3).plan(s).mode for s in range(64)])"
    )
    env = {**os.environ, "PYTHONHASHSEED": "4242"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert said == f"{modes(DualSpeedSchedule(slow=0.5, seed=3), 64)}\n"


@given(kinds, shares, seeds, st.permutations(range(12)), st.integers(0, 10**6))
def test_a_plan_does_not_depend_on_which_steps_were_asked_before(kind, slow, seed, order, start):
    schedule = build(kind, slow=slow, seed=seed)
    asked = {step: schedule.plan(start + step) for step in order}
    fresh = [build(kind, slow=slow, seed=seed).plan(start + step) for step in range(12)]
    assert [asked[step] for step in range(12)] == fresh


def test_another_seed_is_another_sequence_of_modes():
    assert modes(DualSpeedSchedule(slow=0.5, seed=0), 64) != modes(DualSpeedSchedule(slow=0.5, seed=1), 64)


# The share of slow steps


@given(st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_the_share_of_slow_steps_converges_to_r(slow, seed):
    n = 2_000
    got = modes(DualSpeedSchedule(slow=slow, seed=seed), n).count("slow")
    # Six standard deviations of a binomial, and one for the discreteness: by luck once in 500 million runs.
    assert abs(got - n * slow) <= 6 * math.sqrt(n * slow * (1 - slow)) + 1


@given(shares, st.integers(0, 500))
def test_a_periodic_schedule_has_exactly_its_share_in_every_prefix(slow, n):
    assert modes(PeriodicSchedule(slow=slow), n).count("slow") == math.floor(n * slow + 1e-9)


@pytest.mark.parametrize("every", [1, 2, 3, 10, 49, 50])
def test_a_periodic_share_of_one_in_n_is_the_last_of_every_n_steps(every):
    got = modes(PeriodicSchedule(slow=1 / every), 10 * every)  # 49 * (1 / 49) is a hair below 1
    assert got == (["fast"] * (every - 1) + ["slow"]) * 10


@given(kinds, shares, st.floats(0.01, 1), st.floats(0, 10), steps)
def test_plans_carry_the_settings_of_their_mode(kind, slow, keep, distill, step):
    plan = build(kind, slow=slow, keep=keep, distill=distill).plan(step)
    wanted = {
        "full": Plan("full"),
        "fast": Plan("fast", keep=keep),  # a fast step has no teacher: distill is 0 whatever was asked
        "slow": Plan("slow", keep=keep, distill=distill),
    }
    assert plan == wanted[plan.mode]
    assert plan.mode in {"full": ("full",), "fast": ("fast",)}.get(kind, ("fast", "slow"))


@given(seeds)
def test_shares_of_zero_and_one_are_exact(seed):
    for kind in (DualSpeedSchedule, PeriodicSchedule):
        assert set(modes(kind(slow=0.0, seed=seed), 50)) == {"fast"}
        assert set(modes(kind(slow=1.0, seed=seed), 50)) == {"slow"}


# State


@given(kinds, shares, st.floats(0.01, 1), st.floats(0, 10), seeds)
def test_a_state_dict_survives_json_and_is_accepted_back(kind, slow, keep, distill, seed):
    settings = {"slow": slow, "keep": keep, "distill": distill, "seed": seed}
    state = json.loads(json.dumps(build(kind, **settings).state_dict()))
    other = build(kind, **settings)
    other.load_state_dict(state)
    assert other.state_dict() == state


@pytest.mark.parametrize(
    "other",
    [
        DualSpeedSchedule(slow=0.1, seed=1),
        DualSpeedSchedule(slow=0.2, seed=0),
        DualSpeedSchedule(slow=0.1, keep=0.2),
        PeriodicSchedule(slow=0.1, seed=0),
        FastSchedule(),
        FullSchedule(),
    ],
    ids=lambda s: str(s.state_dict()),
)
def test_the_state_of_another_schedule_is_refused(other):
    with pytest.raises(UserError, match="checkpoint"):
        DualSpeedSchedule(slow=0.1, seed=0).load_state_dict(other.state_dict())


# Building


@pytest.mark.parametrize("slow", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("kind", ["bernoulli", "periodic"])
def test_a_share_of_slow_steps_outside_0_to_1_is_refused(kind, slow):
    with pytest.raises(UserError, match="slow"):
        build(kind, slow=slow)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("fast", {"keep": 0.0}),
        ("bernoulli", {"keep": 1.5}),
        ("bernoulli", {"distill": -1.0}),
        ("periodic", {"keep": math.nan}),
        ("periodic", {"distill": math.inf}),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_when_the_schedule_is_built_and_not_at_some_later_step(kind, wrong):
    """The first slow step may come after an hour: its settings must not wait for it."""
    with pytest.raises(UserError, match=next(iter(wrong))):
        build(kind, **wrong)


def test_an_unknown_schedule_is_refused_with_the_nearest_known_one():
    with pytest.raises(UserError, match="did you mean 'periodic'"):
        from_tables({"dualspeed": {"schedule": "periodical"}, "train": {"steps": 1}}, "a recipe")


class Fewer:
    """A part that halves what is kept on even steps."""

    def __init__(self, every: int = 2):
        self.every = every

    def change(self, plan: Plan, step: int) -> Plan:
        return plan if step % self.every else dataclasses.replace(plan, keep=plan.keep / 2, layers=(0, 1))

    def state_dict(self) -> dict:
        return {"every": self.every}

    def load_state_dict(self, state: dict) -> None:
        if state != self.state_dict():
            raise UserError("another part")


@given(kind=kinds, seed=seeds, step=steps)
def test_parts_change_the_plan_in_turn_and_nothing_else(kind, seed, step):
    plan = build(kind, seed=seed).plan(step)
    assert Combined(build(kind, seed=seed)).plan(step) == plan
    once, twice = Combined(build(kind, seed=seed), Fewer()), Combined(build(kind, seed=seed), Fewer(1), Fewer())
    assert once.plan(step).keep == plan.keep / (1 if step % 2 else 2)
    assert twice.plan(step) == dataclasses.replace(plan, keep=plan.keep / (2 if step % 2 else 4), layers=(0, 1))


def test_a_combined_schedules_state_is_that_of_all():
    made = Combined(build(), Fewer())
    made.load_state_dict(json.loads(json.dumps(made.state_dict())))
    for other in (Combined(build(seed=1), Fewer()), Combined(build(), Fewer(3)), Combined(build()), build()):
        with pytest.raises(UserError):
            other.load_state_dict(made.state_dict())
