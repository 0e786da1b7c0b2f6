"""Poisons on one of two ranks: the program that torchrun starts.

    poisoned_ranks.py many HOME OUT COUNT SEED         what both ranks must find out together, many in one start
    poisoned_ranks.py one HOME OUT KIND VALUE SEED     what only one rank sees: it must end the other, too
    poisoned_ranks.py on HOME                          that run goes on

A start costs seven seconds. `many` trains, is stopped and goes on within one; `one` is the real program, whose ranks
end. Both leave in OUT what was tried and what was lost.
"""

import gc
import json
import os
import random
import shutil
import sys
from pathlib import Path
from unittest import mock

from support.runs import unlike
from torture.poison import SYSTEMS, begin, look, settings, steps_of
from torture.poisons import VALUES, WITHIN, injected

from scale import __main__, ranks, run
from scale.loop import ShardedStage
from tinyspeed import UserError, adaptive

TOGETHER = ("weight", "moment", "loss", "gradient", "when saving, a weight", "when saving, a moment")
ALIKE = ("full", "untaught", "all of it")  # systems; the first two have steps whose features nobody looks at beforehand
UNSEEN = ("pixels", "features")
COPIES = {"full": ("scale.shard=1",)}  # every rank has a whole model, and could go on with its own
ALONE = "all of it"


def recipe_of(home: Path, system: str, name: str):
    with mock.patch.dict(SYSTEMS, {system: (*SYSTEMS[system], *COPIES.get(system, ()))}):
        return settings(home, system, name)


def many(home: Path, out: Path, count: int, seed: int) -> None:
    tried, lost = {}, []
    with ranks.join() as here:
        for system in ALIKE:
            run.train(recipe_of(home, system, "ranks"), here)
            gc.collect()
        for number in range(count):
            system = ALIKE[number % len(ALIKE)]
            kinds = [*TOGETHER, *UNSEEN] if system == "full" else TOGETHER
            kind, value = kinds[number // len(ALIKE) % len(kinds)], VALUES[number % 7 % len(VALUES)]
            found = together(here, home, system, kind, value, seed + number)
            tried[f"on one of two ranks: {kind}"] = tried.get(f"on one of two ranks: {kind}", 0) + 1
            lost += [f"{system}, {kind}, {value}, seed {seed + number}: {wrong}" for wrong in found if wrong]
            gc.collect()
        if here.is_main:
            out.write_text(json.dumps({"tried": tried, "lost": lost}))


def together(here: ranks.Ranks, home: Path, system: str, kind: str, value: float, seed: int) -> list[str]:
    """What is wrong with a poison on one rank, by what each of them saw."""
    draw = random.Random(f"{system} {kind} {value} {seed}")
    whole, made = recipe_of(home, system, "ranks"), recipe_of(home, system, "poisoned")
    steps, poisoned = steps_of(whole), draw.randrange(here.size)
    if here.is_main:
        shutil.rmtree(made.folder, ignore_errors=True)
    here.barrier()
    first = begin(steps, draw)
    with injected(kind, value, first, draw.randrange(2**32), ShardedStage, here.rank == poisoned) as done:
        try:
            run.train(made, here)
            line = "nothing"
        except UserError as error:
            line = str(error)
    stage, mode = steps[done.step]
    wrong = done.wrong(line, mode, stage)
    if kind != "gradient" and f"on rank {poisoned} " not in line:  # gradients are of all ranks
        wrong = wrong or f"rank {poisoned} is not named: {line}"
    if here.is_main:
        wrong = wrong or look(made, steps, done.step)
    lines = here.gather([line])
    wrong = wrong or ("" if len({*lines}) == 1 else f"ranks are told different things: {lines}")
    done.run = None
    gc.collect()
    run.train(made, here)
    if here.is_main:
        wrong = wrong or str(unlike(made, whole)[:5] or "")
    return here.gather([wrong])


def one(home: Path, out: Path, kind: str, value: float, seed: int) -> None:
    draw = random.Random(f"{kind} {value} {seed}")
    steps, poisoned = steps_of(recipe_of(home, ALONE, "ranks")), draw.randrange(2)
    first = draw.choice([n for n, of in enumerate(steps) if of[1] == "fast"]) if kind in WITHIN else begin(steps, draw)
    leave = ranks.Ranks.abort

    def leaves(here, code, message):
        stage, mode = steps[done.step]
        wrong = done.wrong(message, mode, stage) or ("" if code == ranks.MISTAKE else f"exit code {code}: {message}")
        out.write_text(json.dumps({"wrong": wrong, "step": done.step, "rank": poisoned}))
        leave(here, code, message)

    mine = int(os.environ["RANK"]) == poisoned
    with (
        injected(kind, value, first, draw.randrange(2**32), ShardedStage, mine) as done,
        mock.patch.object(ranks.Ranks, "abort", leaves),
    ):
        sys.exit(__main__.main([str(home / "alone.toml")]))


def main(what: str, home: str, *rest: str) -> None:
    adaptive.BLOCK = 4
    with mock.patch.object(run.report, "draw_run"):
        if what == "many":
            many(Path(home), Path(rest[0]), int(rest[1]), int(rest[2]))
        elif what == "one":
            one(Path(home), Path(rest[0]), rest[1], float(rest[2]), int(rest[3]))
        else:
            sys.exit(__main__.main([str(Path(home) / "alone.toml")]))


if __name__ == "__main__":
    main(*sys.argv[1:])
