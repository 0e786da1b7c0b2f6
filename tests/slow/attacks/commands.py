"""Everything in tinyspeed that writes, as commands on a small scale: a run of every kind, and whatever is made of one.

All that a command writes goes below one folder; what it is made from is elsewhere.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
from pyarrow import parquet
from support import tiny
from support.album import album
from torture import kills

SIZES = (
    *kills.COMMON, "digits.pictures=8", "digits.tower_steps=2", "align.steps=2", "train.steps=8",
    "data.eval_pictures=8",
)  # fmt: skip
ALL = (*kills.SYSTEMS["all of it"], "train.steps=16")
CHAT = (
    "run.save_every=2", "data.kind=chat", "data.skip_bad=true", "train.steps=7", "train.batch=4", "dualspeed.slow=0.4",
    "dualspeed.keep=0.3",
)  # fmt: skip


@dataclass
class Deed:
    """Something that writes. What it does when nobody disturbs it is found out first (`disk.py`)."""

    name: str
    words: list[str]
    ranks: int = 1  # more than one: a command of `scale`
    anew: bool = False  # cut off, it does what it was at from the beginning
    moments: list[str] = field(default_factory=list)  # of its first rank
    pages: int = 0
    files: dict[str, bytes] = field(default_factory=dict)


def all_of_them(home: Path, out: Path) -> tuple[list[Deed], list[str]]:
    """They write into `out`. What they are made from is in `home`, but for what a command makes that is to be given
    before, the second of the two."""
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
        return [word for value in (*SIZES, *where, *values) for word in ("--set", value)]

    chat = (*CHAT, f"model.path={llava}", f"data.file={data}", "lora.rank=4", "data.feature_cache_gb=1")
    gated = ("regate.keep=0.5", "regate.warmup=2", "regate.cycle=4", "regate.refresh=1", "align.steps=0")
    parts = (*CHAT, f"model.tower={tower}", f"model.llm={llm}", f"data.file={home / 'train.json'}")
    return [
        Deed("digits", ["train", "digits", *run(*ALL)]),
        Deed("chat", ["train", "digits", *run(*chat, *gated, f"regate.reference={reference}")]),
        Deed("parts", ["train", "digits", *run(*parts, f"data.images={home / 'images'}", "train.steps=2")]),
        Deed("scale", ["digits", *run(*ALL)], ranks=2),
        Deed("demo", ["demo", "digits", *run()]),
        Deed("compare", ["compare", "digits", *run("train.steps=4"), "--only", "full"], anew=True),
        Deed("export", ["export", str(trained), str(out / "model")]),
        Deed("adapter", ["export", str(trained), str(out / "adapter"), "--adapter"]),
        Deed("eval", [
            "eval", str(llava), "--task", "pope", "--questions", str(home / "pope.json"), "--images",
            str(home / "images"), "--out", str(out / "pope.jsonl"),
        ]),
        Deed("look", ["look", str(home / "images/p0-0.jpg"), "--tower", str(llava), "--out", str(out / "look.png")]),
    ], ["train", "digits", *run(*chat, "align.steps=0", folder=home / "trained")]  # fmt: skip


def _parquet(home: Path) -> Path:
    """The album as parquet, with its pictures inside, and a record that nothing can be learned of."""
    rows = []
    for record in json.loads((home / "train.json").read_text()):
        names = record.get("image", [])
        pictures = [(home / "images" / name).read_bytes() for name in ([names] if isinstance(names, str) else names)]
        rows.append({**record, "image": None, "images": [{"bytes": picture, "path": None} for picture in pictures]})
    rows.append({"id": "bad", "conversations": [{"from": "human", "value": "What?"}], "images": []})
    parquet.write_table(pyarrow.Table.from_pylist(rows).drop_columns("image"), home / "train.parquet")
    return home / "train.parquet"
