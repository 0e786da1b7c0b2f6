"""Every command of tinyspeed that writes files, on a small scale: a run of every kind, and what is made from a run.

Everything that a command writes is below one folder, and everything that it reads is in another.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
from pyarrow import parquet
from slow.attacks import killed_runs
from support import tiny
from support.album import album

SMALL = (
    *killed_runs.COMMON, "digits.pictures=8", "digits.tower_steps=2", "align.steps=2", "train.steps=8",
    "data.eval_pictures=8",
)  # fmt: skip
ALL = (*killed_runs.SYSTEMS["all of it"], "train.steps=16")
CHAT = (
    "run.save_every=2", "data.kind=chat", "data.skip_bad=true", "train.steps=7", "train.batch=4", "dualspeed.slow=0.4",
    "dualspeed.keep=0.3",
)  # fmt: skip


@dataclass
class Command:
    """A command that writes. The last three are what it did when nothing disturbed it (see `full_disk.py`)."""

    name: str
    words: list[str]
    ranks: int = 1  # more than one: a command of `scale`
    starts_over: bool = False  # when it is interrupted, it does all of its work again
    moments: list[str] = field(default_factory=list)  # at which its first rank touched the disk
    pages: int = 0  # that it filled
    files: dict[str, bytes] = field(default_factory=dict)


def commands_that_write(home: Path, out: Path) -> tuple[list[Command], list[str]]:
    """The commands, which write into `out`, and the words of one that must run before them: it trains the run in `home`
    that some of them read. Everything else that they read is put into `home` here."""
    album(home, 12)
    llava = tiny.checkpoint("llava", home / "llava")
    tower, llm = tiny.parts(home)
    reference = tiny.llm(home / "reference")
    questions = [{"question_id": i, "image": "p0-0.jpg", "text": f"{i}?", "label": "yes"} for i in range(3)]
    (home / "pope.json").write_text("".join(json.dumps(question) + "\n" for question in questions))
    data = _parquet(home)
    trained = home / "trained" / "runs" / "run"

    def run(*values: str, folder: Path = out) -> list[str]:
        where = (f"run.folder={folder / 'runs'}", f"run.cache={folder / 'cache'}", "run.name=run")
        return [word for value in (*SMALL, *where, *values) for word in ("--set", value)]

    chat = (*CHAT, f"model.path={llava}", f"data.file={data}", "lora.rank=4", "data.feature_cache_gb=1")
    regate = ("regate.keep=0.5", "regate.warmup=2", "regate.cycle=4", "regate.refresh=1", "align.steps=0")
    parts = (*CHAT, f"model.tower={tower}", f"model.llm={llm}", f"data.file={home / 'train.json'}")
    return [
        Command("digits", ["train", "digits", *run(*ALL)]),
        Command("chat", ["train", "digits", *run(*chat, *regate, f"regate.reference={reference}")]),
        Command("parts", ["train", "digits", *run(*parts, f"data.images={home / 'images'}", "train.steps=2")]),
        Command("scale", ["digits", *run(*ALL)], ranks=2),
        Command("demo", ["demo", "digits", *run()]),
        Command("compare", ["compare", "digits", *run("train.steps=4"), "--only", "full"], starts_over=True),
        Command("export", ["export", str(trained), str(out / "model")]),
        Command("adapter", ["export", str(trained), str(out / "adapter"), "--adapter"]),
        Command("eval", [
            "eval", str(llava), "--task", "pope", "--questions", str(home / "pope.json"), "--images",
            str(home / "images"), "--out", str(out / "pope.jsonl"),
        ]),
        Command("look", ["look", str(home / "images/p0-0.jpg"), "--tower", str(llava), "--out", str(out / "look.png")]),
    ], ["train", "digits", *run(*chat, "align.steps=0", folder=home / "trained")]  # fmt: skip


def _parquet(home: Path) -> Path:
    """The album as a parquet file with the pictures inside, and one record that has nothing to learn."""

    rows = []
    for record in json.loads((home / "train.json").read_text()):
        names = record.get("image", [])
        pictures = [(home / "images" / name).read_bytes() for name in ([names] if isinstance(names, str) else names)]
        rows.append({**record, "image": None, "images": [{"bytes": picture, "path": None} for picture in pictures]})
    rows.append({"id": "bad", "conversations": [{"from": "human", "value": "What?"}], "images": []})
    parquet.write_table(pyarrow.Table.from_pylist(rows).drop_columns("image"), home / "train.parquet")
    return home / "train.parquet"
