"""Commands as a user has them: whole paths through them, most in processes of their own."""

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from support import digits_runs, tiny
from support.album import album
from support.digits_runs import ALIGN, TUNE, small_base
from support.runs import (
    ROOT,
    SMALL_GPU,
    finish,
    recipe_file,
    run_cli,
    run_held,
    run_python,
    settings,
    steps_done,
    train_through,
    unlike,
)
from support.trained import saved, train_a_little
from support.waiting import HANGS, until
from transformers import AutoModelForImageTextToText

from scale import __main__
from tinyspeed import cli, recipe
from tinyspeed.data import digits
from tinyspeed.data.examples import collate
from tinyspeed.evaluation import accuracy
from tinyspeed.models import export, loading, lora
from tinyspeed.training import train, trained_model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_whole_path_on_the_command_line(home, tmp_path, family, capsys):
    """QLoRA, SIGKILL, resume, export, plain transformers in a fresh process, a question."""
    whole = settings(home, tmp_path, "whole", *SMALL_GPU["qlora"], family=family)
    train.train(whole, bar=False)
    made = settings(home, tmp_path, "run", family=family)
    changes = [word for change in SMALL_GPU["qlora"] for word in ("--set", change)]
    command = ("train", tmp_path / "run.toml", *changes)

    killed = run_held(3, "tinyspeed", *command, folder=tmp_path)
    until(lambda: steps_done(made) == 3, "it stands still after step 3", killed)
    killed.kill()
    killed.communicate()
    out, err = finish(run_cli(*command, "--resume", folder=tmp_path))
    assert "model in" in out
    assert "Traceback" not in err
    assert not unlike(settings(home, tmp_path, "run", *SMALL_GPU["qlora"], family=family), whole)

    assert cli.main(["export", str(made.folder), str(tmp_path / "merged")]) == 0
    assert cli.main(["export", str(made.folder), str(tmp_path / "adapter"), "--adapter"]) == 0
    one, other = (load_file(f / "model.safetensors") for f in (tmp_path / "merged", made.folder / "model"))
    assert all(torch.equal(one[n], other[n]) for n in one)
    script = (
        "import sys; from transformers import AutoModelForImageTextToText as M, AutoProcessor as P\n"
        "from PIL import Image; from peft import PeftModel\n"
        "base, merged, adapter, picture = sys.argv[1:]\n"
        "p = P.from_pretrained(merged)\n"
        "chat = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What is number 0, 0?'}]}]\n"
        "text = p.apply_chat_template(chat, add_generation_prompt=True)\n"
        "b = p(images=Image.open(picture).convert('RGB'), text=text, return_tensors='pt')\n"
        "for m in (M.from_pretrained(merged), PeftModel.from_pretrained(M.from_pretrained(base), adapter)):\n"
        "    new = m.eval().generate(**b, max_new_tokens=12, do_sample=False)[0, b['input_ids'].shape[1]:]\n"
        "    print(repr(p.decode(new, skip_special_tokens=True).strip()))\n"
        "assert not any(name.split('.')[0] == 'tinyspeed' for name in sys.modules)\n"
    )
    picture = home / "images" / "p0-0.jpg"
    paths = [home / family, tmp_path / "merged", tmp_path / "adapter", picture]
    out, _ = finish(run_python(script, *paths, folder=tmp_path))
    merged, adapted = out.splitlines()
    assert merged == adapted
    question = "What is number 0, 0?"
    capsys.readouterr()
    assert cli.main(["ask", str(tmp_path / "merged"), str(picture), question, "--max-new-tokens", "12"]) == 0
    assert repr(capsys.readouterr().out.strip()) == merged


def test_bad_records_on_the_command_line(home, tmp_path):
    settings(home, tmp_path, "run")
    records = json.loads((home / "train.json").read_text())
    records[4]["image"] = "gone.jpg"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    command = ("train", tmp_path / "run.toml", "--set", f"data.file={tmp_path}/bad.json")
    refused = run_cli(*command, folder=tmp_path)
    _, err = refused.communicate(timeout=HANGS)
    assert refused.returncode == 2
    assert re.search(r"bad\.json: record 5 \(id r4\).*gone\.jpg", err)
    assert "Traceback" not in err
    _, err = finish(run_cli(*command, "--skip-bad", "--set", "train.steps=1", folder=tmp_path))
    listed = tmp_path / "run" / "skipped.txt"
    assert f"1 of 10 records left out, listed in {listed}; the first: {listed.read_text().strip()}" in err
    assert "gone.jpg" in listed.read_text()


# A /dev/shm of this command's own, in which so many bytes are left: nobody else's is touched.
SMALL_SHM = (
    'mount -t tmpfs -o size=$((4096 + $0)) tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full && exec "$@"'
)
APART = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL_SHM)


@pytest.mark.parametrize(("left", "says"), [("0", "cannot write /dev/shm"), ("65536", "a process .* was killed")])
def test_a_dev_shm_that_is_full_is_one_line_with_the_way_out(home, tmp_path, left, says):
    """Too small for the queues of the processes that decode pictures, or for the pictures."""
    if shutil.which("unshare") is None or subprocess.run([*APART, "0", "true"], capture_output=True).returncode:
        pytest.skip("a user may not mount anything here")
    settings(home, tmp_path, "run")
    command = [sys.executable, "-m", "tinyspeed", "train", tmp_path / "run.toml"]
    command += ["--set", "data.workers=1", "--set", "train.batch=8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([*APART, left, *command], env=environment, capture_output=True, text=True, timeout=HANGS)
    assert ended.returncode == 2, ended.stderr
    said = [line for line in ended.stderr.splitlines() if line.startswith("tinyspeed: ")][-1]
    assert re.search(says, said)
    assert "data.workers" in said
    assert "Traceback" not in ended.stderr


def test_a_dry_run_takes_one_step_of_each_mode_and_leaves_no_run(home, tmp_path):
    settings(home, tmp_path, "run", *SMALL_GPU["qlora"])
    out, _ = finish(run_cli("train", tmp_path / "run.toml", "--dry-run", folder=tmp_path))
    assert re.search(r"\| train +\| fast ", out)
    assert re.search(r"\| train +\| slow ", out)
    assert not (tmp_path / "run" / "checkpoints").exists()
    finish(run_cli("train", tmp_path / "run.toml", "--set", "train.steps=1", folder=tmp_path))


def test_an_official_evaluation_on_the_command_line(home, tmp_path, capsys, monkeypatch):
    """POPE in its own format, of an exported folder; a second call asks nothing again."""
    lines = [
        {"question_id": i, "image": f"p{i}-0.{'png' if i % 2 else 'jpg'}", "text": f"Is there a {w}?", "label": label}
        for i, (w, label) in enumerate((("dog", "yes"), ("cat", "no")))
    ]
    folder = tmp_path / "pope"
    folder.mkdir()
    for split in ("adversarial", "popular", "random"):
        text = "\n".join(json.dumps({**line, "question_id": line["question_id"] + 1}) for line in lines)
        (folder / f"coco_pope_{split}.json").write_text(text + "\n")
    command = ["eval", str(home / "llava"), "--task", "pope", "--questions", str(folder)]
    command += ["--images", str(home / "images"), "--out", str(tmp_path / "mine" / "pope.jsonl")]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    scores = json.loads((tmp_path / "mine" / "pope.json").read_text())
    assert scores["task"] == "pope"
    assert 0 <= scores["accuracy"] <= 100
    assert f"{scores['accuracy']:.2f}" in out
    kept = (tmp_path / "mine" / "pope.jsonl").read_text().splitlines()
    assert len(kept) == 1 + 3 * 2
    from tinyspeed.evaluation import ask

    monkeypatch.setattr(ask, "answer", None)
    assert cli.main(command) == 0
    assert capsys.readouterr().out == out
    monkeypatch.undo()
    before = sorted(p.name for p in (home / "llava").iterdir())
    monkeypatch.chdir(tmp_path / "mine")
    assert cli.main(command[:-2]) == 0
    here = f"{home.name}-llava-pope.jsonl"
    assert f"predictions go to {here}" in capsys.readouterr().err
    assert (tmp_path / "mine" / here).read_text().splitlines()[1:] == kept[1:]
    assert sorted(p.name for p in (home / "llava").iterdir()) == before, "a model's folder is not ours to write to"
    assert cli.main(["eval", str(home / "llava"), "--task", "pop"]) == 2
    assert "did you mean 'pope'" in capsys.readouterr().err
    absent = ["eval", str(home / "llava"), "--task", "pope", "--questions", "x", "--images"]
    assert cli.main([*absent, str(tmp_path / "absent")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert cli.main([*absent, str(tmp_path)]) == 2
    assert "cannot read x" in capsys.readouterr().err


def test_the_demo_killed_for_real_at_a_random_step_ends_the_same(tmp_path):
    base = small_base(tmp_path / "base")
    whole, made = (digits_runs.settings(base, tmp_path, name) for name in ("whole", "run"))
    train.train(whole, bar=False)
    step = random.randrange(1, ALIGN + TUNE)
    killed = run_held(step, "tinyspeed", "demo", recipe_file(made), folder=tmp_path)
    until(lambda: steps_done(made) == step, f"it stands still after step {step}", killed)
    killed.kill()
    killed.communicate()
    assert not (made.folder / "model").exists()
    finish(run_cli("demo", "run.toml", folder=tmp_path))
    assert not unlike(made, whole)


def test_a_hub_id_is_another_name_for_a_folder(home, tmp_path, monkeypatch):
    """A cache as the hub's client leaves it, and no network: every command finds the model there, and the same one."""
    commit = "1f" * 20
    repository = tmp_path / "hf" / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, file in enumerate((home / "llava").iterdir()):
        blob = shutil.copy(file, repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    changes = ("lora.rank=2", "train.steps=2")
    local, made = (settings(home, tmp_path, name, *changes) for name in ("local", "run"))
    train.train(local, bar=False)
    toml, merged, adapter = tmp_path / "run.toml", tmp_path / "merged", tmp_path / "adapter"
    words = [word for change in (*changes, "model.path=org/tiny") for word in ("--set", change)]
    finish(run_cli("train", toml, *words, folder=tmp_path))
    assert not unlike(made, local)
    record, other = (json.loads((run.folder / "record.json").read_text()) for run in (made, local))
    assert (record["base"], record["revision"]) == ("org/tiny", commit), "which of the hub's versions it was"
    assert (other["base"], other["revision"]) == (str(home / "llava"), None)

    question = (home / "images" / "p0-0.jpg", "What is number 0, 0?", "--max-new-tokens", "4")
    commands = [
        ("ask", made.folder, *question), ("ask", local.folder, *question), ("ask", "org/tiny", *question),
        ("export", made.folder, merged), ("export", made.folder, adapter, "--adapter"),
        ("estimate", toml, *words), ("look", question[0], "--tower", "org/tiny", "--out", tmp_path / "kept.png"),
        ("ask", "org/tinny", *question),
    ]  # fmt: skip
    script = (
        "import contextlib, io, json, sys; from tinyspeed import cli\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out: code = cli.main(command)\n"
        "    print(json.dumps([code, out.getvalue()]))\n"
    )
    given = json.dumps([[str(word) for word in command] for command in commands])
    out, err = finish(run_python(script, given, folder=tmp_path))
    codes, said = zip(*map(json.loads, out.splitlines()), strict=True)
    assert codes == (0, 0, 0, 0, 0, 0, 0, 2), err[-2000:]
    assert said[0] == said[1] != ""
    assert "org/tinny" in err.splitlines()[-1]

    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    plain, base = (AutoModelForImageTextToText.from_pretrained(folder).eval() for folder in (merged, home / "llava"))
    batch = {k: v for k, v in tiny.batch("llava").items() if k != "labels"}
    before = base(**batch).logits
    wanted = plain(**batch).logits
    assert tiny.difference(wanted, before), "two steps have changed the model"
    assert not tiny.difference(PeftModel.from_pretrained(base, adapter).eval()(**batch).logits, wanted, rel=1e-4)


def test_an_export_is_loaded_by_transformers_in_a_process_that_never_saw_tinyspeed(home, family, tmp_path):
    base = str(home / family)
    net = train_a_little(lora.add_lora(loading.load_model(base), rank=4))
    export.merge(saved(net), 2.0, base, tmp_path / "out")
    loading.load_processor(base).save_pretrained(tmp_path / "out")
    script = (
        "import sys, torch; from transformers import AutoModelForImageTextToText as M, AutoProcessor as P\n"
        "from PIL import Image\n"
        "m, p = M.from_pretrained(sys.argv[1]).eval(), P.from_pretrained(sys.argv[1])\n"
        "chat = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]}]\n"
        "b = p(images=Image.new('RGB', (40, 30), 'red'), text=p.apply_chat_template(chat, add_generation_prompt=True),"
        " return_tensors='pt')\n"
        "print(m.generate(**b, max_new_tokens=5, do_sample=False)[0, b['input_ids'].shape[1]:].tolist())\n"
        "assert not any(name.split('.')[0] == 'tinyspeed' for name in sys.modules)\n"
    )
    out, _ = finish(run_python(script, tmp_path / "out", folder=tmp_path))
    processor = tiny.processor(family)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    batch = processor(images=Image.new("RGB", (40, 30), "red"), text=text, return_tensors="pt")
    wanted = net.generate(**batch, max_new_tokens=5, do_sample=False)[0, batch["input_ids"].shape[1] :].tolist()
    assert json.loads(out) == wanted


HEAVY = """
import sys
from tinyspeed import cli

sys.modules["transformers"] = None  # whoever imports it now fails
if sys.argv[1] == "torch":
    sys.modules["torch"] = None
try:
    code = cli.main(sys.argv[2:])
except SystemExit as left:
    code = left.code
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("without", "words", "says"),
    [
        ("torch", "--help", ""),
        ("torch", "--version", ""),
        ("torch", "train digits --set train.lrr=1", "did you mean 'train.lr'"),
        ("torch", "train digits --set dualspeed.kep=1", "did you mean 'dualspeed.keep'"),
        ("torch", "train digits --set train.lr=0", "above 0"),
        ("torch", "train digits --set lr", "section.key=value"),
        ("torch", "train digits --set dualspeed.keep=2", "at most 1"),
        ("torch", "train digits --set dualspeed.schedule=never", "known: adaptive, bernoulli"),
        ("torch", "train llava-1.5-7b-qlora-8gb --set data.file=absent.json", "data.file: there is no file"),
        ("torch", "train llava-1.5-7b-qlora-8gb --set model.path=./absent", "no model folder"),
        ("torch", "train absent.toml", "no recipe file"),
        ("torch", "demo --set train.lrr=1", "did you mean"),
        ("torch", "estimate absent.toml", "no recipe file"),
        ("torch", "compare --set train.lrr=1", "did you mean"),
        ("transformers", "compare --arms papre", "did you mean 'paper'"),
        ("transformers", "compare --only fulll", "did you mean 'full'"),
        ("transformers", "compare --vary dualspeed.kep=1", "did you mean 'dualspeed.keep'"),
        ("torch", "eval absent", "not a run"),
        ("torch", "export absent out", "not a run"),
        ("torch", "eval absent --task pop --questions . --images .", "did you mean 'pope'"),
        ("torch", "ask some/model absent.png why", "cannot read the picture absent.png: No such file or directory\n"),
        ("torch", "ask absent why", "no model folder absent, and no run"),
        ("torch", "ask adapter why", "adapter without its model"),
        ("torch", "eval absent --task pope --questions . --images .", "no model folder absent, and no run"),
        ("transformers", "train digits --set dualspeed.plugin=divprun", "did you mean 'divprune'"),
        ("transformers", "train digits --resume", "no run to resume"),
        ("transformers", "train digits --set model.path=./absent", "no model folder"),
    ],
)
def test_mistakes_are_named_before_anything_heavy_is_imported(tmp_path, without, words, says):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    asked = run_python(HEAVY, without, *words.split(), folder=tmp_path)
    _, err = asked.communicate(timeout=HANGS)
    assert (asked.returncode, "Traceback" in err) == (2 if says else 0, False)
    assert says in err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_run_with_two_views_on_the_command_line(tmp_path, monkeypatch):
    """The digits, aligned first; killed, resumed, exported."""
    changes = [
        "digits.width=32", "digits.tower_width=16", "digits.tower_steps=2", "lora.rank=4", "dualspeed.views=true",
        "dualspeed.slow=0.4", "align.steps=2", "train.steps=6", "train.batch=4", "align.batch=4", "run.save_every=2",
        "train.weight_decay=0.1", "run.threads=1", "run.device=cpu", "data.eval_pictures=40",
    ]  # fmt: skip
    flags = [word for change in [*changes, f"run.folder={tmp_path}", "run.name=whole"] for word in ("--set", change)]
    assert cli.main(["train", "digits", *flags]) == 0
    whole = recipe.of_run(str(tmp_path / "whole"))
    made = recipe.read("digits", [*changes, f"run.folder={tmp_path}", "run.name=run"])
    train_through(monkeypatch, made, 1, 4, 6)
    assert not unlike(made, whole)

    ours = trained_model.load_trained(made)
    lora = {name: p for name, p in ours.named_parameters() if "lora_B" in name}
    for view in ("fast", "slow"):
        assert any(f".{view}." in name and p.any() for name, p in lora.items()), "both were trained and came back"
    assert cli.main(["export", str(made.folder), str(tmp_path / "out")]) == 0
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    batch = collate([digits.Digits(9, 2, "eval").example(i) for i in range(3)], 0)
    accuracy.held_out(ours, made, bar=False)  # which ends in the fast view
    want = ours.eval()(**batch).logits
    assert not tiny.difference(plain(**batch).logits, want)
    ours.views.use("fast")
    assert tiny.difference(ours.model(**batch).logits, want)


def test_the_stages_run_one_after_the_other(tmp_path, monkeypatch):
    """The recipes themselves, on a tiny tower and a tiny LLM. Changed are places, the batch, and how far stage 1
    takes the isolator: further than stage 2 could, had it begun with a new one."""
    monkeypatch.chdir(tmp_path)
    tower, llm = tiny.parts(tmp_path)
    data = {"file": album(tmp_path, 10), "images": "images", "max_rows": 0, "workers": 0, "skip_bad": "true"}
    common = ["model.precision=fp32", "run.device=cpu", *(f"data.{key}={value}" for key, value in data.items())]
    stages = {
        "llava-1.5-7b-stage1": [f"model.tower={tower}", f"model.llm={llm}", "align.batch=2", "align.lr=0.1"],
        "llava-1.5-7b-stage2": ["train.batch=4"],
        "llava-1.5-7b-stage2-lora": ["train.batch=4"],
    }
    for name, changes in stages.items():
        assert __main__.main([name, *(word for change in common + changes for word in ("--set", change))]) == 0
    learned = [load_file(f"runs/{name}/isolator.safetensors")["isolator.weight"] for name in stages]
    for later in learned[1:]:
        assert 0 < (later - learned[0]).abs().max() < 0.001
    before, after = (load_file(f"runs/{name}/model/model.safetensors") for name in (*stages,)[:2])
    assert before.keys() == after.keys()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved
    assert not any("vision_tower" in key for key in moved)
    assert any("language_model" in key for key in moved)
