"""Recipes, words of --set and --vary, and files of arms, with values that nobody should give.

An accepted recipe must mean what was written, stay the same when it is written to a file and read again, and train: a
model of noise takes three steps with it. A setting that crashes there, or takes all of the machine, should have been
refused.
"""

import dataclasses
import json
import math
import random
import tomllib
from pathlib import Path

from slow.attacks.damaged_input import mutations
from slow.attacks.damaged_input.cases import Case

from tinyspeed import recipe
from tinyspeed.data import digits, digits_model, loader
from tinyspeed.recipe import comparison
from tinyspeed.training import build
from tinyspeed.training.loop import StageRun, Totals

NUMBERS = (
    "-1", "0", "1", "2", "3", "7", "-0", "+1", "0x10", "1_000", "2147483647", "2147483648", "9223372036854775808",
    "9" * 30, "9" * 400, "9" * 5000, "0.0", "-0.0", "1e-320", "1e-30", "1e-9", "0.5", "0.999999999999", "1.0",
    "1.0000001", "2.0", "1e9", "1e30", "1e308", "1e999", "nan", "-nan", "inf", "-inf", "1e", "1.", ".5", "0.1.2",
    "007", "true", "false",
)  # fmt: skip
STRINGS = (
    "", " ", "x", "..", ".", "a/b", "/", "~", "~nobody/x", "~/x", "a\0b", "a\nb", "a\tb", "a\x7fb", "\x1b[2J",
    "\udc80", "\ufeff", "\u202e", "é", "e\u0301", "a" * 300, "a/" * 3000, "CON", "auto", "cpu", "none", "full", "fast",
    "divprune", "Divprune", "divprune ", "random", "chat", "digits", "error", "{{x}}", "${HOME}", "%(x)s", "'", '"',
    '"""', "'''", "\\", "#", "=", "http://a.b/c", "a//b", "-rf", "--resume", "a,b", "<image>", "</s>",
)  # fmt: skip
SHAPES = (
    "[]", "{}", "[1]", "{a = 1}", "[[1], [2]]", "2026-11-28", "07:32:00", "1979-05-27T07:32:00Z", "'a'", '"a"',
    '"\\u0000"', '"\\uD800"', "1 # no", "1\ntrain.lr = 2", "1\n[run]\nname = 'x'", "[" * 3000, "[" * 90 + "]" * 90,
    "{a=" * 2000, "", "=", "1 2",
)  # fmt: skip
FILE = '[run]\nname = "a"\n[digits]\nside = 6\n[dualspeed]\nkeep = 0.25\nslow = 0.3\n[train]\nsteps = 4\nbatch = 2\n'
SMALL = (
    "run.threads=1", "run.device=cpu", "data.workers=0", "digits.side=6", "digits.width=16", "digits.layers=4",
    "digits.tower_width=16", "digits.tower_layers=1", "digits.pictures=8", "align.steps=3", "train.steps=3",
)  # fmt: skip
KEYS = [(s.name, f.name, f.type) for s in dataclasses.fields(recipe.Recipe) for f in dataclasses.fields(s.type)]


class Part:
    def __init__(self, home: Path):
        self.home = home
        self.small = recipe.read("digits", [*SMALL, f"model.path={home / 'base'}", f"run.folder={home / 'runs'}"])
        digits_model.prepare(home / "base", 0, tower_steps=1, bar=False, **self.small.digits.sizes)

    def case(self, draw: random.Random) -> Case:
        return draw.choice((self.set, self.set, self.set, self.file, self.file, self.arms, self.vary))(draw)

    def set(self, draw: random.Random) -> Case:
        words = [word(draw) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        file = self.home / "set.toml"
        file.write_text(FILE)
        trains, opens = draw.random() < 0.1, (file, recipe.BUILT_IN, self.home / "base")
        return Case("--set", lambda: self.read(file, words, trains), opens=opens, note=repr(words))

    def file(self, draw: random.Random) -> Case:
        text, note = toml(draw) if draw.random() < 0.6 else (draw.choice(built_in()), "built in")
        for _ in range(draw.choice((0, 1, 1, 2))):
            text, what = mutations.mutate_tokens(draw, text)
            note += "; " + what
        content = text.encode(errors="surrogatepass")
        if draw.random() < 0.25:
            content, what = mutations.mutate_file(draw, text, 0.7)
            note += "; " + what
        file = self.home / "file.toml"
        file.write_bytes(content)
        return Case("file", lambda: self.read(file, []), opens=(file, recipe.BUILT_IN), note=note)

    def arms(self, draw: random.Random) -> Case:
        parts = []
        for _ in range(draw.choice((0, 1, 2, 3))):
            names = ("full", "a", "b") if draw.random() < 0.6 else ("a b", "a-b", "base", *STRINGS)
            name = json.dumps(draw.choice(names))
            section, key, value = draw.choice(GOOD) if draw.random() < 0.6 else setting(draw)
            flat = draw.random() < 0.1
            parts.append(f"[{name}]\n{key} = {value}\n" if flat else f"[{name}.{section}]\n{key} = {value}\n")
        text, note = "".join(parts), "arms"
        if draw.random() < 0.3:
            text, note = mutations.mutate_tokens(draw, text)
        file = self.home / "arms.toml"
        file.write_bytes(text.encode(errors="surrogatepass"))
        only = draw.choice((None, None, "full", "a,b", ",", "", "a,a"))

        def act():
            base = recipe.read("digits", [])
            found = comparison.read(base, str(file), only)
            assert found
            for made in found.values():
                check(made)
                assert made.run == base.run

        opens = (file, recipe.BUILT_IN, comparison.BUILT_IN)
        return Case("file of arms", act, opens=opens, note=f"{text[:200]!r} {note}")

    def vary(self, draw: random.Random) -> Case:
        words = []
        for _ in range(draw.choice((1, 1, 2, 3))):
            section, key, good = draw.choice(GOOD) if draw.random() < 0.6 else setting(draw)
            odd = (good,) if draw.random() < 0.5 else (*NUMBERS[:30], *STRINGS)
            values = [draw.choice(odd) for _ in range(draw.choice((1, 2, 3)))]
            words.append(f"{section}.{key}={','.join(values)}")

        def act():
            found = comparison.vary(recipe.read("digits", []), words)
            for made in found.values():
                check(made)

        return Case("--vary", act, opens=(recipe.BUILT_IN,), note=repr(words))

    def read(self, file: Path, words: list[str], trains: bool = False) -> None:
        made = recipe.read(str(file), words)
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
        asked = {(s, key): value for s, values in tables.items() for key, value in values.items()}
        for text in words:
            key, _, value = text.partition("=")
            section, _, key = key.strip().partition(".")
            asked[section, key] = value_of(section, key, value)
        for (section, key), value in asked.items():
            got = getattr(getattr(made, section), key)
            if isinstance(value, str) and section in ("model", "data", "dualspeed", "regate"):
                assert got == value or Path(got).is_absolute(), f"{section}.{key} is {got!r}, not {value!r}"
            else:
                assert got == value, f"{section}.{key} is {got!r}, not {value!r}"
                assert type(got) in (type(value), float)
        check(made)
        if trains:
            self.train(made)

    def train(self, made: recipe.Recipe) -> None:
        """Three steps of every stage, with a model of noise. A refusal here comes late, but in words."""
        few = {"steps": 3, "epochs": 0.0}
        stages = {name: dataclasses.replace(stage, **few, batch=min(stage.batch, 3)) for name, stage in made.stages()}
        regate = dataclasses.replace(made.regate, reference="", warmup=min(made.regate.warmup, 2))
        made = dataclasses.replace(
            made, run=dataclasses.replace(self.small.run, seed=made.run.seed), model=self.small.model,
            data=self.small.data, digits=self.small.digits, regate=regate,
            lora=dataclasses.replace(made.lora, rank=min(made.lora.rank, 8)),
            dualspeed=dataclasses.replace(made.dualspeed, isolator_from=""), **stages,
        )  # fmt: skip
        build.place(made)
        model, source = build.build_model(made), digits.from_recipe(made)
        for number, (name, stage) in enumerate(made.stages()):
            run = StageRun(made, model, source, name, number, stage, Totals())
            run._announce()
            batches = loader.batches(source, run._ahead(), run.pad)
            entries = [run._step(step, batches, None) for step in range(run.steps)]
            assert [entry["step"] for entry in entries] == [1, 2, 3]
            assert all(math.isfinite(entry["loss"]) for entry in entries)
            json.dumps(entries, allow_nan=False)
            assert all(p.isfinite().all() for p in run.names), "a weight is not finite"


def value_of(section: str, key: str, text: str) -> object:
    """What a word of --set means: a number or a truth value if the key wants one, else the text."""
    kind = next(kind for s, k, kind in KEYS if (s, k) == (section, key))
    text = text.strip()
    try:
        value, *more = tomllib.loads(f"x = {text}").values()
    except (ValueError, RecursionError):
        return text
    if more:
        return text
    return value if kind is not str or isinstance(value, str) else text


GOOD = (
    ("dualspeed", "keep", "0.3"), ("dualspeed", "plugin", '"grid"'), ("dualspeed", "schedule", '"full"'),
    ("train", "lr", "1e-4"), ("sts", "skip", "0.5"), ("lora", "rank", "4"), ("scale", "window", "2"),
)  # fmt: skip


def setting(draw: random.Random) -> tuple[str, str, str]:
    """A key, or nearly one, and a value in TOML, of the key's type or another one."""
    section, key, kind = draw.choice(KEYS)
    if draw.random() < 0.05:
        section = draw.choice((section + "s", section[:-1], section.upper(), "", "x", '"a.b"', "é"))
    if draw.random() < 0.05:
        key = draw.choice((key + "s", key[:-1], key.upper(), "", "x", '"a b"', f"{key}.x"))
    usual = {int: NUMBERS, float: NUMBERS, bool: ("true", "false", "1", "True", "yes"), str: STRINGS}[kind]
    value = draw.choice(usual if draw.random() < 0.85 else draw.choice((NUMBERS, STRINGS, SHAPES)))
    return section, key, json.dumps(value, ensure_ascii=False) if value in STRINGS else value


def word(draw: random.Random) -> str:
    section, key, value = setting(draw)
    if draw.random() < 0.5 and value[:1] == '"' == value[-1:] and value.isascii():
        value = value[1:-1].encode().decode("unicode_escape")
    if draw.random() < 0.1:
        value = draw.choice(SHAPES)
    others = (f"{section}.{key}", f"{section}={value}", f" {section}.{key} ={value}")
    return draw.choice((f"{section}.{key}={value}",) * 8 + others)


def toml(draw: random.Random) -> tuple[str, str]:
    tables: dict[str, list[str]] = {"train": ["steps = 4"]}
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        section, key, value = setting(draw)
        tables.setdefault(section, []).append(f"{key} = {value}")
    text = "".join(f"[{section}]\n" + "".join(line + "\n" for line in lines) for section, lines in tables.items())
    return text, repr(text[:200])


def built_in() -> list[str]:
    return [file.read_text() for file in sorted(recipe.BUILT_IN.glob("*.toml"))]


def check(made: recipe.Recipe) -> None:
    """What a run does with a recipe before it has a model, and the numbers of its first steps."""
    again = recipe.from_tables(tomllib.loads(made.to_toml()), "again")
    assert again == made, "it is another recipe after it was written to a file"
    for _, stage in made.stages():
        assert 1 <= stage.total(1000) <= 10**9, f"{stage.total(1000):.3g} steps"
        assert stage.batch <= 10**6, f"a batch of {stage.batch:.3g}"
        assert max(stage.lr, stage.connector_lr) * stage.weight_decay < 1, "weight decay changes the sign of weights"

    for name, section, most in (
        ("isolator", made.dualspeed, 10**4), ("threads", made.run, 10**4), ("rank", made.lora, 10**5),
        ("side", made.digits, 10**3), ("width", made.digits, 10**5), ("layers", made.digits, 10**3),
    ):  # fmt: skip
        assert getattr(section, name) <= most, f"{name} = {getattr(section, name):.3g}"
    assert math.isfinite(made.lora.scale)
    assert made.folder.name == made.run.name, f"run.name {made.run.name!r} is the folder {made.folder}"
    str(made.folder).encode()
