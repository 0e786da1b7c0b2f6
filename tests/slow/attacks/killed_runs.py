"""SIGKILL at random moments, again and again: the run must end with the same bits as one that was never killed.

    make torture ONLY=killed_runs        200 kills: every system in turn, on one process and on two

Each attempt starts the command that a user would type again, and kills it at one of three moments: at any moment, also
while it starts or resumes; while it writes a checkpoint; or as soon as a checkpoint has its name. If the run ends
before that moment, it is compared with the undisturbed run, and a new run begins. After each attempt the disk is
checked: there is at most one checkpoint beyond those that are kept, at most one half-written one, and the newest
complete one can be read. In the caches each kill leaves at most one half-written file, which the first run an hour
later removes.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from slow.attacks import outcomes
from support import tiny
from support.album import album
from support.runs import ROOT, content_of, unlike
from support.waiting import HANGS

from tinyspeed import recipe
from tinyspeed.data import digits_model
from tinyspeed.recipe import Recipe
from tinyspeed.training import checkpoint
from tinyspeed.util import files

KEPT = 2
LOCK = ".lock"  # empty, and harmless: the next one to write the same file takes it over, and removes it
COMMON = (
    "run.threads=1", "run.device=cpu", "run.save_every=3", f"run.keep_checkpoints={KEPT}", "data.workers=0",
    "digits.side=6", "digits.width=32", "digits.layers=4", "digits.tower_width=32", "digits.pictures=64",
    "align.steps=4", "align.batch=4", "train.steps=36", "train.batch=4", "dualspeed.keep=0.25", "dualspeed.slow=0.2",
)  # fmt: skip
LAYERS = ("sts.skip=0.5", "sts.layers=influence", "sts.every=4")
ANSWERS = ("regate.keep=0.5", "regate.warmup=4", "regate.cycle=8", "regate.refresh=3")
SYSTEMS = {
    "dualspeed": (),
    "adaptive": ("dualspeed.schedule=adaptive",),
    "sts": LAYERS,
    "regate": ANSWERS,
    "all of it": ("dualspeed.schedule=adaptive", "dualspeed.weights=cells", *LAYERS, *ANSWERS),
    "pictures": (),  # PICTURES
}
PICTURES = (
    "data.kind=chat", "data.workers=2", "model.quantise=nf4", "lora.rank=4", "align.steps=0", "train.steps=24",
    "digits.pictures=1000000", *ANSWERS,
)  # fmt: skip
MOMENTS = ("at any moment", "while saving", "just after saving")


@dataclass
class Attack:
    """One system on a number of ranks: its undisturbed run, and the one that is killed."""

    home: Path
    system: str
    ranks: int
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    ends: int = 0  # runs that ended, each like the undisturbed one
    seconds: float = 0.0  # of the undisturbed run
    failure: str = ""

    def __post_init__(self):
        self.made = {which: self._recipe(which) for which in ("whole", "killed")}
        for made in self.made.values():
            (self.home / f"{made.run.name}.toml").write_text(made.to_toml())

    def _recipe(self, which: str) -> Recipe:
        name = f"{self.system}-{self.ranks}-{which}".replace(" ", "-")
        where = (f"run.name={name}", f"run.folder={self.home / 'runs'}", f"run.cache={self.home / name}")
        if self.system == "pictures":
            more = self._pictures()
        else:
            more = (f"model.path={self.home / 'base'}", *SYSTEMS[self.system])
        made = recipe.read("digits", [*COMMON, *where, *more])
        if self.system != "pictures":
            digits_model.prepare(self.home / "base", 0, tower_steps=5, **made.digits.sizes, bar=False)
        return made

    def _pictures(self) -> tuple[str, ...]:
        """Conversations about pictures, with everything that is computed from them before the first step. Several ranks
        cannot share a feature cache, so they have none."""
        data = album(self.home, 12)
        model, reference = self.home / "llava", self.home / "reference"
        if not reference.exists():
            tiny.checkpoint("llava", model)
            tiny.llm(reference)
        files = (f"model.path={model}", f"data.file={data}", f"data.images={self.home / 'images'}")
        cache = ("data.feature_cache_gb=1",) if self.ranks == 1 else ()
        return (*PICTURES, *files, f"regate.reference={reference}", *cache)

    def start(self, which: str) -> subprocess.Popen:
        made = self.made[which]
        file = f"{made.run.name}.toml"
        if self.ranks == 1:
            words = ["tinyspeed", "train", file]
            if (made.folder / "recipe.toml").is_file():  # without --resume the command would ask for it
                words.append("--resume")
        else:
            words = f"torch.distributed.run --standalone --nproc-per-node {self.ranks} -m scale {file}".split()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(self.home / f"{made.run.name}.log", "a") as log:
            words = [sys.executable, "-m", *words]
            return subprocess.Popen(words, cwd=self.home, env=environment, stdout=log, stderr=log)

    def finish(self, which: str) -> None:
        """Let it run to its end."""
        run = self.start(which)
        try:
            code = run.wait(HANGS)
        finally:
            kill(run)
        assert code == 0, self.log(which)

    def undisturbed(self) -> None:
        began = time.monotonic()
        self.finish("whole")
        self.seconds = time.monotonic() - began

    def start_and_kill(self, draw: random.Random) -> bool:
        """Start or resume the run and kill it. Returns False if the run ended before its moment came."""
        moment, folder = draw.choice(MOMENTS), self.made["killed"].folder / "checkpoints"
        lifetime = draw.uniform(0, 1.1 * self.seconds)
        wanted = draw.randrange(1, 4)  # kill it at the first, second or third checkpoint
        run = self.start("killed")
        began, before, hangs = time.monotonic(), checkpoint.newest(folder), False
        seen = set()
        while run.poll() is None and not hangs:
            if moment == "at any moment":
                if time.monotonic() - began > lifetime:
                    break
            else:
                saving = moment == "while saving"
                seen |= {*checkpoint.unfinished(folder)} if saving else {checkpoint.newest(folder)} - {before, None}
                if len(seen) >= wanted:
                    break
            hangs = time.monotonic() - began > HANGS
            time.sleep(0.0002)
        ended = run.poll() is not None
        code = kill(run)
        assert ended or not hangs, f"hangs\n{self.log('killed')}"
        assert not ended or code == 0, f"exit code {code}\n{self.log('killed')}"
        self.check_disk()
        if not ended:
            self.kills[moment] += 1
        return not ended

    def check_disk(self) -> None:
        folder = self.made["killed"].folder / "checkpoints"
        complete = sorted(folder.glob("step-*"))
        assert len(complete) <= KEPT + 1, complete
        assert len(checkpoint.unfinished(folder)) <= 1
        if complete:
            checkpoint.read(complete[-1])

    def check_end(self) -> None:
        """The run has ended: it must be like the undisturbed one."""
        whole, killed = self.made["whole"], self.made["killed"]
        assert not (wrong := unlike(killed, whole)), f"{self.system}, {self.ranks} rank(s): {wrong[:10]}"
        strays = [p for p in killed.folder.rglob("*") if ".tmp" in p.name and p.suffix != LOCK]
        assert not strays, strays
        assert sorted(names(killed)) == sorted(names(whole))
        self._check_caches()
        self.ends += 1
        shutil.rmtree(killed.folder)

    def _check_caches(self) -> None:
        """The caches hold what the undisturbed run's hold, and at most one half-written file for each kill. Such a file
        stays as long as somebody may be writing it, and is removed when it is old."""
        caches = [Path(made.run.cache) for made in (self.made["killed"], self.made["whole"])]
        killed, whole = ({p.relative_to(cache): p for p in cache.rglob("*") if p.is_file()} for cache in caches)
        strays = [p for name, p in killed.items() if name not in whole]
        assert all(p.name.endswith(".tmp") for p in strays), strays
        assert len(strays) <= sum(self.kills.values()), strays
        files.delete_stale(strays)
        assert all(p.exists() for p in strays), "a file that may still be written was removed"
        for path in strays:
            os.utime(path, (0, 0))
        files.delete_stale(strays)
        assert not any(p.exists() for p in strays)
        for name, path in whole.items():
            mine, its = (content_of(path.name, file.read_bytes()) for file in (killed[name], path))
            assert mine == its, name
        shutil.rmtree(caches[0], ignore_errors=True)

    def log(self, which: str) -> str:
        return (self.home / f"{self.made[which].run.name}.log").read_text()[-3000:]


def kill(run: subprocess.Popen) -> int:
    """Kill a process and all that it has started, at once, as when a machine fails. Returns its exit code."""
    everyone = []
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(run.pid)
        everyone = [first, *first.children(recursive=True)]
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return run.wait()


def names(made: Recipe) -> list[str]:
    return [str(p.relative_to(made.folder)) for p in made.folder.rglob("*") if p.is_file() and p.suffix != LOCK]


def attack(home: Path, systems: list[str], ranks: list[int], kills: int, seed: int, say=print) -> list[Attack]:
    """Deal the kills out over all systems and numbers of ranks, then let every run come to its end. A system that has
    failed is not killed again."""
    every = [Attack(home, system, count) for count in ranks for system in systems]
    for number, one in enumerate(every):
        share = kills // len(every) + (number < kills % len(every))
        try:
            kill_repeatedly(one, share, random.Random(f"{seed} {one.system} {one.ranks}"))
        except Exception as error:
            one.failure = f"{one.system}, {one.ranks} rank(s), after kills {one.kills}: {error!r}"
        ended = f"{one.ends} runs ended like the undisturbed one"
        say(one.failure or f"{one.system}, {one.ranks} rank(s): kills {one.kills}; {ended}")
    return every


def kill_repeatedly(one: Attack, kills: int, draw: random.Random) -> None:
    one.undisturbed()
    while sum(one.kills.values()) < kills:
        if not one.start_and_kill(draw):
            one.check_end()
    one.finish("killed")
    one.check_end()


if __name__ == "__main__":
    parser = outcomes.parser(__doc__, count=200)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--ranks", default="1,2")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = asked.systems.split(","), [int(n) for n in asked.ranks.split(",")]
        every = attack(Path(folder), *chosen, asked.count, asked.seed, outcomes.say)
    tried = {f"killed {moment}": sum(one.kills[moment] for one in every) for moment in MOMENTS}
    failures = [one.failure for one in every if one.failure]
    sys.exit(outcomes.write(asked.out, tried, failures, ends=sum(one.ends for one in every)))
