"""NaN, inf and -inf in every number that training depends on: the run must stop before the optimizer uses the number.

    make torture ONLY=not_finite       240 injections, every system and kind in turn, and some on one of two ranks

Each injection happens at one step of a run. The command must then end with exit code 2 and one line that names the
step, its mode and stage, and where the number is. Every weight and moment must be as it was before the step, bit for
bit. On disk everything is finite, and the newest checkpoint is the last one that was due. The run then goes on without
the number, and must end with the same bits as one that never had it.
"""

import io
import json
import random
import re
import shutil
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file
from slow.attacks import outcomes
from slow.attacks.injections import KINDS, VALUES, injected
from support import tiny
from support.album import album
from support.launching import log, torchrun
from support.runs import log_of, unlike
from support.waiting import HANGS

from tinyspeed import adaptive, cli, recipe
from tinyspeed.data import digits_model
from tinyspeed.training import checkpoint, train

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
    "no distillation": ("dualspeed.distill=0", "train.row_budget=150"),
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
MODES = ("fast", "full", "slow")
REGATE, ADAPTS = {"regate", "all of it"}, {"adaptive", "sts", "all of it"}
ONLY = {  # the systems that have such a number
    "schedule": ADAPTS, "when saving, the schedule": ADAPTS, "difficulty": REGATE, "when saving, a difficulty": REGATE,
    "cached": {"cache"}, "gradient": {*SYSTEMS} - {"fp16"},  # fp16 may skip that step
    "kept": {*SYSTEMS} - {"full", "learned", "all of it"},
}  # fmt: skip


def settings(home: Path, system: str, name: str) -> recipe.Recipe:
    """The recipe of a run of this system."""
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
    """Stage and mode of each step of a run that has ended."""
    return [(line["stage"], line["mode"]) for line in log_of(made)]


def drawn_step(steps: list[tuple[str, str]], draw: random.Random, modes: tuple[str, ...] = MODES) -> int:
    """Draws a step of these modes. Each mode of each stage is equally likely, although slow steps are rare."""
    wanted = draw.choice(sorted({(stage, mode) for stage, mode in steps if mode in modes}))
    return draw.choice([number for number, of in enumerate(steps) if of == wanted])


def saves(steps: list[tuple[str, str]], number: int) -> bool:
    """Whether a checkpoint is due after this step."""
    stage = [of for of, _ in steps]
    at = stage[: number + 1].count(stage[number])
    return at % SAVED == 0 or stage.count(stage[number]) == at


@dataclass
class Attack:
    """One system and its undisturbed run."""

    home: Path
    system: str
    steps: list[tuple[str, str]] = field(default_factory=list)  # stage and mode of each

    def __post_init__(self):
        self.whole = settings(self.home, self.system, "whole")
        with quiet():
            train.train(self.whole, bar=False)
        self.steps = steps_of(self.whole)

    def inject(self, kind: str, value: float, seed: int) -> bool:
        """Make one number of a run not finite. Returns False if no step from the drawn one on has such a number."""
        draw = random.Random(f"{self.system} {kind} {value} {seed}")
        first, seed_within = drawn_step(self.steps, draw), draw.randrange(2**32)
        made = settings(self.home, self.system, "injected")
        shutil.rmtree(made.folder, ignore_errors=True)
        (self.home / "injected.toml").write_text(made.to_toml())
        with injected(kind, value, first, seed_within) as done, quiet() as said:
            code = cli.main(["train", str(self.home / "injected.toml")])
        if done.run is None:
            return False
        stage, mode = self.steps[done.step]
        where = f"{self.system}, {kind}, {value}, step {done.step + 1} ({mode}, {stage}), seed {seed}"
        line = said.getvalue().strip().rpartition("\n")[2]
        if code != 2 or "Traceback" in said.getvalue() or not line.startswith("tinyspeed: "):
            raise Failed(f"{where}: exit code {code}: {said.getvalue()[-300:]}")
        if wrong := done.wrong(line, mode, stage) or wrong_on_disk(made, self.steps, done.step):
            raise Failed(f"{where}: {wrong}")
        with quiet():
            train.train(made, resume=True, bar=False)
        if wrong := unlike(made, self.whole):
            raise Failed(f"{where}: resumed, it has another end: {wrong[:5]}")
        return True


def wrong_on_disk(made: recipe.Recipe, steps: list[tuple[str, str]], step: int, alone: bool = False) -> str:
    """Returns what is wrong on disk after this step got the number; "" if nothing is. `alone`: one rank left by itself,
    so the checkpoint that was being written may have no name yet."""
    newest = checkpoint.newest(made.folder / "checkpoints")
    due = [number + 1 for number in range(step) if saves(steps, number)]
    if (newest and newest.name) not in [f"step-{at:08d}" if at else None for at in [0, *due][-1 - alone :]]:
        return f"the newest checkpoint is {newest}, and {due} were due"
    for file in made.folder.rglob("*.safetensors"):  # not with `checkpoint`, which has a check of its own
        tensors = load_file(file).values()
        if not all(t.isfinite().all() for t in tensors if t.is_floating_point()):
            return f"{file} is not finite"
    for file in (*made.folder.rglob("state.json"), *made.folder.rglob("metrics.jsonl")):
        if re.search("NaN|Infinity", file.read_text()):
            return f"{file} is not finite"
    return "there is a model" if (made.folder / "model").exists() else ""


class Failed(Exception):
    """A number that did harm, or that the user was told wrongly about."""


@contextmanager
def quiet():
    """Collects everything that the user would see."""
    said = io.StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        yield said


def attack(home: Path, systems: list[str], kinds: list[str], count: int, seed: int, say=print) -> tuple[dict, list]:
    """So many injections, dealt out over all systems and kinds. Returns how many there were of each kind, and a line
    for each that failed."""
    tried, failures = {}, []
    prepare(home)
    with mock.patch.object(adaptive, "BLOCK", 4):  # so that a run of a few steps adapts
        every = [Attack(home, system) for system in systems]
        turns = [(one, kind) for kind in kinds for one in every if one.system in ONLY.get(kind, SYSTEMS)]
        for number in range(count):
            (one, kind), value = turns[number % len(turns)], VALUES[(number + number // len(turns)) % len(VALUES)]
            try:
                found = one.inject(kind, value, seed + number)
                tried[kind] = tried.get(kind, 0) + found
            except Failed as error:
                failures.append(str(error))
                say(failures[-1])
            if (number + 1) % 20 == 0:
                say(f"{number + 1} of {count}, {len(failures)} failed")
    return tried, failures


RANKS = Path(__file__).with_name("not_finite_ranks.py")
UNSHARED = ("features", "pixels", "schedule", "difficulty", "loss_scale")  # only the rank that has it can see it


def on_ranks(home: Path, *words: object) -> tuple[int, str]:
    """Exit code and log of two ranks."""
    (home / "log").unlink(missing_ok=True)
    code = torchrun(home, RANKS, *words).wait(2 * HANGS)
    return code, log(home)


def on_two_ranks(home: Path, count: int, starts: int, seed: int, say=print) -> tuple[dict, list]:
    """Many injections in one start, and some that end the ranks, each in a start of its own."""
    code, said = on_ranks(home, "many", home, home / "many.json", count, seed)
    assert code == 0, said[-3000:]
    found = json.loads((home / "many.json").read_text())
    tried, failures = found["tried"], found["failures"]
    say(f"{count} on two ranks, {len(failures)} failed")
    whole, made = settings(home, "all of it", "ranks"), settings(home, "all of it", "alone")
    (home / "alone.toml").write_text(made.to_toml())
    for number in range(starts):
        kind, value = UNSHARED[number % len(UNSHARED)], VALUES[number % len(VALUES)]
        shutil.rmtree(made.folder, ignore_errors=True)
        (home / "one.json").unlink(missing_ok=True)
        code, said = on_ranks(home, "one", home, home / "one.json", kind, value, seed + number)
        told = json.loads((home / "one.json").read_text())
        wrong = told["wrong"] or wrong_on_disk(made, steps_of(whole), told["step"], alone=True)
        if said.count("tinyspeed: ") != 1 or f"tinyspeed: rank {told['rank']} on " not in said or code != 1:
            wrong = wrong or f"exit code {code}: {said[-2000:]}"
        code, said = on_ranks(home, "resume", home)
        wrong = wrong or ("" if code == 0 else said[-2000:]) or str(unlike(made, whole)[:5] or "")
        failures += [f"one of two ranks, {kind}, {value}, seed {seed + number}: {wrong}"] * bool(wrong)
        kind = f"on one of two ranks, which leaves: {kind}"
        tried[kind] = tried.get(kind, 0) + 1
        say(f"{kind}: {wrong or 'as it must be'}")
    return tried, failures


if __name__ == "__main__":
    parser = outcomes.parser(__doc__, count=240)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--kinds", default=";".join(KINDS))
    parser.add_argument("--ranks", type=int, default=24, help="so many more on one of two ranks, all in one start")
    parser.add_argument("--starts", type=int, default=5, help="and so many more, each in a start of its own")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = asked.systems.split(","), asked.kinds.split(";")
        tried, failures = attack(Path(folder), *chosen, asked.count, asked.seed, outcomes.say)
        if asked.ranks:
            more, wrong = on_two_ranks(Path(folder), asked.ranks, asked.starts, asked.seed, outcomes.say)
            tried, failures = {**tried, **more}, failures + wrong
    sys.exit(outcomes.write(asked.out, tried, failures))
