"""SIGTERM and SIGHUP in every phase of a run: the code that shells expect, nothing half-written, and the same bits."""

import signal

import pytest
from safetensors.torch import load_file
from support.runs import finish, run_cli, run_held, steps_done, unlike
from support.waiting import HANGS, until

from tinyspeed import recipe

SMALL = (
    "run.threads=1", "run.device=cpu", "run.save_every=2", "data.workers=1", "digits.side=6", "digits.width=32",
    "digits.layers=2", "digits.tower_width=16", "digits.tower_layers=1", "digits.tower_steps=3", "digits.pictures=64",
    "data.eval_pictures=4", "align.steps=2", "align.batch=4", "train.steps=5", "train.batch=4",
)  # fmt: skip
CODES = {signal.SIGTERM: 143, signal.SIGHUP: 129}
BOTH = tuple(CODES)
PHASES = {  # where the command stands still for the first signal, and for the second: after a step, or in a function
    "tower": ("tinyspeed.data.digits_model:_pictures",) * 2,
    "steps of both stages": (1, 3),
    "checkpoint": ("tinyspeed.training.checkpoint:write+",) * 2,
    "model": ("tinyspeed.training.trained_model:_make_readable+",),
    "evaluation": ("tinyspeed.evaluation.accuracy:held_out",) * 2,
}
EXPORT = PHASES["model"][0]


@pytest.fixture(autouse=True)
def terminal():
    """Closing it ends a process, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def demo(home) -> tuple[recipe.Recipe, list[str]]:
    changes = (*SMALL, f"run.folder={home}", f"run.cache={home / 'cache'}")
    return recipe.read("digits", list(changes)), ["demo", *(word for one in changes for word in ("--set", one))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    home = tmp_path_factory.mktemp("whole")
    made, words = demo(home)
    finish(run_cli(*words, folder=home))
    return made


def signalled(home, place: int | str, number: int, *words, made=None) -> str:
    """Runs a command until it stands still, sends the signal and lets it go on; returns what it says."""
    command = run_held(place, "tinyspeed", *words, folder=home)
    there = (home / "held").exists if isinstance(place, str) else lambda: steps_done(made) == place
    until(there, f"it stands still at {place}", command)
    command.send_signal(number)
    (home / "held").unlink(missing_ok=True)
    _, err = command.communicate(timeout=HANGS)
    assert command.returncode == CODES[number], err
    assert "Traceback" not in err
    assert not [path for path in home.rglob("*") if ".tmp" in path.name]
    return err


@pytest.mark.parametrize("phase", PHASES)
def test_a_demo_that_is_told_to_end_in_any_phase_ends_well_and_goes_on(phase, whole, tmp_path):
    made, words = demo(tmp_path)
    for place, number in zip(PHASES[phase], BOTH, strict=False):
        err = signalled(tmp_path, place, number, *words, made=made)
        saves = phase in ("steps of both stages", "checkpoint", "model")
        assert ("saved; the same command goes on" in err) == saves
    finish(run_cli(*words, folder=tmp_path))
    assert not unlike(made, whole)
    assert sorted(path.name for path in made.folder.iterdir()) == sorted(path.name for path in whole.folder.iterdir())


def test_an_export_that_is_told_to_end_leaves_nothing_and_can_be_repeated(whole, tmp_path):
    words = ["export", str(whole.folder), str(tmp_path / "out")]
    for number in BOTH:
        signalled(tmp_path, EXPORT, number, *words)
        assert not list(tmp_path.iterdir())
    finish(run_cli(*words, folder=tmp_path))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", whole.folder / "model"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
