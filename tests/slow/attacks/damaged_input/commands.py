"""The same through the whole command line: what is refused is one line on stderr and exit code 2, and nothing else is.

In this process, so that what is opened is seen. A sample: a command takes a second or so.
"""

import contextlib
import io
import json
import random
import shutil
from pathlib import Path

import matplotlib
from slow.attacks.damaged_input import models, recipes, records, run_folders
from slow.attacks.damaged_input.cases import Case

from tinyspeed import UserError, cli, recipe

TRAIN = """
[run]
name = "a"
folder = {runs}
cache = {cache}
device = "cpu"
threads = 1
[model]
path = {model}
[data]
kind = "chat"
file = {file}
images = {images}
workers = 0
[train]
steps = 2
batch = 2
"""


class Part:
    def __init__(self, home: Path):
        self.home = home
        for name in ("records", "recipes", "models", "wrecks"):
            (home / name).mkdir()
        self.records, self.recipes = records.Part(home / "records"), recipes.Part(home / "recipes")
        self.models, self.wrecks = models.Part(home / "models"), run_folders.Part(home / "wrecks")

    def case(self, draw: random.Random) -> Case:
        return getattr(
            self, draw.choice(("train", "train", "estimate", "estimate", "estimate", "ask", "again", "again"))
        )(draw)

    def command(self, kind: str, words: list[str], opens: tuple, note: str) -> Case:
        def act() -> None:
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
                try:
                    code = cli.main(words)
                except UserError as error:
                    raise AssertionError(f"it came out of the command line as an exception: {error}") from error
                except SystemExit as left:  # argparse, of words that are no command
                    code = left.code
            lines = [line for line in said.getvalue().replace("\r", "\n").split("\n") if line.startswith("tinyspeed: ")]
            assert code in (0, 2), f"exit code {code}"
            assert len(lines) == (code == 2 and "usage: " not in said.getvalue()), f"{code}, and said {lines}"
            if code == 2:
                raise UserError(lines[0] if lines else "usage")

        opens = (*opens, matplotlib.get_cachedir(), matplotlib.get_configdir())
        return Case(kind, act, opens=opens, programs=("git",), note=f"{note}: {words!r:.200}", seconds=60)

    def train(self, draw: random.Random) -> Case:
        made = self.records.text(draw, draw.choice(("json", "jsonl", "chat")))
        file, toml, home = self.records.home / made.name, self.home / "train.toml", self.records.home
        file.write_bytes(made.content)
        where = {
            "runs": self.home / "runs",
            "cache": home / "cache",
            "model": self.models.sound,
            "file": file,
            "images": home / "images",
        }
        toml.write_text(TRAIN.format(**{name: json.dumps(str(path)) for name, path in where.items()}))
        shutil.rmtree(self.home / "runs", ignore_errors=True)
        words = ["train", str(toml), draw.choice(("--dry-run", "--dry-run", "--skip-bad"))]
        return self.command("train", words, (toml, recipe.BUILT_IN, *where.values()), made.note)

    def estimate(self, draw: random.Random) -> Case:
        text, note = recipes.toml(draw)
        file = self.home / "estimate.toml"
        file.write_bytes(text.encode(errors="surrogatepass"))
        changes = [f"--set={recipes.word(draw)}" for _ in range(draw.choice((0, 0, 1)))]
        words = ["estimate", str(file), *changes]
        return self.command("estimate", words, (file, recipe.BUILT_IN, self.home), note)

    def ask(self, draw: random.Random) -> Case:
        folder = self.models.home / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.models.sound, folder)
        note, _ = getattr(self.models, draw.choice(("bytes", "structure", "weights", "missing", "code")))(draw, folder)
        picture = self.home / "a.png"
        self.models.picture.save(picture)
        return self.command(
            "ask", ["ask", str(folder), str(picture), "What?", "--max-new-tokens=2"], (folder, picture), note
        )

    def again(self, draw: random.Random) -> Case:
        """A run with something broken in it: gone on with, exported, asked."""
        folder, how = self.wrecks.stopped(), draw.choice(("bytes", "replaced", "swapped", "forged", "header"))
        note = getattr(self.wrecks, how)(draw, folder)
        out = self.home / "out"
        shutil.rmtree(out, ignore_errors=True)
        words = draw.choice(
            (
                ["train", str(folder / "recipe.toml"), "--resume"],
                ["export", str(folder), str(out)],
                ["eval", str(folder)],
            )
        )
        opens = (
            folder,
            self.wrecks.home / "cache",
            out,
            out.with_name(".out.tmp"),
            run_folders.LINKED,
            recipe.BUILT_IN,
        )
        return self.command(f"{words[0]} of a wreck", words, opens, note)
