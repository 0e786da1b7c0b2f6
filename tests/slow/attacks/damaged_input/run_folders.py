"""Runs with something broken in their folder: gone on with, exported, opened, and asked for their isolator.

The oracle is a run that nobody touched. Damage is named, or it cannot matter: then the run ends with the very bits. Of
a state that was forged, checksums and all, only a decent end is asked.
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
from tinyspeed.training import checkpoint, trained
from tinyspeed.training import train as core
from tinyspeed.util import paths

SETTINGS = (
    "run.threads=1", "run.device=cpu", "run.save_every=4", "run.keep_checkpoints=9", "data.workers=0", "digits.side=6",
    "digits.width=16", "digits.layers=4", "digits.tower_width=16", "digits.tower_layers=1", "digits.tower_steps=1",
    "digits.pictures=8", "align.steps=4", "align.batch=2", "train.steps=8", "train.batch=2", "dualspeed.keep=0.25",
    "dualspeed.slow=0.3", "dualspeed.schedule=adaptive", "regate.keep=0.5", "regate.warmup=2", "regate.cycle=4",
    "regate.refresh=1",
)  # fmt: skip
STEPS = ("step-00000004", "step-00000008", "step-00000012")  # stopped behind the second, ended behind the third
LINKED = "/etc/passwd"  # a link is the user's own, and may be followed; what it leads to is not what was written
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
        source = home / "runs" / "untouched"
        shutil.copytree(self.whole.folder, source)
        (home / "wanted").mkdir()
        for step in reversed(STEPS):  # what is to come out of each step
            trained.export(recipe.of_run(str(source)), home / "wanted" / step)
            shutil.rmtree(source / "checkpoints" / step)

    def run(self, name: str, more: tuple[str, ...]) -> recipe.Recipe:
        made = recipe.read(
            "digits",
            [
                *SETTINGS,
                *more,
                f"run.name={name}",
                f"run.folder={self.home / 'runs'}",
                f"run.cache={self.home / 'cache'}",
            ],
        )
        core.train(made, bar=False)
        return made

    def stopped(self, done: bool = False) -> Path:
        """A copy of the run as it was when it was stopped, or had ended."""
        folder = self.home / "runs" / "broken"
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
        act = draw.choice(("resume", "resume", "resume", "export", "open", "isolator" if done else "resume"))
        self.how = how = draw.choice(("bytes", "bytes", "replaced", "swapped", "forged", "forged", "header", "parts"))
        note = getattr(self, how)(draw, folder)
        return Case(
            f"{how}, then {act}",
            lambda: getattr(self, act)(made, folder),
            opens=(
                folder,
                self.home / "cache",
                self.home / "out",
                self.home / ".out.tmp",
                self.home / "wanted",
                LINKED,
            ),
            programs=("git",),  # record.json has the commit
            note=f"{note}, {'done' if done else 'stopped'}",
            seconds=30,
        )

    # What breaks

    def bytes(self, draw: random.Random, folder: Path) -> str:
        file = draw.choice(files(folder))
        content, what = mutations.octets(draw, file.read_bytes())
        file.write_bytes(content)
        return f"{file.relative_to(folder)} {what}"

    def replaced(self, draw: random.Random, folder: Path) -> str:
        file, what = (
            draw.choice(files(folder)),
            draw.choice(("gone", "folder", "link", "link out", "pipe", "loop", "empty")),
        )
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
        """With what lies there in another run, or in another step's folder."""
        if draw.random() < 0.4:
            steps = sorted((folder / "checkpoints").iterdir())
            one, other = draw.sample(steps, 2)
            if draw.random() < 0.5:
                other = folder / "checkpoints" / draw.choice(("step-00000009", "step-99999999", "step-00000000"))
                one.rename(other)
                return f"{one.name} is {other.name}"
            name = draw.choice(("", "/state.json", "/tensors.safetensors"))
            a, b, c = Path(f"{one}{name}"), Path(f"{other}{name}"), folder / "between"
            a.rename(c)
            b.rename(a)
            c.rename(b)
            return f"{one.name} and {other.name} change {name or 'names'}"
        other = self.home / "kept" / draw.choice(("seed", "rate"))
        if draw.random() < 0.5:
            step = draw.choice(sorted((folder / "checkpoints").iterdir()))
            shutil.rmtree(step)
            shutil.copytree(other / "checkpoints" / step.name, step)
            return f"{step.name} is of {other.name}"
        file = draw.choice(files(folder))
        shutil.copyfile(other / file.relative_to(folder), file)
        return f"{file.relative_to(folder)} is of {other.name}"

    def forged(self, draw: random.Random, folder: Path) -> str:
        """JSON of another shape, with a checksum that is right."""
        file = newest(folder) / "state.json"
        state = json.loads(file.read_text())["state"]
        state, what = mutations.structure(draw, state, ODD)
        if isinstance(state, dict) and draw.random() < 0.3:
            name = draw.choice(
                ("../../recipe.toml", "/etc/passwd", "../tensors.safetensors", "a\0b", "", ".", "state.json")
            )
            state["files"], what = {name: [1, 2]}, f"files {name!r}"
        try:
            crc = zlib.crc32(json.dumps(state, sort_keys=True).encode())
            file.write_text(json.dumps({"state": state, "crc32": crc}))
        except (TypeError, ValueError, UnicodeEncodeError):
            file.write_text("{}")
        return f"state: {what}"

    def header(self, draw: random.Random, folder: Path) -> str:
        """A safetensors file that says it is larger, and its checksum right again."""
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
                told[name]["shape"] = draw.choice(
                    ([2**40, 2**40], [0], [-1], [], "x", [1], told[name]["shape"][::-1] + [1])
                )
            elif what == "rows":
                rows = draw.choice(
                    (
                        {name: [0, 5]},
                        {name: [3, 9]},
                        {name: []},
                        {name: "x"},
                        [],
                        7,
                        {name: [-1, 1]},
                        {name: [0, 10**12]},
                    )
                )
                told["__metadata__"] = draw.choice(({"rows": json.dumps(rows)}, {"rows": "{"}, {}))
            elif what == "key":
                told[f"{name}x"] = told.pop(name)
            else:
                told[name]["dtype"] = draw.choice(("F64", "I8", "BOOL", "x", ""))
            head = json.dumps(told).encode()
            content = struct.pack("<Q", len(head)) + head + content[8 + size :]
        file.write_bytes(content)
        reseal(path)
        return f"{what} forged"

    def parts(self, draw: random.Random, folder: Path) -> str:
        """As many ranks write it; then the parts are mixed up."""
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
            told = {
                name: [rows[name] * number if what != "one twice" else 0, len(tensors[name])]
                for name in part
                if name in rows
            }
            if what == "rows wrong":
                told = {
                    name: [first + draw.choice((0, 1)), count + draw.choice((0, 1))]
                    for name, (first, count) in told.items()
                }
            save_file(part, path / f"tensors-0000{number}-of-00002.safetensors", metadata={"rows": json.dumps(told)})
        if what == "one missing":
            (path / f"tensors-0000{draw.randrange(2)}-of-00002.safetensors").unlink()
        if what == "another step's":
            other = path / "tensors-00001-of-00002.safetensors"
            other.write_bytes(
                (self.home / "kept" / "whole" / "checkpoints" / "step-00000004" / "tensors.safetensors").read_bytes()
            )
        reseal(path)
        return f"parts: {what}"

    # What is done with it

    def resume(self, made: recipe.Recipe, folder: Path) -> None:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            core.train(made, resume=True, bar=False)
        gone = "log begins at step" in said.getvalue()
        with file_access.asleep():
            different = (unlike_but_the_log if gone else unlike)(made, self.whole)
        # A state that is forged well is another state: nothing can tell it from what was written.
        assert not different or self.how == "forged", f"it ends otherwise: {different[:4]}"

    def export(self, made: recipe.Recipe, folder: Path) -> None:
        out = self.home / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(out.with_name(".out.tmp"), ignore_errors=True)
        step = newest(folder).name
        trained.export(recipe.of_run(str(folder)), out)
        got, want = load_file(out / "model.safetensors"), self.exported(step)
        assert all(torch.equal(got[name], want[name]) for name in got.keys() | want.keys()), (
            f"another model than {step}'s"
        )

    def open(self, made: recipe.Recipe, folder: Path) -> None:
        step = newest(folder).name
        with trained.open_model(str(folder), "cpu") as (model, _, _):
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
    """What the names of a tensor in a file and in a model have in common."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def files(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", "report.png")]
    return [path for path in found if path.parent.name not in ("model",)]


def newest(folder: Path) -> Path:
    return checkpoint.newest(folder / "checkpoints")


def reseal(path: Path) -> None:
    """A state whose checksums are right for what lies beside it."""
    file = path / "state.json"
    state = json.loads(file.read_text())["state"]
    found = sorted(other for other in path.iterdir() if other.name != "state.json")
    state["files"] = {other.name: [len(content := other.read_bytes()), zlib.crc32(content)] for other in found}
    crc = zlib.crc32(json.dumps(state, sort_keys=True).encode())
    file.write_text(json.dumps({"state": state, "crc32": crc}))


def unlike_but_the_log(made: recipe.Recipe, whole: recipe.Recipe) -> list[str]:
    """Where two ends differ, but for lines of a log that is gone."""
    log = made.folder / "metrics.jsonl"
    lines = (whole.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    mine = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[: len(lines) - len(mine)], *mine]))
    return unlike(made, whole)
