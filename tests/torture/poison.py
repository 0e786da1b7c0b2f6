"""NaN, inf and -inf, put into every number that training goes by: the run must stop before the optimizer uses it.

    make torture ONLY=poison       240 of them in one process, every system and kind in turn; some on one of two ranks

Each is put into a run at one step, and then: exit code 2 and one line that names the step, its mode and stage, and
where the number is; every weight and moment as it was before the step, bit for bit; on disk nothing that is not finite,
and the newest checkpoint the last one that was due. The run then goes on without the poison, and must end with the bits
of one that never had any.
"""

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file
from support import tiny
from support.album import album
from support.runs import unlike
from torture import outcome
from torture.poisons import KINDS, VALUES, injected

from tinyspeed import adaptive, cli, recipe
from tinyspeed.data import digits_model
from tinyspeed.training import checkpoint, train

ROOT = Path(__file__).parents[2]
SAVED = 3  # steps between checkpoints
COMMON = (
    "run.threads=1", "run.device=cpu", f"run.save_every={SAVED}", "data.workers=0", "align.steps=3", "align.batch=4",
    "train.steps=12", "train.batch=4", "dualspeed.keep=0.25", "dualspeed.slow=0.3",
)  # fmt: skip
DIGITS = ("digits.side=6", "digits.width=32", "digits.layers=4", "digits.tower_width=32", "digits.pictures=16")
LAYERS = ("sts.skip=0.5", "sts.layers=influence", "sts.every=4")
ANSWERS = ("regate.keep=0.5", "regate.warmup=2", "regate.cycle=4", "regate.refresh=1")
VIEWS = ("lora.rank=2", "dualspeed.views=true")
SYSTEMS = {
    "dualspeed": (),
    "full": ("dualspeed.schedule=full",),
    "untaught": ("dualspeed.distill=0", "train.row_budget=150"),
    "adaptive": ("dualspeed.schedule=adaptive",),
    "sts": LAYERS,
    "regate": ANSWERS,
    "views": VIEWS,
    "learned": ("dualspeed.plugin=dynamicvit", "lora.rank=2"),
    "8-bit": ("lora.rank=2", "train.optimizer=adamw8bit"),
    "fp16": ("lora.rank=2", "model.precision=fp16"),
    "all of it": ("dualspeed.schedule=adaptive", "dualspeed.plugin=dynamicvit", *VIEWS, *LAYERS, *ANSWERS),
    "cache": ("data.feature_cache_gb=1.0", "lora.rank=2"),
}
GATED, MOVED = {"regate", "all of it"}, {"adaptive", "sts", "all of it"}
ONLY = {  # systems that have such a number
    "schedule": MOVED, "when saving, the schedule": MOVED, "remembered": GATED, "when saving, the memory": GATED,
    "cached": {"cache"}, "gradient": {*SYSTEMS} - {"fp16"},  # which may leave that step out
    "kept": {*SYSTEMS} - {"full", "learned", "all of it"},
}  # fmt: skip


def settings(home: Path, system: str, name: str) -> recipe.Recipe:
    """A run of a system."""
    data = (*DIGITS, f"model.path={home / 'base'}")
    if system == "cache":
        data = (
            f"model.path={home / 'llava'}", "data.kind=chat", f"data.file={home / 'train.json'}",
            f"data.images={home / 'images'}",
        )  # fmt: skip
    places = (f"run.name={system.replace(' ', '-')}-{name}", f"run.folder={home / 'runs'}")
    return recipe.read("digits", [*COMMON, *data, *SYSTEMS[system], *places, f"run.cache={home / 'cache'}"])


def prepare(home: Path) -> None:
    """The base models, and pictures with conversations."""
    digits_model.prepare(home / "base", 0, tower_steps=5, **settings(home, "dualspeed", "base").digits.sizes, bar=False)
    tiny.checkpoint("llava", home / "llava")
    album(home, 12)


def steps_of(made: recipe.Recipe) -> list[tuple[str, str]]:
    """Stage and mode of each step of a run that is over."""
    lines = (made.folder / "metrics.jsonl").read_text().splitlines()
    return [(entry["stage"], entry["mode"]) for entry in map(json.loads, lines)]


def begin(steps: list[tuple[str, str]], draw: random.Random) -> int:
    """Each mode of each stage alike: slow steps are rare."""
    wanted = draw.choice(sorted({*steps}))
    return draw.choice([number for number, of in enumerate(steps) if of == wanted])


def saves(steps: list[tuple[str, str]], number: int) -> bool:
    """Whether a checkpoint is due behind this step."""
    stage = [of for of, _ in steps]
    at = stage[: number + 1].count(stage[number])
    return at % SAVED == 0 or stage.count(stage[number]) == at


@dataclass
class Torture:
    """One system, and its undisturbed run."""

    home: Path
    system: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # stage and mode of each

    def __post_init__(self):
        self.whole = settings(self.home, self.system, "whole")
        with quiet():
            train.train(self.whole, bar=False)
        self.steps = steps_of(self.whole)

    def poison(self, kind: str, value: float, seed: int) -> bool:
        """Once; False where the run's steps have no such number from there on."""
        draw = random.Random(f"{self.system} {kind} {value} {seed}")
        return self._once(kind, value, begin(self.steps, draw), draw.randrange(2**32))

    def _once(self, kind: str, value: float, first: int, seed: int) -> bool:
        """In the first step from this one on that has such a number; False if none has."""
        made = settings(self.home, self.system, "poisoned")
        shutil.rmtree(made.folder, ignore_errors=True)
        (self.home / "poisoned.toml").write_text(made.to_toml())
        with injected(kind, value, first, seed) as done, quiet() as said:
            code = cli.main(["train", str(self.home / "poisoned.toml")])
        if done.run is None:
            return False
        stage, mode = self.steps[done.step]
        where = f"{self.system}, {kind}, {value}, step {done.step + 1} ({mode}, {stage}), seed {seed}"
        line = said.getvalue().strip().rpartition("\n")[2]
        if code != 2 or "Traceback" in said.getvalue() or not line.startswith("tinyspeed: "):
            raise Lost(f"{where}: exit code {code}: {said.getvalue()[-300:]}")
        if wrong := done.wrong(line, mode, stage) or look(made, self.steps, done.step):
            raise Lost(f"{where}: {wrong}")
        if kind == "cached":  # what the line says is to be done
            Path(re.search(r" in (\S+\.safetensors) ", line)[1]).unlink()
        with quiet():
            train.train(made, resume=True, bar=False)
        if wrong := unlike(made, self.whole):
            raise Lost(f"{where}: gone on, it ends otherwise: {wrong[:5]}")
        return True


def look(made: recipe.Recipe, steps: list[tuple[str, str]], step: int, left: bool = False) -> str:
    """What is wrong on disk, after a poison in this step of these; "" if nothing is. `left`: one rank left by itself,
    and a checkpoint that was being written then has no name yet."""
    newest = checkpoint.newest(made.folder / "checkpoints")
    due = [number + 1 for number in range(step) if saves(steps, number)]
    if (newest and newest.name) not in [f"step-{at:08d}" if at else None for at in [0, *due][-1 - left :]]:
        return f"the newest checkpoint is {newest}, and {due} were due"
    for file in made.folder.rglob("*.safetensors"):  # not through `checkpoint`, which looks by itself
        tensors = load_file(file).values()
        if not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
            return f"{file} is not finite"
    for file in (*made.folder.rglob("state.json"), *made.folder.rglob("metrics.jsonl")):
        if re.search("NaN|Infinity", file.read_text()):
            return f"{file} is not finite"
    return "there is a model" if (made.folder / "model").exists() else ""


class Lost(Exception):
    """A line about a poison that did harm, or was told wrongly."""


@contextmanager
def quiet():
    """What is said to a user, in one text."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        yield said


def torture(home: Path, systems: list[str], kinds: list[str], count: int, seed: int, say=print) -> tuple[dict, list]:
    """So many poisons, dealt out over all systems and kinds: how many of each kind, a line for each that was lost."""
    tried, lost = {}, []
    prepare(home)
    with mock.patch.object(adaptive, "BLOCK", 4):  # so that a run of a few steps adapts
        every = [Torture(home, system) for system in systems]
        turns = [(one, kind) for kind in kinds for one in every if one.system in ONLY.get(kind, SYSTEMS)]
        for number in range(count):
            (one, kind), value = turns[number % len(turns)], VALUES[(number + number // len(turns)) % len(VALUES)]
            try:
                found = one.poison(kind, value, seed + number)
                tried[kind] = tried.get(kind, 0) + found
            except Lost as error:
                lost.append(str(error))
                say(lost[-1])
            if (number + 1) % 20 == 0:
                say(f"{number + 1} of {count}, {len(lost)} lost")
    return tried, lost


RANKS = Path(__file__).with_name("poisoned_ranks.py")
UNSHARED = ("features", "pixels", "schedule", "remembered", "loss_scale")  # what only the rank that has it can see


def torchrun(home: Path, *words: object) -> tuple[int, str]:
    """Exit code and log of a start on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", RANKS, *words]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*map(str, command)], cwd=home, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    return done.returncode, done.stdout + done.stderr


def on_two_ranks(home: Path, count: int, starts: int, seed: int, say=print) -> tuple[dict, list]:
    """Many in one start, and some that end the ranks, each in a start of its own."""
    code, log = torchrun(home, "many", home, home / "many.json", count, seed)
    assert code == 0, log[-3000:]
    found = json.loads((home / "many.json").read_text())
    tried, lost = found["tried"], found["lost"]
    say(f"{count} on two ranks, {len(lost)} lost")
    whole, made = settings(home, "all of it", "ranks"), settings(home, "all of it", "alone")
    (home / "alone.toml").write_text(made.to_toml())
    for number in range(starts):
        kind, value = UNSHARED[number % len(UNSHARED)], VALUES[number % len(VALUES)]
        shutil.rmtree(made.folder, ignore_errors=True)
        (home / "one.json").unlink(missing_ok=True)
        began = time.monotonic()
        code, log = torchrun(home, "one", home, home / "one.json", kind, value, seed + number)
        took, told = time.monotonic() - began, json.loads((home / "one.json").read_text())
        wrong = told["wrong"] or look(made, steps_of(whole), told["step"], left=True)
        if log.count("tinyspeed: ") != 1 or f"tinyspeed: rank {told['rank']} on " not in log or code != 1:
            wrong = wrong or f"exit code {code}: {log[-2000:]}"
        code, log = torchrun(home, "on", home)
        wrong = wrong or ("" if code == 0 else log[-2000:]) or str(unlike(made, whole)[:5] or "")
        lost += [f"one of two ranks, {kind}, {value}, seed {seed + number}: {wrong}"] * bool(wrong)
        kind = f"on one of two ranks, which leaves: {kind}"
        tried[kind] = tried.get(kind, 0) + 1
        say(f"{kind}: ended in {took:.0f} s, {wrong or 'as it must'}")
    return tried, lost


if __name__ == "__main__":
    parser = outcome.parser(__doc__, count=240)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--kinds", default=";".join(KINDS))
    parser.add_argument("--ranks", type=int, default=24, help="so many more, on one of two ranks")
    parser.add_argument("--starts", type=int, default=5, help="and so many, each in a start of its own")
    asked = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        chosen = asked.systems.split(","), asked.kinds.split(";")
        tried, lost = torture(Path(folder), *chosen, asked.count, asked.seed, say)
        if asked.ranks:
            more, wrong = on_two_ranks(Path(folder), asked.ranks, asked.starts, asked.seed, say)
            tried, lost = {**tried, **more}, lost + wrong
    sys.exit(outcome.write(asked.out, tried, lost))
