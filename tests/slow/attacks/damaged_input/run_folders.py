"""Folders of runs with something damaged in them, which are then resumed, exported, opened, and read for their
isolator.

The oracle is an undisturbed run. Either the damage is named, or it does not matter and the run ends with the same bits.
Of a state that was forged together with its checksums, it is only asked that nothing crashes.
"""

import contextlib
import io
import json
import os
import random
import shutil
import struct
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from slow.attacks.damaged_input import file_access, mutations
from slow.attacks.damaged_input.cases import Case
from support.runs import unlike

from tinyspeed import recipe
from tinyspeed.models import isolator_file
from tinyspeed.training import checkpoint, trained_model
from tinyspeed.training import train as core
from tinyspeed.util import paths

SETTINGS = (
    "run.threads=1", "run.device=cpu", "run.save_every=4", "run.keep_checkpoints=9", "data.workers=0", "digits.side=6",
    "digits.width=16", "digits.layers=4", "digits.tower_width=16", "digits.tower_layers=1", "digits.tower_steps=1",
    "digits.pictures=8", "align.steps=4", "align.batch=2", "train.steps=8", "train.batch=2", "dualspeed.keep=0.25",
    "dualspeed.slow=0.3", "dualspeed.schedule=adaptive", "regate.keep=0.5", "regate.warmup=2", "regate.cycle=4",
    "regate.refresh=1",
)  # fmt: skip
STEPS = ("step-00000004", "step-00000008", "step-00000012")  # a stopped run has the first two
LINKED = "/etc/passwd"
OUT = ("out", ".out.tmp", ".out.tmp.lock")
ODD = (None, True, -1, 0, 3, 10**30, 0.5, float("nan"), "", "x", "../state.json", "/etc/passwd", [], {}, [[]], {"a": 1})


class Part:
    def __init__(self, home: Path):
        self.home = home
        self.runs = {
            "whole": self.run("whole", ()),
            "seed": self.run("seed", ("run.seed=1",)),
            "rate": self.run("rate", ("train.lr=1e-4",)),
        }
        self.whole = self.runs["whole"]
        for name, made in self.runs.items():
            shutil.copytree(made.folder, home / "kept" / name)
        source = home / "runs" / "sound"
        shutil.copytree(self.whole.folder, source)
        (home / "wanted").mkdir()
        for step in reversed(STEPS):  # the exported model of each checkpoint
            trained_model.export(recipe.of_run(str(source)), home / "wanted" / step)
            shutil.rmtree(source / "checkpoints" / step)

    def run(self, name: str, more: tuple[str, ...]) -> recipe.Recipe:
        where = (f"run.name={name}", f"run.folder={self.home / 'runs'}", f"run.cache={self.home / 'cache'}")
        made = recipe.read("digits", [*SETTINGS, *more, *where])
        core.train(made, bar=False)
        return made

    def stopped(self, done: bool = False) -> Path:
        """A copy of the run as it was when it was stopped, or when it had ended."""
        folder = self.home / "runs" / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.home / "kept" / "whole", folder)
        (folder / "recipe.toml").write_text(recipe.of_run(str(folder)).to_toml())
        if not done:
            shutil.rmtree(folder / "model")
            (folder / "isolator.safetensors").unlink()
            shutil.rmtree(folder / "checkpoints" / STEPS[-1])
        return folder

    def case(self, draw: random.Random) -> Case:
        done = draw.random() < 0.3
        folder = self.stopped(done)
        made = recipe.of_run(str(folder))
        use = draw.choice((*[self.resume] * 3, self.export, self.open, self.isolator if done else self.resume))
        damages = (
            self.bytes, self.bytes, self.replaced, self.swapped, self.forged, self.forged, self.header, self.parts,
        )  # fmt: skip
        damage = draw.choice(damages)
        self.how, note = damage.__name__, damage(draw, folder)
        return Case(
            f"{self.how}, then {use.__name__}",
            lambda: use(made, folder),
            opens=(folder, *(self.home / name for name in ("cache", "wanted", *OUT))),
            programs=("git",),  # for the commit in record.json
            note=f"{note}, {'done' if done else 'stopped'}",
            seconds=60,
        )

    # Damage

    def bytes(self, draw: random.Random, folder: Path) -> str:
        file = draw.choice(files(folder))
        content, what = mutations.mutate_bytes(draw, file.read_bytes())
        file.write_bytes(content)
        return f"{file.relative_to(folder)} {what}"

    def replaced(self, draw: random.Random, folder: Path) -> str:
        file = draw.choice(files(folder))
        what = draw.choice(("gone", "folder", "link", "link out", "pipe", "loop", "empty"))
        kept = file.read_bytes()
        file.unlink()
        if what == "folder":
            file.mkdir()
        elif what == "link":
            (folder / "elsewhere").write_bytes(kept)
            file.symlink_to(folder / "elsewhere")
        elif what == "link out":
            file.symlink_to(LINKED)
        elif what == "pipe":
            os.mkfifo(file)
        elif what == "loop":
            file.symlink_to(file.name)
        elif what == "empty":
            file.touch()
        return f"{file.relative_to(folder)} is {what}"

    def swapped(self, draw: random.Random, folder: Path) -> str:
        """With what is there in another run, or in another step's folder."""
        if draw.random() < 0.4:
            steps = sorted((folder / "checkpoints").iterdir())
            one, other = draw.sample(steps, 2)
            if draw.random() < 0.5:
                other = folder / "checkpoints" / draw.choice(("step-00000009", "step-99999999", "step-00000000"))
                one.rename(other)
                return f"{one.name} is called {other.name}"
            name = draw.choice(("", "/state.json", "/tensors.safetensors"))
            a, b, c = Path(f"{one}{name}"), Path(f"{other}{name}"), folder / "between"
            a.rename(c)
            b.rename(a)
            c.rename(b)
            return f"{one.name} and {other.name} swap {name or 'names'}"
        other = self.home / "kept" / draw.choice(("seed", "rate"))
        if draw.random() < 0.5:
            step = draw.choice(sorted((folder / "checkpoints").iterdir()))
            shutil.rmtree(step)
            shutil.copytree(other / "checkpoints" / step.name, step)
            return f"{step.name} is from {other.name}"
        file = draw.choice(files(folder))
        shutil.copyfile(other / file.relative_to(folder), file)
        return f"{file.relative_to(folder)} is from {other.name}"

    def forged(self, draw: random.Random, folder: Path) -> str:
        """JSON of another shape, with the right checksum."""
        file = newest(folder) / "state.json"
        state = json.loads(file.read_text())["state"]
        state, what = mutations.mutate_structure(draw, state, ODD)
        if isinstance(state, dict) and draw.random() < 0.3:
            names = ("../../recipe.toml", "/etc/passwd", "../tensors.safetensors", "a\0b", "", ".", "state.json")
            name = draw.choice(names)
            state["files"], what = {name: [1, 2]}, f"files {name!r}"
        try:
            crc = zlib.crc32(json.dumps(state, sort_keys=True).encode())
            file.write_text(json.dumps({"state": state, "crc32": crc}))
        except (TypeError, ValueError, UnicodeEncodeError):
            file.write_text("{}")
        return f"state: {what}"

    def header(self, draw: random.Random, folder: Path) -> str:
        """A safetensors file with a false header, and the right checksum for it."""
        path = newest(folder)
        file = path / "tensors.safetensors"
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        head, what = content[8 : 8 + size], draw.choice(("length", "offsets", "shape", "rows", "key", "kind"))
        if what == "length":
            length = draw.choice((0, 1, size - 1, size + 1, 10**8 + 1, 2**31, 2**63 - 1, 2**64 - 1))
            content = struct.pack("<Q", length) + content[8:]
        else:
            told = json.loads(head)
            name = draw.choice([name for name in told if name != "__metadata__"])
            if what == "offsets":
                told[name]["data_offsets"] = draw.choice(([0, 2**62], [0, 0], [-1, 4], [10, 5], "x", []))
            elif what == "shape":
                shapes = ([2**40, 2**40], [0], [-1], [], "x", [1], told[name]["shape"][::-1] + [1])
                told[name]["shape"] = draw.choice(shapes)
            elif what == "rows":
                places = ([0, 5], [3, 9], [], "x", [-1, 1], [0, 10**12])
                rows = draw.choice(([], 7, *({name: place} for place in places)))
                told["__metadata__"] = draw.choice(({"rows": json.dumps(rows)}, {"rows": "{"}, {}))
            elif what == "key":
                told[f"{name}x"] = told.pop(name)
            else:
                told[name]["dtype"] = draw.choice(("F64", "I8", "BOOL", "x", ""))
            head = json.dumps(told).encode()
            content = struct.pack("<Q", len(head)) + head + content[8 + size :]
        file.write_bytes(content)
        correct_checksums(path)
        return f"{what} forged"

    def parts(self, draw: random.Random, folder: Path) -> str:
        """In parts, as two ranks write it; then the parts are mixed up."""
        path = newest(folder)
        tensors = load_file(path / "tensors.safetensors")
        (path / "tensors.safetensors").unlink()
        what = draw.choice(("right", "one twice", "one missing", "another step's", "rows wrong"))
        tall = [name for name in sorted(tensors) if tensors[name].dim() and len(tensors[name]) > 1]
        rows, made = {}, [{}, {}]
        for name, tensor in tensors.items():
            if name not in tall:
                made[0][name] = tensor
                continue
            half = len(tensor) // 2
            made[0][name], made[1][name] = tensor[:half].contiguous(), tensor[half:].contiguous()
            rows[name] = half
        if what == "one twice":
            made[1] = {name: made[0][name] for name in tall}
        for number, part in enumerate(made):
            first = 0 if what == "one twice" else number
            told = {name: [rows[name] * first, len(tensors[name])] for name in part if name in rows}
            if what == "rows wrong":
                told = {name: [value + draw.choice((0, 1)) for value in place] for name, place in told.items()}
            save_file(part, path / f"tensors-0000{number}-of-00002.safetensors", metadata={"rows": json.dumps(told)})
        if what == "one missing":
            (path / f"tensors-0000{draw.randrange(2)}-of-00002.safetensors").unlink()
        if what == "another step's":
            other = self.home / "kept" / "whole" / "checkpoints" / STEPS[0] / "tensors.safetensors"
            shutil.copyfile(other, path / "tensors-00001-of-00002.safetensors")
        correct_checksums(path)
        return f"parts: {what}"

    # Use

    def resume(self, made: recipe.Recipe, folder: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            core.train(made, resume=True, bar=False)
        gone = "log begins at step" in said.getvalue()
        with file_access.paused():
            different = (unlike_but_the_log if gone else unlike)(made, self.whole)
        # Nothing can tell a well forged state from one that was written.
        assert not different or self.how == "forged", f"it has another end: {different[:4]}"

    def export(self, made: recipe.Recipe, folder: Path) -> None:
        out = self.home / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(".out.tmp"), ignore_errors=True)
        step = newest(folder).name
        trained_model.export(recipe.of_run(str(folder)), out)
        got, want = load_file(out / "model.safetensors"), self.exported(step)
        same = all(torch.equal(got[name], want[name]) for name in got.keys() | want.keys())
        assert same, f"another model than {step}'s"

    def open(self, made: recipe.Recipe, folder: Path) -> None:
        step = newest(folder).name
        with trained_model.open_model(str(folder), "cpu") as (model, _, _):
            got, want = model.state_dict(), self.exported(step)
        mine = {merged(name): tensor for name, tensor in got.items()}
        for name, tensor in want.items():
            assert torch.equal(mine[merged(name)], tensor), f"another model than {step}'s: {name}"

    def isolator(self, made: recipe.Recipe, folder: Path) -> None:
        want = load_file(self.home / "kept" / "whole" / "isolator.safetensors")
        got = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
        isolator_file.load_into(got, paths.require_isolator(str(folder)))
        assert all(torch.equal(got[name], want[name]) for name in want), "another isolator"

    def exported(self, step: str) -> dict[str, torch.Tensor]:
        return load_file(self.home / "wanted" / step / "model.safetensors")


def merged(name: str) -> str:
    """The part of a tensor's name that a file and a model have in common."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def files(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", "report.png")]
    return [path for path in found if path.parent.name not in ("model",)]


def newest(folder: Path) -> Path:
    return checkpoint.newest(folder / "checkpoints")


def correct_checksums(path: Path) -> None:
    """Write the checksums of the files that are there now into the state."""
    file = path / "state.json"
    state = json.loads(file.read_text())["state"]
    found = sorted(other for other in path.iterdir() if other.name != "state.json")
    state["files"] = {other.name: [len(content := other.read_bytes()), zlib.crc32(content)] for other in found}
    crc = zlib.crc32(json.dumps(state, sort_keys=True).encode())
    file.write_text(json.dumps({"state": state, "crc32": crc}))


def unlike_but_the_log(made: recipe.Recipe, whole: recipe.Recipe) -> list[str]:
    """Where two runs differ, apart from lines of a log that was lost."""
    log = made.folder / "metrics.jsonl"
    lines = (whole.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    mine = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[: len(lines) - len(mine)], *mine]))
    return unlike(made, whole)
