"""A number that is not finite on one of two ranks: the program that torchrun starts for `not_finite.py`.

    not_finite_ranks.py many HOME OUT COUNT SEED         numbers that both ranks must find together, many in one start
    not_finite_ranks.py one HOME OUT KIND VALUE SEED     a number that one rank sees: it must end the other one, too
    not_finite_ranks.py resume HOME                      that run goes on

A start costs seconds, so `many` trains, is stopped and goes on within one start. `one` is the real program, whose ranks
end. Both write what they tried and what failed to OUT.
"""

import gc
import json
import os
import random
import shutil
import sys
from pathlib import Path
from unittest import mock

from slow.attacks.injections import VALUES, WITHIN, injected
from slow.attacks.not_finite import MODES, SYSTEMS, drawn_step, settings, steps_of, wrong_on_disk
from support.runs import unlike

from scale import __main__, ranks, run
from scale.loop import ShardedStage
from tinyspeed import UserError, adaptive

TOGETHER = ("weight", "moment", "loss", "gradient", "when saving, a weight", "when saving, a moment")
MANY = ("full", "no distillation", "all of it")  # systems; the first two have steps that do not check their features
UNCHECKED = ("pixels", "features")
COPIES = {"full": ("scale.shard=1",)}  # every rank has a whole model, and could go on with its own
ONE = "all of it"


def recipe_of(home: Path, system: str, name: str):
    with mock.patch.dict(SYSTEMS, {system: (*SYSTEMS[system], *COPIES.get(system, ()))}):
        return settings(home, system, name)


def many(home: Path, out: Path, count: int, seed: int) -> None:
    tried, failures = {}, []
    with ranks.join() as here:
        for system in MANY:
            run.train(recipe_of(home, system, "ranks"), here)
            gc.collect()
        for number in range(count):
            system = MANY[number % len(MANY)]
            kinds = [*TOGETHER, *UNCHECKED] if system == "full" else TOGETHER
            kind, value = kinds[number // len(MANY) % len(kinds)], VALUES[number % 7 % len(VALUES)]
            found = together(here, home, system, kind, value, seed + number)
            tried[f"on one of two ranks: {kind}"] = tried.get(f"on one of two ranks: {kind}", 0) + 1
            failures += [f"{system}, {kind}, {value}, seed {seed + number}: {wrong}" for wrong in found if wrong]
            gc.collect()
        if here.is_main:
            out.write_text(json.dumps({"tried": tried, "failures": failures}))


def together(here: ranks.Ranks, home: Path, system: str, kind: str, value: float, seed: int) -> list[str]:
    """Inject a number on one rank. Returns what is wrong with how the run ended, as each of the ranks saw it."""
    draw = random.Random(f"{system} {kind} {value} {seed}")
    whole, made = recipe_of(home, system, "ranks"), recipe_of(home, system, "injected")
    steps, damaged = steps_of(whole), draw.randrange(here.size)
    if here.is_main:
        shutil.rmtree(made.folder, ignore_errors=True)
    here.barrier()
    # Before pruning, a fast step refuses such features on each rank by itself, and no rank is named.
    modes = ("slow",) if (system, kind) == ("no distillation", "weight") else MODES
    first = drawn_step(steps, draw, modes)
    with injected(kind, value, first, draw.randrange(2**32), ShardedStage, here.rank == damaged) as done:
        try:
            run.train(made, here)
            line = "nothing"
        except UserError as error:
            line = str(error)
    stage, mode = steps[done.step]
    wrong = done.wrong(line, mode, stage)
    if kind != "gradient" and f"on rank {damaged} " not in line:  # a gradient is the sum of all ranks'
        wrong = wrong or f"rank {damaged} is not named: {line}"
    if here.is_main:
        wrong = wrong or wrong_on_disk(made, steps, done.step)
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
    steps, damaged = steps_of(recipe_of(home, ONE, "ranks")), draw.randrange(2)
    fast = [number for number, (_, mode) in enumerate(steps) if mode == "fast"]
    first = draw.choice(fast) if kind in WITHIN else drawn_step(steps, draw)
    abort = ranks.Ranks.abort

    def aborts(here, code, message):
        stage, mode = steps[done.step]
        wrong = done.wrong(message, mode, stage) or ("" if code == ranks.MISTAKE else f"exit code {code}: {message}")
        out.write_text(json.dumps({"wrong": wrong, "step": done.step, "rank": damaged}))
        abort(here, code, message)

    mine = int(os.environ["RANK"]) == damaged
    with (
        injected(kind, value, first, draw.randrange(2**32), ShardedStage, mine) as done,
        mock.patch.object(ranks.Ranks, "abort", aborts),
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
