"""The same on the command line: a refusal is one line on stderr and exit code 2, and nothing else has this code.

Commands run in this process, so that one sees what they open. They take a second or so, so this is a sample.
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
        for name in ("records", "models", "runs"):
            (home / name).mkdir()
        self.records, self.models = records.Part(home / "records"), models.Part(home / "models")
        self.damaged_runs = run_folders.Part(home / "runs")

    def case(self, draw: random.Random) -> Case:
        train, estimate, again = [self.train] * 2, [self.estimate] * 3, [self.use_a_run] * 2
        return draw.choice((*train, *estimate, self.ask, *again))(draw)

    def command(self, kind: str, words: list[str], opens: tuple, note: str) -> Case:
        def act() -> None:
            with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
                try:
                    code = cli.main(words)
                except UserError as error:
                    raise AssertionError(f"the command line raised the error: {error}") from error
                except SystemExit as left:  # argparse refuses the words
                    code = left.code
            lines = [line for line in said.getvalue().replace("\r", "\n").split("\n") if line.startswith("tinyspeed: ")]
            assert code in (0, 2), f"exit code {code}"
            assert len(lines) == (code == 2), f"{code}, and printed {lines}"
            if code == 2:
                raise UserError(lines[0])

        opens = (*opens, matplotlib.get_cachedir(), matplotlib.get_configdir())
        return Case(kind, act, opens=opens, programs=("git",), note=f"{note}: {words!r:.200}", seconds=60)

    def train(self, draw: random.Random) -> Case:
        made = self.records.text(draw, draw.choice(("json", "jsonl", "chat")))
        file, toml, home = self.records.home / made.name, self.home / "train.toml", self.records.home
        file.write_bytes(made.content)
        where = {
            "runs": self.home / "trained", "cache": home / "cache", "model": self.models.sound, "file": file,
            "images": home / "images",
        }  # fmt: skip
        toml.write_text(TRAIN.format(**{name: json.dumps(str(path)) for name, path in where.items()}))
        shutil.rmtree(self.home / "trained", ignore_errors=True)
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
        m = self.models
        note, _ = draw.choice((m.bytes, m.structure, m.weights, m.missing, m.code))(draw, folder)
        picture = self.home / "a.png"
        self.models.picture.save(picture)
        words = ["ask", str(folder), str(picture), "What?", "--max-new-tokens=2"]
        return self.command("ask", words, (folder, picture), note)

    def use_a_run(self, draw: random.Random) -> Case:
        """Resume, export or evaluate a run with something damaged in it."""
        runs, out = self.damaged_runs, self.home / "out"
        folder = runs.stopped()
        note = draw.choice((runs.bytes, runs.replaced, runs.swapped, runs.forged, runs.header))(draw, folder)
        shutil.rmtree(out, ignore_errors=True)
        resume = ["train", str(folder / "recipe.toml"), "--resume"]
        words = draw.choice((resume, ["export", str(folder), str(out)], ["eval", str(folder)]))
        opens = (folder, runs.home / "cache", *(self.home / name for name in run_folders.OUT), recipe.BUILT_IN)
        return self.command(f"{words[0]} of a damaged run", words, opens, note)
