"""Runs on a pretend GPU."""

from collections import Counter

from support import pretend_cuda, runs

from tinyspeed.training import train
from tinyspeed.training.loop import StageRun


def train_there(monkeypatch, made, resume: bool = False) -> list[tuple[str, Counter]]:
    """Trains a recipe on a pretend GPU. Returns the mode of each step, and what it waited for."""
    found, step = [], StageRun._step
    with pretend_cuda.device() as gpu, monkeypatch.context() as patch:

        def watched(self, *args):
            before = gpu.waits.copy()
            entry = step(self, *args)
            found.append((entry["mode"], gpu.waits - before))
            return entry

        patch.setattr(StageRun, "_step", watched)
        train.train(made, resume=resume, bar=False)
    return found


def on_both(monkeypatch, home, folder, name: str, *changes, family: str = "llava"):
    """The logs of a run on the CPU and on a pretend GPU, and the waits of the latter's steps."""
    here = runs.settings(home, folder, f"{name}-cpu", *changes, family=family)
    there = runs.settings(home, folder, f"{name}-gpu", *changes, "run.device=cuda", family=family)
    train.train(here, bar=False)
    waits = train_there(monkeypatch, there)
    return here, there, waits
