"""The same recipe and seed give the same bits a second time, whatever else is different.

    make torture ONLY=repeatability         each of SYSTEMS with three seeds, in two fresh processes

The second process has another hash seed, working folder, home, TMPDIR and run folder. It has workers where the first
had none, saves at other steps, lists every folder in another order, and runs the systems in reverse. All weights and
moments, the numbers of every step and every exported file are compared. Another seed must give other weights.

Some settings do not promise the same bits, because they change the order of sums. They are held to a tolerance here
(NEARLY):

- another number of threads (`run.threads`; a checkpoint says how many it had)
- `row_budget`, `dualspeed.layout` and `data.feature_cache_gb`: other micro-batches, another layout, stored features
- another number of ranks in `scale` (this tolerance is tested in tests/slow/test_two_ranks.py)
- `checkpointing` recomputes the same numbers, and is bit-identical on a CPU (tested here); elsewhere nobody promises it

With dropout (`lora.dropout`, or a model's own) another `row_budget` and another number of ranks also draw other
numbers; then the run is the same in distribution only. GPUs (whose kernels may add in any order), other machines and
other versions of torch are not tested here (another CPU may sum in another order; `record.json` says what was used).
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from slow.attacks import outcomes
from support import tiny
from support.album import album
from support.runs import ROOT, timeless

from tinyspeed import recipe
from tinyspeed.data import digits_model
from tinyspeed.training import checkpoint, train
from tinyspeed.util import paths

# Lists every folder in another order, as another file system may.
SHUFFLED = """
import os, random
draw, listdir, scandir = random.Random(1), os.listdir, os.scandir
class Entries(list):
    def __enter__(self): return self
    def __exit__(self, *a): pass
    def __next__(self):
        if not self: raise StopIteration
        return self.pop()
    def __iter__(self): return iter(self[:])
    def close(self): pass
def _scandir(path="."):
    with scandir(path) as found:
        every = Entries(found)
    draw.shuffle(every)
    return every
def _listdir(path="."):
    every = listdir(path)
    draw.shuffle(every)
    return every
os.listdir, os.scandir = _listdir, _scandir
"""
CHAT = (
    "data.kind=chat", "data.file={home}/train.json", "data.images={home}/images", "model.path={home}/llava",
    "dualspeed.keep=0.3", "dualspeed.slow=0.4", "train.batch=4", "train.lr=5e-3",
)  # fmt: skip
LORA = ("lora.rank=4", "lora.dropout=0.2")
DIGITS = (
    "model.path={home}/digits", "digits.side=4", "digits.width=32", "digits.layers=4", "digits.tower_width=8",
    "digits.tower_layers=1", "digits.pictures=64", "align.steps=3", "align.batch=4", "train.batch=4",
    "dualspeed.keep=0.25", "dualspeed.slow=0.2",
)  # fmt: skip
ANSWERS = ("regate.keep=0.5", "regate.warmup=2", "regate.cycle=4", "regate.refresh=1")
SYSTEMS = {  # recipe and steps
    "dualspeed": ((*DIGITS,), 20),
    "adaptive": ((*DIGITS, "dualspeed.schedule=adaptive", "dualspeed.gap=0.01"), 150),  # shares move from step 128 on
    "periodic, compact": ((*DIGITS, "dualspeed.schedule=periodic", "dualspeed.positions=compact"), 12),
    "sts, random": ((*DIGITS, "sts.skip=0.5", "sts.compress=0.5", "sts.compressor=pool"), 20),
    "sts, influence": ((*DIGITS, "sts.skip=0.5", "sts.layers=influence", "sts.every=4"), 20),
    "regate": ((*DIGITS, *ANSWERS), 20),
    "tokenlearner": ((*DIGITS, "dualspeed.plugin=tokenlearner"), 12),
    "dynamicvit": ((*DIGITS, "dualspeed.plugin=dynamicvit"), 12),
    "random rows": ((*DIGITS, "dualspeed.plugin=random"), 12),
    "8-bit moments": ((*DIGITS, "train.optimizer=adamw8bit", "align.optimizer=paged_adamw8bit"), 20),
    "chat, dropout": (CHAT, 12),
    "regate with a reference": ((*CHAT, *ANSWERS, "regate.reference={home}/llm"), 12),
    "lora, 4 bits": ((*CHAT, *LORA, "model.quantise=nf4"), 12),
    "views": ((*CHAT, *LORA, "dualspeed.views=true", "data.feature_cache_gb=0.01"), 12),
    "bf16": ((*CHAT, *LORA, "model.precision=bf16"), 12),
    "next, vispruner": ((*CHAT, "model.path={home}/next", "dualspeed.plugin=vispruner"), 8),
    "visionzip, cut": ((*CHAT, "dualspeed.plugin=visionzip", "train.row_budget=120"), 8),
    "everything": (
        (*CHAT, *LORA, *ANSWERS, "sts.skip=0.34", "sts.layers=influence", "sts.every=3", "dualspeed.schedule=adaptive",
         "dualspeed.plugin=tokenlearner", "model.quantise=nf4", "train.optimizer=adamw8bit"), 12,
    ),
}  # fmt: skip
# Settings that do not promise the same bits: the recipe, and how far apart weights may be, relative to the largest
# weight of their tensor. With other dropout it is another training, of a few steps.
PLAIN, STEPS = (*CHAT, "model.path={home}/plain"), 8
NEARLY = {
    "run.threads=2": (PLAIN, 1e-3),
    "train.row_budget=60": (PLAIN, 1e-3),
    "dualspeed.layout=padded": (PLAIN, 1e-3),
    "data.feature_cache_gb=0.01": (PLAIN, 1e-3),
    "train.checkpointing=on": (PLAIN, 0.0),
    "train.row_budget=61": (CHAT, 0.5),
}


@dataclass(frozen=True)
class Side:
    """One of the two processes."""

    home: Path  # what both read
    at: Path  # its own folder

    def read(self, name: str, parts: tuple[str, ...], steps: int, *more: str) -> recipe.Recipe:
        values = [
            f"run.name={re.sub('[^a-z0-9]+', '-', name)}", f"run.folder={self.at / 'runs'}",
            f"run.cache={self.at / 'cache'}", "run.threads=1", "run.device=cpu", "data.workers=0", "align.steps=0",
            f"train.steps={steps}", *(part.format(home=self.home) for part in parts), *more,
        ]  # fmt: skip
        return recipe.read("digits", values)

    def train(self, jobs: list[tuple[str, tuple[str, ...], int, tuple[str, ...]]], *, shuffled: bool) -> list[Path]:
        """Train these one after another in a fresh process. Returns their folders."""
        for name in ("here", "home", "watch"):
            (self.at / name).mkdir(parents=True, exist_ok=True)
        (self.at / "watch" / "sitecustomize.py").write_text(SHUFFLED if shuffled else "")
        made = [self.read(name, parts, steps, *more) for name, parts, steps, more in jobs]
        file = self.at / "jobs.json"
        file.write_text(json.dumps([one.to_toml() for one in made]))
        temporary = tempfile.mkdtemp(prefix="second" if shuffled else "first")  # short: sockets are made in it
        environment = {
            **os.environ, "PYTHONPATH": f"{self.at / 'watch'}:{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
            "HOME": str(self.at / "home"), "TMPDIR": temporary, "PYTHONHASHSEED": str(int(shuffled) + 7),
        }  # fmt: skip
        words = [sys.executable, "-m", "slow.attacks.repeatability", "--train", str(file)]
        done = subprocess.run(words, env=environment, cwd=self.at / "here", capture_output=True, text=True)
        shutil.rmtree(temporary)
        assert done.returncode == 0, done.stderr[-3000:]
        return [one.folder for one in made]


def provide(home: Path) -> None:
    album(home, 12)
    for name, family in (("llava", "llava"), ("plain", "llava"), ("next", "llava_next")):
        tiny.checkpoint(family, home / name)
    for name in ("llava", "next"):  # these have dropout
        config = json.loads((home / name / "config.json").read_text())
        config["text_config"]["attention_dropout"] = 0.2
        (home / name / "config.json").write_text(json.dumps(config))
    sizes = recipe.read("digits", [part.format(home=home) for part in DIGITS]).digits.sizes
    digits_model.prepare(home / "digits", 0, tower_steps=2, **sizes, bar=False)
    tiny.llm(home / "llm")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.read(checkpoint.newest(folder / "checkpoints"))[0])


def numbers(folder: Path) -> list[dict]:
    return timeless((folder / "metrics.jsonl").read_bytes())


def files(folder: Path) -> dict[str, str]:
    """A hash of every file that the run exports."""
    every = [*(folder / "model").iterdir(), folder / paths.ISOLATOR]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in every}


def unlike(a: Path, b: Path) -> list[str]:
    """Where two runs do not have the same bits."""
    one, other = tensors(a), tensors(b)
    found = [
        n for n in one.keys() | other.keys() if n not in one or n not in other or not torch.equal(one[n], other[n])
    ]
    found += [f"step {i + 1}" for i, (x, y) in enumerate(zip(numbers(a), numbers(b), strict=True)) if x != y]
    one, other = files(a), files(b)
    return found + [n for n in one.keys() | other.keys() if one.get(n) != other.get(n)]


def apart(a: Path, b: Path) -> float:
    """The largest difference between two runs' weights, relative to the largest weight of its tensor."""
    one, other = tensors(a), tensors(b)
    weights = [name for name in one if name.startswith("model/")]
    return max(float((one[n] - other[n]).abs().max() / one[n].abs().max()) for n in weights)


def same(a: Path, b: Path) -> list[str]:
    """Trained weights that are the same in both runs."""
    one, other = tensors(a), tensors(b)
    return [name for name in one if name.startswith("model/") and torch.equal(one[name], other[name])]


def attack(
    home: Path, systems: list[tuple[str, int]], nearly: list[str], say=print
) -> tuple[dict[str, int], list[str]]:
    """These systems, each with a seed, and these of the settings NEARLY."""
    given = home / "given"
    given.mkdir(parents=True)
    provide(given)
    every = [(f"{name} {seed}", *SYSTEMS[name], seed) for name, seed in systems]
    first = [(name, parts, steps, (f"run.seed={seed}",)) for name, parts, steps, seed in every]
    second = [(*job, (*more, "data.workers=2", "run.save_every=5")) for *job, more in first]
    other = [(f"{name} other", parts, steps, (f"run.seed={seed + 1000}",)) for name, parts, steps, seed in every]
    bases = {"plain": PLAIN, "chat": CHAT}
    close = [(name, parts, STEPS, ()) for name, parts in bases.items()] if nearly else []
    close += [(change, NEARLY[change][0], STEPS, (change,)) for change in nearly]
    a = Side(given, home / "first").train(first + close, shuffled=False)
    b = Side(given, home / "second" / "deeper").train([*reversed(second), *other], shuffled=True)
    failures, n = [], len(every)
    for (name, *_), one, again, seeded in zip(every, a, reversed(b[:n]), b[n:], strict=False):
        wrong, unchanged = unlike(one, again), same(one, seeded)
        failures += [f"{name}: {len(wrong)} differ, {sorted(wrong)[:5]}"] if wrong else []
        failures += [f"{name}: another seed gives the same {unchanged[:5]}"] if unchanged else []
        say(f"{name}: {'FAILED' if wrong else 'the same bits'}; with another seed {apart(one, seeded):.1g} apart")
    whole = dict(zip(bases.values(), a[n:], strict=False))
    for change, run in zip(nearly, a[n + len(bases) :], strict=False):
        parts, most = NEARLY[change]
        far, wrong = apart(whole[parts], run), unlike(whole[parts], run)
        say(f"{change}: {far:.1g} apart, {'not the same bits' if wrong else 'the same bits'}")
        if far > most or (wrong and not most):
            failures.append(f"{change}: {far:.1e} apart, {wrong[:5]}")
    tried = {"systems, twice": n, "with another seed": n, "settings that give nearly the same": len(nearly)}
    return tried, failures


def _train(file: Path) -> None:
    for number, text in enumerate(json.loads(file.read_text())):
        one = file.with_name(f"{number}.toml")
        one.write_text(text)
        train.train(recipe.read(str(one)), bar=False)


if __name__ == "__main__":
    parser = outcomes.parser(__doc__, count=3 * len(SYSTEMS))
    parser.add_argument("--train", type=Path)
    asked = parser.parse_args()
    if asked.train:
        _train(asked.train)
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [([*SYSTEMS][n % len(SYSTEMS)], asked.seed + n // len(SYSTEMS)) for n in range(asked.count)]
        tried, failures = attack(Path(folder), chosen, [*NEARLY], outcomes.say)
    sys.exit(outcomes.write(asked.out, tried, failures))
