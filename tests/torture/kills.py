"""SIGKILL at random moments, again and again: a run must end with the bits of one that nobody touched.

    make torture ONLY=kills        200 of them: every system, on one process and on two, in turn

A life begins with the command that a user types again, and ends with a SIGKILL at one of three moments: anywhere, start
and resume included; while a checkpoint is being written; or as soon as one has its name. When a life ends by itself the
run is compared with the undisturbed one, and the next run begins. After every life the disk is looked at: one
checkpoint more than is kept and one half-written at most, and the newest complete one can be read. In the caches no
kill leaves more than one half-written file, which the first run an hour later takes away.
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
from support import tiny
from support.album import album
from support.runs import unlike
from torture import outcome

from tinyspeed import recipe
from tinyspeed.data import digits_model
from tinyspeed.recipe import Recipe
from tinyspeed.training import checkpoint
from tinyspeed.util import files

ROOT = Path(__file__).parents[2]
KEPT = 2
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
    "all of it": ("dualspeed.schedule=adaptive", *LAYERS, *ANSWERS),
    "pictures": (),  # PICTURES
}
# In two processes without the features, which several ranks cannot share.
PICTURES = (
    "data.kind=chat", "data.workers=2", "model.quantise=nf4", "lora.rank=4", "align.steps=0", "train.steps=24",
    "digits.pictures=1000000", *ANSWERS,
)  # fmt: skip
MOMENTS = ("anywhere", "while saving", "just saved")
PATIENCE = 300.0  # seconds, after which a run hangs


@dataclass
class Torture:
    """One system on so many ranks."""

    home: Path
    system: str
    ranks: int
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MOMENTS, 0))
    ends: int = 0  # runs that came to their end, each as the undisturbed one
    seconds: float = 0.0  # that the undisturbed one took
    lost: str = ""  # what was

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
        """Conversations about pictures, with all that is made of them before the first step."""
        data = album(self.home, 12)
        model, reference = self.home / "llava", self.home / "reference"
        if not reference.exists():
            tiny.checkpoint("llava", model)
            tiny.llm(reference)
        files = (f"model.path={model}", f"data.file={data}", f"data.images={self.home / 'images'}")
        kept = ("data.feature_cache_gb=1",) if self.ranks == 1 else ()
        return (*PICTURES, *files, f"regate.reference={reference}", *kept)

    def begin(self, which: str) -> subprocess.Popen:
        made = self.made[which]
        file = f"{made.run.name}.toml"
        if self.ranks == 1:
            words = ["tinyspeed", "train", file]
            if (made.folder / "recipe.toml").is_file():  # what the command itself says when it is given without
                words.append("--resume")
        else:
            words = f"torch.distributed.run --standalone --nproc-per-node {self.ranks} -m scale {file}".split()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(self.home / f"{made.run.name}.log", "a") as log:
            words = [sys.executable, "-m", *words]
            return subprocess.Popen(words, cwd=self.home, env=environment, stdout=log, stderr=log)

    def undisturbed(self) -> None:
        began = time.monotonic()
        self.end("whole")
        self.seconds = time.monotonic() - began

    def end(self, which: str) -> None:
        """Leave it to come to its end."""
        run = self.begin(which)
        try:
            code = run.wait(PATIENCE)
        finally:
            kill(run)
        assert code == 0, self.log(which)

    def life(self, draw: random.Random) -> str | None:
        """Begin, or go on, and be killed; the moment, or None if the run was done before it came."""
        moment, folder = draw.choice(MOMENTS), self.made["killed"].folder / "checkpoints"
        until = draw.uniform(0, 1.1 * self.seconds)
        run = self.begin("killed")
        began, before, hangs = time.monotonic(), checkpoint.newest(folder), False
        wanted = draw.randrange(1, 4)  # the first, second or third one from here
        seen = set()
        while run.poll() is None:
            if moment == "anywhere" and time.monotonic() - began > until:
                break
            now = {checkpoint.newest(folder)} - {before}
            if moment == "while saving":
                now = {*checkpoint.unfinished(folder)}
            seen |= now - {None}
            if moment != "anywhere" and len(seen) >= wanted:
                break
            hangs = time.monotonic() - began > PATIENCE
            if hangs:
                break
            time.sleep(0.0002)
        done = run.poll() is not None
        code = kill(run)
        assert done or not hangs, f"hangs\n{self.log('killed')}"
        assert not done or code == 0, f"exit code {code}\n{self.log('killed')}"
        self.look()
        if done:
            return None
        self.kills[moment] += 1
        return moment

    def look(self) -> None:
        """At what is on disk after any end."""
        folder = self.made["killed"].folder / "checkpoints"
        complete = sorted(folder.glob("step-*"))
        assert len(complete) <= KEPT + 1, complete
        assert len(checkpoint.unfinished(folder)) <= 1
        if complete:
            checkpoint.read(complete[-1])

    def done(self) -> None:
        """The run came to its end: it must be the undisturbed one's."""
        whole, killed = self.made["whole"], self.made["killed"]
        assert not (wrong := unlike(killed, whole)), f"{self.system}, {self.ranks} rank(s): {wrong[:10]}"
        strays = [p for p in killed.folder.rglob("*") if ".tmp" in p.name]
        assert not strays, strays
        assert sorted(names(killed)) == sorted(names(whole))
        self._caches()
        self.ends += 1
        shutil.rmtree(killed.folder)

    def _caches(self) -> None:
        """They hold what the undisturbed run's hold, and at most one half-written file a kill; which goes."""
        caches = [Path(made.run.cache) for made in (self.made["killed"], self.made["whole"])]
        killed, whole = ({p.relative_to(cache): p for p in cache.rglob("*") if p.is_file()} for cache in caches)
        strays = [p for name, p in killed.items() if name not in whole]
        assert all(p.name.endswith(".tmp") for p in strays), strays
        assert len(strays) <= sum(self.kills.values()), strays
        files.delete_stale(strays)
        assert all(p.exists() for p in strays), "one that is being written was taken away"
        for path in strays:
            os.utime(path, (0, 0))
        files.delete_stale(strays)
        assert not any(p.exists() for p in strays)
        for name, path in whole.items():
            assert killed[name].read_bytes() == path.read_bytes(), name
        shutil.rmtree(caches[0], ignore_errors=True)

    def log(self, which: str) -> str:
        return (self.home / f"{self.made[which].run.name}.log").read_text()[-3000:]


def kill(run: subprocess.Popen) -> int:
    """A process and all that it has started, at once, as when a machine goes; its exit code."""
    everyone = []
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(run.pid)
        everyone = [first, *first.children(recursive=True)]
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return run.wait()


def names(made) -> list[str]:
    return [str(p.relative_to(made.folder)) for p in made.folder.rglob("*") if p.is_file()]


def torture(home: Path, systems: list[str], ranks: list[int], kills: int, seed: int, say=print) -> list[Torture]:
    """So many kills, dealt out over all systems and numbers of ranks; then every run is left to come to its end. A
    system that loses something is not killed again."""
    every = [Torture(home, system, count) for count in ranks for system in systems]
    for number, one in enumerate(every):
        share = kills // len(every) + (number < kills % len(every))
        try:
            through(one, share, random.Random(f"{seed} {one.system} {one.ranks}"))
        except Exception as lost:
            one.lost = f"{one.system}, {one.ranks} rank(s), after kills {one.kills}: {lost!r}"
        done = f"{one.ends} runs ended, as the undisturbed one did"
        say(one.lost or f"{one.system}, {one.ranks} rank(s): kills {one.kills}; {done}")
    return every


def through(one: Torture, kills: int, draw: random.Random) -> None:
    one.undisturbed()
    while sum(one.kills.values()) < kills:
        if one.life(draw) is None:
            one.done()
    one.end("killed")
    one.done()


if __name__ == "__main__":
    parser = outcome.parser(__doc__, count=200)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--ranks", default="1,2")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = asked.systems.split(","), [int(n) for n in asked.ranks.split(",")]
        every = torture(Path(folder), *chosen, asked.count, asked.seed, say=lambda line: print(line, flush=True))
    tried = {f"kills, {moment}": sum(one.kills[moment] for one in every) for moment in MOMENTS}
    lost = [one.lost for one in every if one.lost]
    sys.exit(outcome.write(asked.out, tried, lost, ends=sum(one.ends for one in every)))
