"""A program whose run stands still behind one of its steps, until it is told to stop or is killed.

    python held_run.py STEP tinyspeed train recipe.toml
    torchrun --nproc-per-node 2 held_run.py STEP scale recipe.toml      (the last rank stands still)
    python held_run.py MODULE:FUNCTION tinyspeed train recipe.toml

A test that kills or stops the run then always does so at this step, however busy the machine is. Ranks that torchrun
has started again do not stand still. The third one stands still where this function is first called, or, with a + after
its name, where it returns: there is a file `held` in the working directory then, and it goes on once that is deleted.
`scale` finds out from its clock that a rank makes no progress; here this clock runs away as soon as the working
directory has a file `late`, so no test has to wait for `scale.timeout`.
"""

import importlib
import os
import runpy
import sys
import time
from pathlib import Path

from tinyspeed.training.loop import StageRun

LAST = int(os.environ.get("RANK", 0)) + 1 == int(os.environ.get("WORLD_SIZE", 1))


def hold(kind: type[StageRun], behind: int) -> None:
    """Stand still where such a run asks whether it is to stop."""
    stops = kind._stops

    def held(self, stop: list[int], *late: bool) -> tuple[bool, bool]:
        while self.totals.steps == behind and not stop:
            time.sleep(0.01)
        return stops(self, stop, *late)

    kind._stops = held


def hold_at(place: str) -> None:
    """Stand still where this function is first called, or returns."""
    module, _, name = place.rstrip("+").partition(":")
    owner, waits = importlib.import_module(module), [Path("held")]
    original = getattr(owner, name)

    def wait() -> None:
        for mark in waits[:]:
            waits.clear()
            mark.touch()
            while mark.exists():
                time.sleep(0.01)

    def held(*given, **how):
        if not place.endswith("+"):
            wait()
        found = original(*given, **how)
        wait()
        return found

    setattr(owner, name, held)


class Runaway:
    """A clock that has gone on by an hour whenever one looks, once somebody is late."""

    hours = 0

    def monotonic(self) -> float:
        self.hours += Path("late").exists()
        return time.monotonic() + 3600 * self.hours

    sleep = staticmethod(time.sleep)


if __name__ == "__main__":
    _, behind, module, *arguments = sys.argv
    kind = StageRun
    if module == "scale":
        from scale import loop, ranks

        kind, ranks.time = loop.ShardedStage, Runaway()
    if ":" in behind:
        hold_at(behind)
    elif LAST and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        hold(kind, int(behind))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
