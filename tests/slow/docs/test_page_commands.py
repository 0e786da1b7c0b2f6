"""Every command and every Python block of the README and the guide does what the page says, in a short form: the same
words, and behind them what makes it small. Commands that need a GPU or a network are marked on their page as such."""

import functools
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support import pages, tiny
from support.album import album
from support.pages import GUIDE, PAGES, README, ROOT
from support.trainers import Pictures, gather

from tinyspeed import cli
from tinyspeed.bench import loss, pruning, savings, scaling
from tinyspeed.data import digits_model
from tinyspeed.pruning import registry

DIGITS = [
    "model.path=base", "align.steps=1", "train.steps=2", "train.batch=2", "align.batch=2", "data.eval_pictures=10",
    "digits.layers=1",
]  # fmt: skip
BIRDS = ["model.path=llava", "train.epochs=0.0", "train.steps=2", "train.batch=2", "data.workers=0", "data.max_rows=0"]
# How a command begins -> what it gets behind its own words.
SHORT = {
    "tinyspeed demo": DIGITS,
    "tinyspeed train digits": DIGITS,
    "tinyspeed train digits --set run.name=all": [
        *DIGITS, "model.path=base-3", "digits.layers=3", "digits.pictures=40", "train.steps=70",
    ],
    "tinyspeed train llava-1.5-7b-qlora-12gb": BIRDS,
    "tinyspeed train my.toml": BIRDS,
    "tinyspeed estimate": [],
    "tinyspeed estimate my.toml": ["model.path=llava", "data.max_rows=0"],
    "tinyspeed ask": ["--max-new-tokens", "2"],
    "tinyspeed eval": [],
    "tinyspeed export": [],
    "tinyspeed look": [],
    "tinyspeed compare": [*DIGITS, "--seeds", "1"],
    "tinyspeed compare --seeds": [*DIGITS, "--seeds", "1", "--only", "full"],
    "tinyspeed bench step": ["--size", "dwarf", "--text", "8", "--batch", "2", "--repeats", "1"],
    "tinyspeed bench levers": ["--size", "dwarf", "--batch", "2", "--repeats", "1"],
    "tinyspeed bench scaling": ["--repeats", "1"],
    "tinyspeed bench loss": ["--width", "16", "--repeats", "1"],
    "tinyspeed bench data": ["--samples", "8", "--workers", "0", "--repeats", "1"],
    "tinyspeed bench pruning": ["--width", "16", "--repeats", "1"],
    "tinyspeed bench savings": ["--layers", "4", "--width", "16"],
}  # fmt: skip
RUNS = [  # what other commands need
    "make demo",
    "tinyspeed train digits --set train.lr=1e-3 --set run.name=mine",
    "tinyspeed train llava-1.5-7b-qlora-12gb --set data.file=birds.json --set data.images=pictures",
    "tinyspeed train my.toml",
]
COMMANDS = list(dict.fromkeys(c for page in PAGES for c, marked in pages.commands(page).items() if not marked))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry) + "\n" for entry in content) if isinstance(content, list) else json.dumps(content)
    path.write_text(lines)


def questions(desk, picture):
    """A question of each official benchmark, about a picture where its own would be."""
    for name in ("val2014/COCO_val2014_000000000007", "train_images/a", "gqa_images/a"):
        (desk / name).parent.mkdir(exist_ok=True)
        shutil.copy(picture, desk / f"{name}.jpg")
    dog = {"question_id": 1, "image": "COCO_val2014_000000000007.jpg", "text": "Is there a dog?", "label": "yes"}
    for split in ("popular", "random", "adversarial"):
        write(desk / "coco_pope" / f"coco_pope_{split}.json", [dog])
    which = {"question": "Which?", "choices": ["a", "b"], "answer": 1, "hint": "", "image": None}
    write(desk / "scienceqa" / "problems.json", {"4": which})
    write(desk / "scienceqa" / "pid_splits.json", {"test": ["4"]})
    (desk / "scienceqa" / "images").mkdir()
    sign = {"question_id": 1, "image_id": "a", "question": "what?", "answers": ["x"] * 10}
    write(desk / "TextVQA_0.5.1_val.json", {"data": [sign]})
    write(desk / "ocr.jsonl", [{"question_id": "a", "text": "What?\nReference OCR token: x"}])
    write(desk / "testdev_balanced_questions.json", {"20": {"question": "Is it?", "imageId": "a", "answer": "yes"}})
    many = {"question_id": 7, "image_id": 7, "question": "How many?"}
    write(desk / "questions.json", {"data_subtype": "val2014", "questions": [many]})
    answers = [{"answer": "2", "answer_id": i} for i in range(10)]
    write(
        desk / "annotations.json",
        {"annotations": [{"question_id": 7, "answers": answers, "answer_type": "number"}]},
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder as a reader has it: pictures and records, models, files of benchmarks, and the runs of `RUNS`."""
    desk = tmp_path_factory.mktemp("desk")
    sizes = {"width": 16, "tower_width": 16, "tower_layers": 1, "tower_steps": 1}
    for name, layers in (("base", 1), ("base-3", 3)):
        digits_model.prepare(desk / name, 0, bar=False, layers=layers, **sizes)
    tiny.checkpoint("llava", desk / "llava")
    records = json.loads(Path(album(desk / "album")).read_text())
    (desk / "album" / "images").rename(desk / "pictures")
    picture = desk / "pictures" / "p0-0.jpg"
    (desk / "pictures" / "birds").mkdir()
    for copy in ("pictures/birds/0001.jpg", "photo.jpg"):
        shutil.copy(picture, desk / copy)
    (record,) = json.loads(pages.blocks(README, "json")[0])
    (desk / "birds.json").write_text(json.dumps([record, *records]))
    (desk / "my.toml").write_text(pages.blocks(ROOT / "tutorials" / "guide" / "pictures.md", "toml")[0])
    questions(desk, picture)
    done = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        for command in RUNS:
            execute(command, done)
    return desk, done


def execute(command, done) -> None:
    """Run a command in its short form, once."""
    if command in done:
        return
    program, *words = shlex.split(command)
    if program == "make":
        lines = subprocess.run(["make", "-C", ROOT, "--dry-run", *words], check=True, capture_output=True, text=True)
        for line in re.findall(r"^\S*bin/(tinyspeed .*)", lines.stdout, flags=re.MULTILINE):
            execute(line.strip(), done)
    else:
        behind = SHORT[max((begin for begin in SHORT if command.startswith(begin)), key=len)]
        behind = [word for value in behind for word in (("--set", value) if "=" in value else (value,))]
        assert cli.main([*words, *behind]) == 0
    done[command] = True


@pytest.fixture
def small_benchmarks(dwarf, monkeypatch):
    """Benchmarks take less than a second, in what no flag of theirs says."""
    for module, settings in (
        (loss, {"vocab": 500}), (scaling, {"frames": (1, 2)}), (savings, {"repeats": 1}),
        (pruning, {"images": 1, "rows": 40}),
    ):  # fmt: skip
        monkeypatch.setattr(module, "measure", functools.partial(module.measure, **settings))


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_works(desk, small_benchmarks, monkeypatch, command):
    folder, done = desk
    monkeypatch.chdir(folder)
    execute(command, done)
    assert done[command]


def test_the_demo_prints_what_its_page_shows(desk, monkeypatch, capsys):
    folder, _ = desk
    monkeypatch.chdir(folder)
    execute("tinyspeed demo", {})
    (page,) = [page for page in GUIDE if page.stem == "demo"]
    shown, printed = (
        re.findall(r"^\| ([^|]*?) *\||^(runs/\S+): ", text, flags=re.MULTILINE)
        for text in (pages.blocks(page, "text")[0], capsys.readouterr().out)
    )
    assert shown == printed


@pytest.mark.parametrize("page", [page for page in PAGES if pages.blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_of_a_page_works(desk, monkeypatch, page):
    """From the first block to the last, with a small model in place of the published one."""
    folder, _ = desk
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "PLUGINS", {**registry.PLUGINS})
    shutil.rmtree(folder / "out", ignore_errors=True)  # of another page
    known = {"my_data": Pictures(8), "my_collator": gather}
    for block in pages.blocks(page, "python"):
        if "optimizer" in block:
            known["batches"] = [gather([Pictures(8)[i]]) for i in range(2)]
            known["optimizer"] = torch.optim.AdamW(p for p in known["model"].parameters() if p.requires_grad)
        block = block.replace("llava-hf/llava-1.5-7b-hf", "base").replace("bf16=True", "bf16=True, use_cpu=True")
        exec(compile(block, str(page), "exec"), known)
    assert isinstance(known["model"], torch.nn.Module)
    if "Trainer(" in pages.read(page):
        assert (folder / "out" / "final" / "config.json").is_file()
