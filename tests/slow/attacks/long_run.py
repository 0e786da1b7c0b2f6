"""Ten thousand steps: nothing grows that must not grow, and every line of the log says what happened.

    make torture ONLY=long_run        10,000 steps with every system at once, 1,000 of each of VARIANTS, 500 with each
                                      of LEAKS

200 times during the run it is measured what Python holds (tracemalloc), what C holds (glibc's own count), open files,
threads, and the processor time of a fast step. A slope is fitted to each, from where the run has settled. Afterwards
another process checks the log and the checkpoints (log_checks.py): learning rates, modes, layers and answers of every
step by their formulas, and after every checkpoint the loss of the next step, which is computed again, for slow steps
also with transformers' own forward.

Each of LEAKS is made on purpose, as small as must be found. The attack fails if it is not found.
"""

import argparse
import ctypes
import gc
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from pathlib import Path

import psutil
from slow.attacks import outcomes
from slow.attacks.log_checks import wrong_lines, wrong_losses
from support.runs import ROOT

from tinyspeed import recipe
from tinyspeed.data import digits_model
from tinyspeed.recipe import Recipe
from tinyspeed.training import train
from tinyspeed.training.loop import StageRun

SAMPLES = 200
SETTLED = 0.4  # of the steps; from here on nothing may grow
# Bytes per step that may be added (`adaptive` remembers two numbers for every 64 steps, which is 3 bytes), and bytes
# that come and go, however many steps there are: so in a short run only larger leaks are found. Resident memory comes
# in pages, and tracemalloc's records hold on to freed ones, 43 pages a checkpoint.
GROWTH = {"python": (25, 24_000), "c": (25, 40_000), "resident": (1_000, 2_000_000)}
MODES = ("fast", "slow")
# The fastest fast step of the last third may take so many times as long as that of the first third. Programs that share
# the core make it 1.4.
SLOWER = 1.7
COMMON = (
    "run.threads=1", "run.device=cpu", "run.keep_checkpoints=1000", "data.workers=0", "data.turns=2", "digits.side=4",
    "digits.width=32", "digits.layers=3", "digits.tower_width=8", "digits.tower_layers=1", "digits.pictures=64",
    "align.steps=0", "train.batch=2", "train.lr=1e-3", "dualspeed.keep=0.25", "dualspeed.slow=0.2",
)  # fmt: skip
VARIANTS = {
    "bernoulli": (),
    "periodic": ("dualspeed.schedule=periodic", "dualspeed.slow=0.15"),
    "adaptive": ("dualspeed.schedule=adaptive", "dualspeed.slow=0.1"),
    "all of it": (
        "dualspeed.schedule=adaptive", "dualspeed.slow=0.5", "sts.skip=0.34", "sts.layers=influence",
        "regate.keep=0.5", "regate.warmup=40", "regate.cycle=32", "regate.refresh=4", "train.optimizer=adamw8bit",
    ),
    "layers at random": ("sts.skip=0.34", "dualspeed.isolator=0"),
    "LoRA, workers": ("lora.rank=2", "data.workers=1", "dualspeed.plugin=tokenlearner"),
}  # fmt: skip


# Leaks on purpose, and the name under which each must be found.
LEAKS = {
    "python": "python",
    "heap": "c",
    "pages": "resident",
    "files": "files",
    "threads": "threads",
    "slower": "slower",
    "log": "log",
}


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h: `used` was handed out from the heap, `mapped` comes directly from the kernel."""

    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "free", "bins", "mappings", "mapped", "most", "bins2", "used", "unused", "top")]  # fmt: skip


def held_by_c() -> int | None:
    """Bytes that C code holds, in all arenas; None if the C library does not count them."""
    try:
        count = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return None
    count.restype = MallInfo
    told = count()
    return told.used + told.mapped


def settings(home: Path, variant: str, steps: int, seed: int = 0) -> Recipe:
    where = (f"model.path={home / 'base'}", f"run.folder={home}", f"run.cache={home / 'cache'}")
    length = (f"run.seed={seed}", f"train.steps={steps}", f"run.save_every={max(20, steps // 25)}")
    name = f"run.name={variant.replace(' ', '-')}"
    return recipe.read("digits", [*COMMON, *VARIANTS[variant], *where, *length, name])


def measure(made: Recipe, leak: str | None = None) -> list[dict]:
    """Train, and take a sample every so often."""
    steps, original, spent = made.train.steps, StageRun._step, []
    every, file = max(1, steps // SAMPLES), made.folder.with_suffix(".samples")  # in memory they would count
    process, leaking = psutil.Process(), Leak(leak, steps)

    def step(self, *arguments):
        began = time.thread_time()
        entry = original(self, *arguments)
        leaking.step(self.totals.steps, entry)
        if entry["mode"] == "fast":
            spent.append(time.thread_time() - began)
        if self.totals.steps % every == 0:
            gc.collect()
            gc.freeze()  # so that what is there now is not searched 200 times
            sample = {
                "step": self.totals.steps,
                "python": tracemalloc.get_traced_memory()[0],
                "c": held_by_c(),
                "resident": process.memory_info().rss,
                "files": process.num_fds(),
                "threads": process.num_threads(),
                "children": len(process.children()),
                "fast": min(spent, default=None),
            }
            with open(file, "a") as samples:
                samples.write(json.dumps(sample) + "\n")
            spent.clear()
        return entry

    StageRun._step = step
    tracemalloc.start()
    try:
        train.train(made, bar=True)
    finally:
        StageRun._step = original
        tracemalloc.stop()
        leaking.close()
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    lines = (made.folder / "metrics.jsonl").read_text().splitlines()
    for number, sample in enumerate(samples):
        since = lines[number * every : (number + 1) * every]
        # By mode: the line of a slow step is longer, and `adaptive` changes how many there are. Without the speed-up,
        # which early steps do not have.
        told = map(json.loads, since)
        of = [(one["mode"], len(line) - len(json.dumps(one["speedup"]))) for line, one in zip(since, told, strict=True)]
        sample["log"] = {mode: [length for its, length in of if its == mode] for mode in MODES}
    return samples


class Leak:
    """A leak on purpose: the smallest of its kind that must be found."""

    def __init__(self, kind: str | None, steps: int):
        self.kind, self.steps, self.kept, self.over = kind, steps, [], threading.Event()
        self.size = max(100, 100_000 // steps)  # bytes per step

    def step(self, step: int, entry: dict) -> None:
        if self.kind == "python":
            self.kept.append(bytes(self.size))
        elif self.kind == "heap":
            ctypes.CDLL(None).malloc(self.size)
        elif self.kind == "pages":  # neither Python nor C counts these
            self.kept.append(mmap.mmap(-1, 100 * self.size))
            self.kept[-1].write(bytes(len(self.kept[-1])))
        elif self.kind == "files" and step % (self.steps // 10) == 0:
            self.kept.append(open(os.devnull))  # noqa: SIM115
        elif self.kind == "threads" and step % (self.steps // 10) == 0:
            self.kept.append(threading.Thread(target=self.over.wait, daemon=True))
            self.kept[-1].start()
        elif self.kind == "slower":
            began, more = time.thread_time(), 0.05 * step / self.steps
            while time.thread_time() - began < more:
                pass
        elif self.kind == "log":
            entry["history"] = list(range(step * 40 // self.steps))

    def close(self) -> None:
        self.over.set()
        for file in self.kept if self.kind == "files" else ():
            file.close()


def slope(samples: list[dict], name: str) -> float:
    """Growth per step: the median of the slopes over a quarter of the settled run, from each sample on. What is added
    once is in at most a third of them: Python makes its table of interned strings 7.7 MB larger when it is full."""
    settled = [sample for sample in samples if sample["step"] >= SETTLED * samples[-1]["step"]]
    pairs = zip(settled, settled[len(settled) // 4 :], strict=False)
    return statistics.median((b[name] - a[name]) / (b["step"] - a["step"]) for a, b in pairs)


def grew(samples: list[dict], times: bool = True) -> list[str]:
    """Returns what grew and must not grow. `times`: also the time of a step, which other programs may change."""
    found, settled = [], [sample for sample in samples if sample["step"] >= SETTLED * samples[-1]["step"]]
    for name, (least, slack) in GROWTH.items():
        most = least + slack / (settled[-1]["step"] - settled[0]["step"])
        if samples[0][name] is not None and slope(samples, name) > most:
            found.append(f"{name}: {slope(samples, name):,.0f} bytes per step")
    for name in ("files", "threads", "children"):
        if len(numbers := {sample[name] for sample in settled}) > 1:
            found.append(f"{name}: from {min(numbers)} to {max(numbers)}")
    third = len(samples) // 3
    parts = samples[:third], samples[-third:]
    first, last = (min(sample["fast"] for sample in part if sample["fast"]) for part in parts)
    if times and last > SLOWER * first:
        found.append(f"slower: a fast step took {1000 * first:.2f} ms, and {1000 * last:.2f} ms in the end")
    for mode in MODES:
        first, last = ([length for sample in part for length in sample["log"][mode]] for part in parts)
        # (Lines become shorter when losses become 0.0.)
        if first and last and statistics.mean(last) > 1.05 * statistics.mean(first):
            means = f"{statistics.mean(first):.1f} bytes per {mode} step, and {statistics.mean(last):.1f}"
            found.append(f"log: {means} in the end")
    return found


def measured(home: Path, variant: str, steps: int, leaks: list[str], seed: int) -> dict[str, list[dict]]:
    """The samples of a variant, or of it with each of these leaks, from one fresh process."""
    words = [sys.executable, "-m", "slow.attacks.long_run", "--measure", variant, "--count", str(steps)]
    words += ["--home", str(home), "--leaks", ",".join(leaks), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    # The progress bar writes at most a line a step, also to a file.
    assert len(done.stderr) < 300 * (100 + steps * max(1, len(leaks))), len(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])["samples"]


def missed(leak: str, samples: list[dict]) -> list[str]:
    """A line if a leak on purpose was not found as what it is."""
    found = grew(samples)
    named = any(line.startswith(LEAKS[leak]) for line in found)
    return [] if named else [f"a leak of {leak} was not found: {found}"]


def _measure(home: Path, variant: str, steps: int, leaks: list[str], seed: int) -> None:
    samples, seconds = {}, []
    for leak in leaks or [""]:
        chosen = settings(home / leak, variant, steps, seed)
        digits_model.prepare(home / leak / "base", seed, tower_steps=2, **chosen.digits.sizes, bar=False)
        began = time.monotonic()
        samples[leak] = measure(chosen, leak or None)
        seconds.append(time.monotonic() - began)
    print(json.dumps({"samples": samples, "seconds": seconds}))


def attack(
    home: Path, jobs: dict[str, int], leaks: list[str], steps: int, seed: int = 0, say=print, times: bool = True
) -> tuple[dict[str, int], list[str]]:
    """So many steps of each of these variants, and `steps` steps of the first one with each of these leaks."""
    tried, failures = {}, []
    for variant, many in jobs.items():
        samples = measured(home, variant, many, [], seed)[""]
        chosen = settings(home, variant, many, seed)
        found = grew(samples, times) + wrong_lines(chosen)
        checked, wrong = wrong_losses(chosen)
        wrong += [] if checked else ["no loss could be computed again"]
        tried |= {f"steps, {variant}": many} | {f"losses {how}, {variant}": count for how, count in checked.items()}
        grown = ", ".join(f"{name} {slope(samples, name):+.1f}" for name in ("python", "c", "resident"))
        fast = statistics.median(sample["fast"] for sample in samples if sample["fast"])
        say(f"{variant}: bytes per step: {grown}; a fast step takes {1000 * fast:.1f} ms")
        failures += [f"{variant}: {line}" for line in found + wrong]
    if leaks:
        samples = measured(home, next(iter(jobs)), steps, leaks, seed)
        failures += [line for leak in leaks for line in missed(leak, samples[leak])]
        say(f"leaks: {', '.join(f'{leak}: {grew(samples[leak])}' for leak in leaks)}")
        tried |= {f"steps that leak, {leak}": steps for leak in leaks}
    return tried, failures


if __name__ == "__main__":
    parser = outcomes.parser(__doc__, count=10_000)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--leaks", default="", help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        _measure(asked.home, asked.measure, asked.count, [leak for leak in asked.leaks.split(",") if leak], asked.seed)
        sys.exit()
    jobs = {name: max(100, asked.count // (1 if name == "all of it" else 10)) for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        leaking = max(50, asked.count // 20)
        tried, failures = attack(Path(folder), jobs, [*LEAKS], leaking, asked.seed, outcomes.say)
    sys.exit(outcomes.write(asked.out, tried, failures))
