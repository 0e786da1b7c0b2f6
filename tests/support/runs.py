"""Whole runs: their recipes, runs that are killed and resumed, commands in processes of their own, and what differs."""

import json
import os
import struct
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.waiting import HANGS

from tinyspeed import cli, recipe
from tinyspeed.training import checkpoint, train
from tinyspeed.training.loop import StageRun

ROOT = Path(__file__).parents[2]
HELD_RUN = Path(__file__).with_name("held_run.py")
SMALL_GPU = {  # ways to fit a small GPU
    "qlora": (
        "model.quantise=nf4",
        "lora.rank=4",
        "lora.alpha=5.0",
        "data.workers=2",
        "train.checkpointing=on",
        "train.row_budget=120",
        "dualspeed.weights=cells",
        "dualspeed.weights_after=1",
    ),
    "fp16": ("model.precision=fp16", "lora.rank=4", "train.optimizer=adamw8bit", "model.quantise=nf4"),
    # Ten records, five a step: killed at the end of an epoch, and again in the middle of the next.
    "bf16": ("model.precision=bf16", "lora.rank=4", "train.optimizer=paged_adamw8bit", "train.batch=5"),
    "full": ("model.precision=bf16", "train.row_budget=150"),
    "views": ("lora.rank=4", "dualspeed.views=true", "train.optimizer=adamw8bit", "train.weight_decay=0.1"),
}
ADAPTIVE = (  # a schedule that moves its share of slow steps within a run of so few
    "lora.rank=4", "dualspeed.schedule=adaptive", "dualspeed.slow=0.8", "dualspeed.gap=0.02", "train.steps=24",
    "train.row_budget=60",
)  # fmt: skip
UNSURE = ("seconds", "rows_per_second", "speedup", "memory_mib")  # of a line of the log: what differs every time


def unlike(made, whole) -> list[str]:
    """Where two ends differ, bit for bit: exported weights, the last checkpoint, the numbers of every step."""
    found = []
    for read in (
        lambda run: load_file(run.folder / "model" / "model.safetensors"),
        lambda run: checkpoint.read(checkpoint.newest(run.folder / "checkpoints"))[0],
    ):
        a, b = read(made), read(whole)
        found += [n for n in a.keys() | b.keys() if n not in a or n not in b or not torch.equal(a[n], b[n])]
    logs = [timeless((run.folder / "metrics.jsonl").read_bytes()) for run in (made, whole)]
    return found + [f"line {i} of the metrics" for i, (a, b) in enumerate(zip_longest(*logs)) if a != b]


def content_of(name: str, content: bytes) -> object:
    """What a file says: safetensors writes the metadata of its header in any order."""
    if not name.endswith(".safetensors"):
        return content
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def timeless(log: bytes) -> list[dict]:
    """Lines of a log without times and memory."""
    return [{name: n for name, n in json.loads(line).items() if name not in UNSURE} for line in log.splitlines()]


def train_through(monkeypatch, made, *steps):
    """Train to the end, killed before each of these steps and resumed."""
    with monkeypatch.context() as patch:
        die_before(patch, *steps)
        for attempt in range(len(steps)):
            with pytest.raises(Killed):
                train.train(made, resume=attempt > 0, bar=False)
            torch.rand(5)  # whoever resumes has drawn other numbers meanwhile
    train.train(made, resume=True, bar=False)


def train_until(made, step: int):
    """Train from the start, killed before this step."""
    with pytest.MonkeyPatch.context() as patch:
        die_before(patch, step)
        with pytest.raises(Killed):
            train.train(made, bar=False)


def flip(file: Path, at: int, bit: int = 3) -> None:
    """Flip a bit of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1 << bit
    file.write_bytes(content)


class Killed(BaseException):
    pass


def die_before(monkeypatch, *steps):
    """As SIGKILL does: no saving, no cleaning up, at the beginning of these optimizer steps (each once)."""
    left, original = list(steps), StageRun._step

    def step(self, *args):
        if left and self.totals.steps == left[0]:
            left.pop(0)
            raise Killed
        return original(self, *args)

    monkeypatch.setattr(StageRun, "_step", step)


def settings(home, folder, name, *changes, family="llava"):
    tables = {
        "run": {"name": name, "folder": str(folder), "threads": 1, "device": "cpu", "save_every": 2},
        "model": {"path": str(home / family)},
        "data": {"kind": "chat", "file": str(home / "train.json"), "images": str(home / "images"), "workers": 0},
        "dualspeed": {"slow": 0.4, "keep": 0.3},
        "train": {"steps": 6, "batch": 4, "lr": 0.01, "connector_lr": 0.002},
    }
    made = recipe.from_tables(tables, "here")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.toml").write_text(made.to_toml())
    return recipe.read(str(folder / f"{name}.toml"), list(changes))


def log_of(made) -> list[dict]:
    """The lines of the run's log."""
    return [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]


def recipe_file(made) -> str:
    """Write the recipe beside its run's folder; returns the file's name."""
    (made.folder.parent / f"{made.run.name}.toml").write_text(made.to_toml())
    return f"{made.run.name}.toml"


def steps_done(made) -> int:
    """Lines of the run's log."""
    file = made.folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def finish(process) -> tuple[str, str]:
    """What a command that must succeed has printed."""
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err[-3000:]
    return out, err


def run_cli(*arguments, folder):
    """`tinyspeed` in a process of its own."""
    return _process("-m", "tinyspeed", *arguments, folder=folder)


def run_python(script: str, *arguments, folder, stdin=None):
    """This script in a process of its own."""
    return _process("-c", script, *arguments, folder=folder, stdin=stdin)


def run_held(behind: int, module: str, *arguments, folder):
    """`tinyspeed` or `scale` in a process of its own, whose run stands still after a step (see `held_run.py`)."""
    return _process(HELD_RUN, behind, module, *arguments, folder=folder)


def _process(*words, folder, stdin=None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, words)], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=folder,
        stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def fails(capsys, *words):
    try:
        code = cli.main([str(w) for w in words])
    except SystemExit as left:  # argparse refuses the words
        code = left.code
    assert code == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("tinyspeed: ")]
    assert len(lines) == 1
    assert "usage: " not in err
    assert "Traceback" not in err + out
    return lines[0]
