"""The short form of `long_run.py`; and schedules have the right number of slow steps, without training."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom
from slow.attacks import long_run
from slow.attacks.log_checks import UNLIKELY, wrong_lines

from tinyspeed.recipe.schedules import schedule_of

STEPS = 10_000


def test_nothing_grows_the_log_is_true_and_leaks_are_found(tmp_path):
    tried, failures = long_run.attack(tmp_path, {"all of it": 160}, ["python", "files", "log"], 50, times=False)
    assert not failures
    assert tried["losses by transformers, all of it"] >= 1
    assert_false_lines_are_found(long_run.settings(tmp_path, "all of it", 160))


def assert_false_lines_are_found(made):
    """A log that says something else at one step."""
    file, step = made.folder / "metrics.jsonl", 97
    true = file.read_text()
    for key, false in (("lr", 0.5), ("mode", "full"), ("answers", 1), ("layers", 7), ("seconds", 0.0), ("step", 1)):
        logged = [json.loads(line) for line in true.splitlines()]
        logged[step][key] = false
        file.write_text("\n".join(map(json.dumps, logged)))
        assert wrong_lines(made), key
    file.write_text(true)
    assert not wrong_lines(made)


@given(
    many=st.integers(20, 200), every=st.integers(1, 50), grows=st.integers(-50, 500), jump=st.integers(0, 10**8),
    at=st.floats(0, 1),
)  # fmt: skip
def test_what_is_added_once_is_no_growth_and_what_grows_is(many, every, grows, jump, at):
    steps = [every * (number + 1) for number in range(many)]
    samples = [{"step": step, "c": grows * step + jump * (step > at * steps[-1])} for step in steps]
    assert long_run.slope(samples, "c") == pytest.approx(grows)


def slow_steps(tmp_path, kind: str, share: float, seed: int) -> int:
    made = long_run.settings(tmp_path, "bernoulli", 1)
    d = replace(made.dualspeed, schedule=kind, slow=share)
    schedule = schedule_of(replace(made, dualspeed=d, run=replace(made.run, seed=seed)), "train", 3)
    return sum(schedule.plan(step).mode == "slow" for step in range(STEPS))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_drawn_slow_steps_are_as_many_as_chance_allows(share, tmp_path):
    for seed in range(5):
        count = slow_steps(tmp_path, "bernoulli", share, seed)
        assert binom.ppf(UNLIKELY, STEPS, share) <= count <= binom.isf(UNLIKELY, STEPS, share)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.02, 0.1, 0.15, 0.28, 1 / 3, 0.7, 1.0])
def test_periodic_slow_steps_are_exactly_as_many(share, tmp_path):
    assert slow_steps(tmp_path, "periodic", share, 0) == math.floor(STEPS * share + 1e-9)
