"""Every command where names are not UTF-8, and where the locale has only ASCII: it works, or says why in one line.

The commands of a case run one after the other in one process, in a working directory with such a name, on relative
paths with such names in them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import tiny
from support.album import album
from support.digits_runs import small_base
from support.runs import ROOT
from support.waiting import HANGS

SEVERAL = """
import json, os, sys, traceback
from scale.__main__ import main as scale
from tinyspeed.cli import main
for words in json.loads(sys.stdin.read()):
    words = [os.fsdecode(word.encode("utf-8", "surrogateescape")) for word in words]  # as in sys.argv
    try:
        code = scale(words[1:]) if words[0] == "scale" else main(words)
    except BaseException:
        traceback.print_exc()
        code = 1
    print(f"\\n== {code}", file=sys.stderr, flush=True)
"""
UTF8, ASCII = ("utf8=1", "C.UTF-8"), ("utf8=0", "C")
CASES = {
    "UTF-8": (UTF8, "café"),
    "not UTF-8": (UTF8, os.fsdecode(b"caf\xe9")),
    "in ASCII": (ASCII, "café"),
    "not UTF-8, in ASCII": (ASCII, os.fsdecode(b"caf\xe9")),
}
TOML = """
run.name = "é"
data.kind = "digits"
digits = {tower_steps = 1, width = 16, layers = 1, tower_width = 16, tower_layers = 1}
train = {steps = 1, batch = 1}
"""
RUN = [
    "--set=run.device=cpu", "--set=run.threads=1", "--set=align.steps=1", "--set=train.steps=2", "--set=train.batch=2",
    "--set=align.batch=2", "--set=data.eval_pictures=10", "--set=model.path=base",
]  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Models, pictures and questions, with plain names."""
    home = tmp_path_factory.mktemp("given")
    small_base(home / "base")
    album(home, 4)
    tiny.checkpoint("llava", home / "llava")
    line = {"question_id": 1, "image": "p0-0.jpg", "text": "A?", "label": "yes"}
    (home / "questions.json").write_text(json.dumps(line) + "\n")
    return home


def commands(name: str) -> list[list[str]]:
    """With one name for whatever has a name; `base`, `llava` and the like are beside it."""
    chat = ["--set=data.kind=chat", "--set=model.path=llava", "--set=align.steps=0", "--set=run.name=1"]
    pope = ["--task", "pope", "--questions", "questions.json", "--images"]
    return [
        ["train", "digits", *RUN],
        ["train", "digits", *RUN, "--resume"],
        ["train", "digits", *RUN, f"--set=run.name={name}"],
        ["train", "digits", *RUN, f"--set=run.folder={name}", "--set=run.name=other"],
        ["train", "digits", *RUN, f"--set=run.cache={name}", "--set=run.name=cached"],
        ["train", "digits", *RUN, *chat, f"--set=data.file={name}.json", "--set=data.images=images"],
        [
            "train",
            "digits",
            *RUN,
            *chat,
            "--set=run.name=2",
            "--set=data.file=train.json",
            f"--set=data.images={name}-s",
        ],
        ["train", f"{name}.toml"],
        ["eval", "runs/demo"],
        ["export", "runs/demo", f"{name}-out"],
        ["ask", "llava", f"images/{name}.jpg", "What?", "--max-new-tokens=2"],
        ["ask", name, "images/p0-0.jpg", "What?", "--max-new-tokens=2"],
        ["ask", "llava", f"{name}?", "--max-new-tokens=2"],
        ["eval", "llava", *pope, "images"],
        ["eval", name, *pope, f"{name}-s"],
        ["look", f"images/{name}.jpg", "--plugin=grid", "--out", f"{name}.png"],
        ["look", "images/p0-0.jpg", "--plugin=grid", "--tower", name],
        ["estimate", f"{name}.toml"],
        ["compare", "digits", *RUN, f"--set=run.name={name}", "--only=full"],
        ["compare", "digits", *RUN, "--set=run.name=c", "--only=full"],
        ["demo", "digits", *RUN, "--set=run.name=d"],
        ["bench", "savings", "--layers=4", "--width=32", "--out", f"{name}.bench.json"],
        ["scale", "plan", "digits", *RUN, "--gpus=2", "--json", f"{name}.plan.json"],
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems want names in UTF-8")
@pytest.mark.parametrize("case", CASES)
def test_every_command_works_or_is_one_line(case, given, tmp_path):
    (utf8, locale), name = CASES[case]
    here = Path(shutil.copytree(given, tmp_path / name))
    shutil.copytree(given / "images", here / f"{name}-s")
    shutil.copytree(given / "llava", here / name)
    shutil.copy(here / "images" / "p0-0.jpg", here / "images" / f"{name}.jpg")
    shutil.copy(here / "train.json", here / f"{name}.json")
    (here / f"{name}.toml").write_text(TOML, encoding="utf-8")
    told = commands(name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
    environment |= {"LC_ALL": locale, "PYTHONPATH": str(ROOT), "PYTHONCOERCECLOCALE": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-X", utf8, "-c", SEVERAL], input=json.dumps(told).encode(), cwd=here, env=environment,
        capture_output=True, timeout=HANGS,
    )  # fmt: skip
    parts = re.split(r"\n== (\w+)\n", done.stderr.decode())
    assert len(parts) == 2 * len(told) + 1, parts[-1]
    refused = []
    for words, said, code in zip(told, parts[::2], parts[1::2], strict=False):
        lines = [line for line in re.split("[\r\n]", said) if line.startswith(("tinyspeed: ", "scale plan: "))]
        assert "Traceback" not in said, (words, said)
        assert (code, len(lines)) in (("0", 0), ("2", 1)), (words, code, said)
        refused += lines
    if case == "UTF-8":
        assert not refused
    else:
        assert len(refused) < len(told), "commands that all end alike show nothing"
