"""The hobbyist's path: own pictures, 4 bits, adapters, half precision, workers; killed, resumed, exported, asked."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.album import album
from support.runs import Killed, die_before, finish, run_cli, settings, train_through, unlike

from tinyspeed import UserError, cli, recipe
from tinyspeed.data import conversations, loader
from tinyspeed.evaluation import accuracy
from tinyspeed.models import precision
from tinyspeed.scheduler import Plan
from tinyspeed.training import build, checkpoint, optimizer, train, trained
from tinyspeed.training.loop import StageRun

SETTINGS = {
    "qlora": (
        "model.quantise=nf4",
        "lora.rank=4",
        "lora.alpha=5.0",
        "data.workers=2",
        "train.checkpointing=on",
        "train.row_budget=120",
    ),
    "fp16": ("model.precision=fp16", "lora.rank=4", "train.optimizer=adamw8bit", "model.quantise=nf4"),
    # Ten records, five a step: killed at the end of an epoch, and again in the middle of the next.
    "bf16": ("model.precision=bf16", "lora.rank=4", "train.optimizer=paged_adamw8bit", "train.batch=5"),
    "full": ("model.precision=bf16", "train.row_budget=150"),
    "views": ("lora.rank=4", "dualspeed.views=true", "train.optimizer=adamw8bit", "train.weight_decay=0.1"),
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("how", SETTINGS)
def test_killed_and_resumed_is_never_killed_for_every_way_to_fit_a_small_gpu(home, tmp_path, monkeypatch, how, family):
    if family == "llava_next" and how in ("fp16", "full", "views"):
        pytest.skip("the other two cover what NeXT does differently")
    whole = settings(home, tmp_path, "whole", *SETTINGS[how], family=family)
    train.train(whole, bar=False)
    made = settings(home, tmp_path, "run", *SETTINGS[how], family=family)
    train_through(monkeypatch, made, *((2, 3) if how == "bf16" else (1, 3)))
    assert not unlike(made, whole)
    before, after = (load_file(f / "model.safetensors") for f in (home / family, whole.folder / "model"))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert not any("vision_tower" in n for n in changed)
    if how != "full":
        assert all(re.search("proj", n) for n in changed), (
            "embeddings, norms and lm_head are not the adapters' business"
        )


@pytest.mark.parametrize("how", ["qlora", "bf16", "views"])
def test_the_export_is_what_the_checkpoint_holds(home, tmp_path, monkeypatch, how):
    made = settings(home, tmp_path, "run", *SETTINGS[how])
    train.train(made, bar=False)
    from transformers import AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(made.folder / "model").eval()
    whole = settings(home, tmp_path, "run", *SETTINGS[how], "model.quantise=none")
    monkeypatch.setattr(trained, "check_state", lambda *_: None)  # which sees that this is another recipe
    ours = trained.load_trained(whole).eval()  # the same adapters on the base that was never rounded
    batch = {k: v for k, v in tiny.batch("llava").items() if k != "labels"}
    name = precision.resolve(made.model.precision, torch.device("cpu"))
    with precision.autocast(name, torch.device("cpu")):
        logits = ours(**batch).logits.float()
    assert not tiny.difference(plain(**batch).logits, logits, rel=1e-4 if name == "fp32" else 0.05)


def test_two_learning_rates_reach_the_optimizer(home, tmp_path):
    made = settings(home, tmp_path, "run", "lora.rank=2")
    model, source = build.build(made)
    run = StageRun(made, model, source, "train", 0, made.train, train.Totals())
    rates = {g["base_lr"]: {run.names[p] for p in g["params"]} for g in run.optimizer.param_groups}
    assert all("lora" in name for name in rates[0.01])
    assert all(re.search("projector|isolator", name) for name in rates[0.002])
    assert len(rates[0.01]) + len(rates[0.002]) == len(run.names)


def test_checkpointing_and_row_budgets_change_no_gradient(home, tmp_path):
    seen = []
    for changes in (
        (),
        ("train.checkpointing=on",),
        ("train.row_budget=60",),
        ("train.row_budget=60", "data.workers=1"),
    ):
        made = settings(home, tmp_path, f"run{len(seen)}", "lora.rank=4", "lora.dropout=0.0", *changes)
        model, source = build.build(made)
        run = StageRun(made, model, source, "train", 0, made.train, train.Totals())
        for plan in (Plan("fast", keep=0.3), Plan("slow", keep=0.3, distill=1.0)):
            parts = (part for part, _ in run._parts(1, plan))
            run._forward_backward(1, plan, loader.batches(source, parts, 0, workers=made.data.workers))
        assert any(layer.gradient_checkpointing for layer in model.vlm.language_model.layers) == ("on" in str(changes))
        seen.append(tiny.gradients(model))
    for other in seen[1:]:
        assert not tiny.difference(other, seen[0])


def test_each_micro_batch_is_recomputed_just_if_its_rows_do_not_fit(home, tmp_path, monkeypatch):
    made = settings(home, tmp_path, "run", "lora.rank=4", "train.batch=6", "train.row_budget=80")
    model, source = build.build(made)
    monkeypatch.setattr(StageRun, "_rows_that_fit", lambda self: 60)
    run = StageRun(made, model, source, "train", 0, made.train, train.Totals())
    passes, seen = [], []
    model.vlm.language_model.layers[0].input_layernorm.register_forward_hook(lambda *_: passes.append(1))
    for plan in (Plan("fast", keep=0.3), Plan("full")):
        for part, rows in run._parts(0, plan):
            passes.clear()
            run._micro_batch(next(loader.batches(source, [part], run.pad)), rows, plan, 1)
            seen.append((plan.mode, len(rows) * max(rows) > 60))
            assert len(passes) == 1 + seen[-1][1], "a recomputed layer runs again in the backward"
    assert {("fast", False), ("fast", True), ("full", True)} <= set(seen)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_what_is_frozen_stays_in_half_precision_and_what_trains_is_fp32(home, tmp_path, family, half):
    """peft's own preparation makes fp32 of the tower, the embeddings and lm_head."""
    made = settings(home, tmp_path, "run", f"model.precision={half}", *SETTINGS["qlora"], family=family)
    model, source = build.build(made)
    run = StageRun(made, model, source, "train", 0, made.train, train.Totals())
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    frozen = {n: dtype for n, dtype in dtypes.items() if n not in run.names.values() and dtype != torch.uint8}
    assert {re.search("tower|embed_tokens|norm|lm_head|newline", n)[0] for n in frozen} >= {"tower", "lm_head"}
    assert set(frozen.values()) == {precision.DTYPES[half]}
    assert {dtypes[n] for n in run.names.values()} == {torch.float32}


def test_fp16_with_loss_scaling_is_stable_over_200_steps_and_learns(home, tmp_path):
    """As on a T4: frozen weights in fp16, what trains in fp32, autocast, a loss scale that finds its size."""
    made = settings(
        home, tmp_path, "run", "model.precision=fp16", "model.quantise=nf4", "lora.rank=4", "train.steps=200",
        "run.save_every=500", "train.lr=0.003", "train.batch=2", "dualspeed.slow=0.1",
    )  # fmt: skip
    train.train(made, bar=False)
    lines = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 200
    skipped = [line["step"] for line in lines if line["skipped"]]
    assert len(skipped) < 12
    assert not skipped or max(skipped) < 60, "the scale has found its size"
    losses = [line["ce"] for line in lines]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    tensors, state = checkpoint.read(checkpoint.newest(made.folder / "checkpoints"))
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
    assert state["scale"]["scale"] == 2.0 ** (16 - len(skipped))


def test_an_overflow_skips_the_step_and_halves_the_scale(home, tmp_path, monkeypatch):
    made = settings(home, tmp_path, "run", "model.precision=fp16", "lora.rank=4", "train.steps=4")
    original, calls = StageRun._micro_batch, []

    def overflowing(self, *arguments):
        out = original(self, *arguments)
        calls.append(1)
        if len(calls) == 7:  # five are the probe's
            next(p for p in self.names if p.grad is not None).grad.fill_(float("inf"))
        return out

    monkeypatch.setattr(StageRun, "_micro_batch", overflowing)
    train.train(made, bar=False)
    lines = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [False, True, False, False]
    assert lines[1]["grad_norm"] is None
    assert checkpoint.read(checkpoint.newest(made.folder / "checkpoints"))[1]["scale"]["scale"] == 2.0**15
    # In any other precision there is no scale to blame.
    calls.clear()
    made = settings(home, tmp_path, "other", "model.precision=bf16", "lora.rank=4")
    with pytest.raises(UserError, match="gradient norm inf"):
        train.train(made, bar=False)


@pytest.mark.parametrize("what", ["moment", "scale"])
def test_a_loss_scale_is_to_blame_for_gradients_alone(home, tmp_path, monkeypatch, what):
    """Or every step from here on would be left out as if it had overflowed: a run that stands still."""
    made = settings(home, tmp_path, "run", "model.precision=fp16", "lora.rank=4", "train.steps=4")
    original = StageRun._step

    def poisoned(self, step, *given):
        if step == 1 and what == "scale":
            self.scale.scale = float("inf")
        elif step == 1:
            next(iter(self.optimizer.state.values()))["exp_avg_sq"].fill_(float("inf"))
        return original(self, step, *given)

    monkeypatch.setattr(StageRun, "_step", poisoned)
    says = {"moment": r"step 2 \(\w+, train\): .*optimizer's exp_avg_sq of ", "scale": r"step 2 .*scale\.scale is inf"}
    with pytest.raises(UserError, match=says[what]):
        train.train(made, bar=False)


def test_a_resumed_run_goes_on_with_its_loss_scale(home, tmp_path, monkeypatch):
    """Checkpoints come after steps 2 and 4; the second step overflows."""
    original, grown = precision.LossScale.stepped, []

    def overflowing(scale):
        grown.append(1)
        scale.overflowed() if len(grown) == 2 else original(scale)

    runs = [settings(home, tmp_path, name, "model.precision=fp16", "lora.rank=4") for name in ("whole", "run")]
    for made, dies in zip(runs, ((), (3,)), strict=True):
        grown.clear()
        with monkeypatch.context() as patch:
            patch.setattr(precision.LossScale, "stepped", overflowing)
            die_before(patch, *dies)
            if dies:
                with pytest.raises(Killed):
                    train.train(made, bar=False)
            train.train(made, resume=bool(dies), bar=False)
    assert not unlike(*runs)
    states = [checkpoint.read(checkpoint.newest(made.folder / "checkpoints"))[1]["scale"] for made in runs]
    assert states[0] == states[1] == {"scale": 2.0**15, "good": 4, "moving": True}


def test_other_data_than_the_run_began_with_is_refused(home, tmp_path, monkeypatch):
    album(tmp_path / "mine", 8)
    made = settings(
        home, tmp_path, "run", f"data.file={tmp_path}/mine/train.json", f"data.images={tmp_path}/mine/images"
    )
    with monkeypatch.context() as patch:
        die_before(patch, 3)
        with pytest.raises(Killed):
            train.train(made, bar=False)
    album(tmp_path / "mine", 9)
    with pytest.raises(UserError, match="the data has changed since the run was stopped: it was 8 records"):
        train.train(made, resume=True, bar=False)


def test_a_context_that_ends_before_max_rows_is_said(home, tmp_path):
    with pytest.raises(UserError, match=r"data\.max_rows = 600: the context .* ends at 512"):
        train.train(settings(home, tmp_path, "run", "data.max_rows=600"), bar=False)


def test_stage_one_from_parts(home, tmp_path):
    """A tower, an LLM, a new projector; captions; then the whole model."""
    tower, llm = tiny.parts(tmp_path)
    album(tmp_path / "captions", 6, text_only=False)
    records = json.loads((tmp_path / "captions" / "train.json").read_text())
    for record in records:
        record["conversations"] = record["conversations"][:2]
    (tmp_path / "captions" / "train.json").write_text(json.dumps(records))
    made = settings(
        home, tmp_path, "run", "model.path=", f"model.tower={tower}", f"model.llm={llm}", "data.template=plain",
        f"data.file={tmp_path}/captions/train.json", f"data.images={tmp_path}/captions/images",
        "align.steps=6", "align.batch=3", "align.lr=0.03", "train.steps=2", "model.precision=bf16",
    )  # fmt: skip
    train.train(made, bar=False)
    lines = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["mode"]) for line in lines[:6]] == [("align", "fast")] * 6
    assert lines[5]["loss"] < lines[0]["loss"]
    assert (made.folder / "model" / "model.safetensors").exists()


# The command line


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_whole_path_on_the_command_line(home, tmp_path, family, capsys):
    """QLoRA, SIGKILL, resume, export, plain transformers in a fresh process, a question."""
    whole = settings(home, tmp_path, "whole", *SETTINGS["qlora"], family=family)
    train.train(whole, bar=False)
    made = settings(home, tmp_path, "run", family=family)
    changes = [word for change in SETTINGS["qlora"] for word in ("--set", change)]
    command = ("train", tmp_path / "run.toml", *changes)

    killed = run_cli(*command, folder=tmp_path)
    deadline = time.monotonic() + 120
    metrics = made.folder / "metrics.jsonl"
    while time.monotonic() < deadline and killed.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 3:
            break
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    out, err = finish(run_cli(*command, "--resume", folder=tmp_path))
    assert "model in" in out
    assert "Traceback" not in err
    assert not unlike(settings(home, tmp_path, "run", *SETTINGS["qlora"], family=family), whole)

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
    done = subprocess.run([sys.executable, "-c", script, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    merged, adapted = done.stdout.splitlines()
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
    _, err = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert re.search(r"bad\.json: record 5 \(id r4\).*gone\.jpg", err)
    assert "Traceback" not in err
    _, err = finish(run_cli(*command, "--skip-bad", "--set", "train.steps=1", folder=tmp_path))
    listed = tmp_path / "run" / "skipped.txt"
    assert f"1 of 10 records left out, listed in {listed}; the first: {listed.read_text().strip()}" in err
    assert "gone.jpg" in listed.read_text()


def test_a_dry_run_takes_one_step_of_each_mode_and_leaves_no_run(home, tmp_path):
    settings(home, tmp_path, "run", *SETTINGS["qlora"])
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


def test_parquet_trains_as_its_json_does_and_the_run_is_evaluated_where_it_is(home, tmp_path):
    """Pictures inside the file, as on the hub; then GQA, of the run itself: in 4 bits, with its adapters."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = json.loads((home / "train.json").read_text())
    for row in rows:
        names = row.pop("image", [])
        names = [names] if isinstance(names, str) else names
        row["images"] = [{"bytes": (home / "images" / name).read_bytes(), "path": None} for name in names]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    how = ("model.quantise=nf4", "lora.rank=4", "train.steps=1", "train.batch=2", f"run.cache={tmp_path}/cache")
    plain = settings(home, tmp_path, "plain", *how)
    made = settings(home, tmp_path, "run", *how, f"data.file={tmp_path}/train.parquet", "data.images=")
    one, other = (conversations.from_recipe(run, run.model.path, bar=False) for run in (plain, made))
    assert one.fingerprint == other.fingerprint
    assert all(torch.equal(one.example(i).pixel_values, other.example(i).pixel_values) for i in (0, 1, 2))
    train.train(made, bar=False)

    questions = {"7": {"imageId": "p0-0", "question": "Is it?", "answer": "yes"}}
    (tmp_path / "gqa.json").write_text(json.dumps(questions))
    command = ["eval", str(made.folder), "--task", "gqa", "--questions", str(tmp_path / "gqa.json")]
    assert cli.main([*command, "--images", str(home / "images")]) == 0
    header, *kept = map(json.loads, (made.folder / "gqa.jsonl").read_text().splitlines())
    assert header["model"].endswith("run, step-00000001"), "another checkpoint's answers are other answers"
    assert [line["id"] for line in kept] == ["7"]
    assert json.loads((made.folder / "gqa.json").read_text())["accuracy"] in (0, 100)


def test_a_resume_may_change_how_a_step_fits_and_nothing_else(home, tmp_path, monkeypatch):
    """The mend that an out-of-memory error advises must not cost the run."""
    made = settings(home, tmp_path, "run", "lora.rank=2", "lora.dropout=0.0")
    with monkeypatch.context() as patch:
        die_before(patch, 3)
        with pytest.raises(Killed):
            train.train(made, bar=False)
    other = settings(home, tmp_path, "run", "lora.rank=2", "lora.dropout=0.0", "train.lr=0.5", "data.template=plain")
    with pytest.raises(UserError, match=r"another recipe .*: data\.template, train\.lr differ"):
        train.train(other, resume=True, bar=False)
    changes = ("train.row_budget=90", "train.checkpointing=on", "data.workers=1", "run.save_every=3")
    smaller = settings(home, tmp_path, "run", "lora.rank=2", "lora.dropout=0.0", *changes)
    assert train.train(smaller, resume=True, bar=False).totals.steps == 6
    assert recipe.of_run(str(made.folder)).train.row_budget == 90


def test_reworded_data_is_other_data(home, tmp_path):
    """Lengths are the same, words are not."""
    records = json.loads((home / "train.json").read_text())
    found = []
    for word in ("What", "Whom"):
        text = json.dumps(records).replace("What", word)
        (tmp_path / "train.json").write_text(text)
        made = settings(home, tmp_path / word, "run", f"data.file={tmp_path}/train.json")
        found.append(build.build(made)[1])
    assert [found[0].lengths(i) for i in range(10)] == [found[1].lengths(i) for i in range(10)]
    assert found[0].fingerprint != found[1].fingerprint


def test_a_run_without_slow_steps_says_so(home, tmp_path, capsys):
    train.train(settings(home, tmp_path, "none", "dualspeed.slow=0.0", "train.steps=2"), bar=False)
    assert "in 2 steps no whole picture is seen" in capsys.readouterr().err
    train.train(settings(home, tmp_path, "one", "dualspeed.slow=0.0", "train.steps=1"), bar=False)
    assert "in 1 step no whole picture is seen" in capsys.readouterr().err
    train.train(settings(home, tmp_path, "some", "dualspeed.slow=1.0", "train.steps=2"), bar=False)
    assert "whole picture" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("run.device=cuda", "cannot be used here"),
        ("data.max_rows=1000000", "data.max_rows = 1,000,000: the context of"),
        ("run.name=other", "holds a run already"),
        ("model.path=./absent", "no model folder"),
    ],
)
def test_mistakes_of_the_recipe_are_found_before_records_are_looked_at(home, tmp_path, monkeypatch, change, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(conversations, "Conversations", None)  # whoever looks at a record now fails
    (tmp_path / "other" / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(says)):
        train.train(settings(home, tmp_path, "run", change), bar=False)
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_began_leaves_nothing_and_stops_no_other(home, tmp_path):
    records = json.loads((home / "train.json").read_text())
    records[4]["image"] = "gone.jpg"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    bad = settings(home, tmp_path, "run", f"data.file={tmp_path}/bad.json", "train.steps=1")
    with pytest.raises(UserError, match=r"gone\.jpg"):
        train.train(bad, bar=False)
    assert not bad.folder.exists()
    bad.folder.mkdir()
    (bad.folder / "recipe.toml").write_text("# mine")
    with pytest.raises(UserError, match=r"gone\.jpg"):
        train.train(bad, bar=False)
    assert (bad.folder / "recipe.toml").exists(), "the folder was there before"
    assert recipe.of_run(str(bad.folder)).train.lr == 0.01, "as a killed start leaves it"
    other = settings(home, tmp_path, "run", "train.steps=1", "train.lr=0.02", "lora.rank=2")
    assert train.train(other, bar=False).totals.steps == 1
    assert recipe.of_run(str(bad.folder)) == other


def test_bad_records_in_a_dry_run(home, tmp_path):
    records = json.loads((home / "train.json").read_text())
    records[4]["image"] = "gone.jpg"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    changes = (f"data.file={tmp_path}/bad.json", "data.skip_bad=true", "train.steps=1")
    made = settings(home, tmp_path / "runs", "fresh", *changes)
    source, found = train.dry_run(made)
    assert {step["mode"] for step in found} == {"fast", "slow"}, "though the run has one step"
    lengths = [source.lengths(i)[:2] for i in range(len(source))]
    kept = [text + sum(max(1, int(0.3 * n + 1e-6)) + 4 for n in images) for text, images in lengths]
    longest = {"fast": max(kept), "slow": max(text + sum(images) for text, images in lengths)}
    assert {step["mode"]: step["rows"] / step["samples"] for step in found} == longest
    assert [p.name for p in made.folder.iterdir()] == ["skipped.txt"]
    train.train(made, bar=False)


@pytest.mark.skipif(os.name == "nt", reason="who may read a file is not in its mode there")
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_an_export_is_as_readable_as_any_new_file(home, tmp_path, umask):
    before = os.umask(umask)
    try:
        for rank in (0, 2):  # one writes the whole model, one merges, and exports its adapter alone
            made = settings(home, tmp_path, f"rank-{rank}", f"lora.rank={rank}", "train.steps=1")
            train.train(made, bar=False)
        assert cli.main(["export", str(made.folder), str(tmp_path / "adapter"), "--adapter"]) == 0
    finally:
        os.umask(before)
    folders = (tmp_path / "rank-0" / "model", tmp_path / "rank-2" / "model", tmp_path / "adapter")
    assert [len(list(folder.glob("*.safetensors"))) for folder in folders] == [1, 1, 1]
    assert {f.stat().st_mode & 0o777 for folder in folders for f in folder.iterdir()} == {0o666 & ~umask}


def test_an_adapter_that_was_never_trained_is_not_exported(home, tmp_path):
    made = settings(home, tmp_path, "run", "lora.rank=2", "align.steps=1", "align.batch=2", "train.steps=0")
    train.train(made, bar=False)
    with pytest.raises(UserError, match="no adapter has been trained"):
        trained.export(made, tmp_path / "out", adapter_only=True)


def test_a_model_in_half_precision_is_evaluated_as_it_trained(tmp_path):
    """Full tuning in bf16: the trained weights are fp32, and the export has the precision of its base."""
    changes = ["digits.tower_steps=2", "align.steps=1", "train.steps=2", "model.precision=bf16", "run.device=cpu"]
    changes += ["digits.width=32", "digits.tower_width=16", "data.eval_pictures=8", f"run.folder={tmp_path}"]
    made = recipe.read("digits", changes)
    model = train.train(made, bar=False).model
    trained = [p for p in model.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    scores = accuracy.held_out(model, made, bar=False)
    assert scores == accuracy.held_out(trained.load_trained(made), made, bar=False)
    saved = load_file(made.folder / "model" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
def test_8_bit_moments_survive_a_checkpoint(kind, tmp_path):
    """bitsandbytes keeps small tensors in 32 bits; this one is large enough."""
    stage, runs = recipe.StageSection(steps=4, optimizer=kind, lr=0.1), []
    gradients = torch.randn(4, 128, 64, generator=torch.Generator().manual_seed(0))
    for stops in (False, True):
        weight = torch.nn.Parameter(torch.ones(128, 64))
        names, made = {weight: "weight"}, optimizer.make_optimizer(stage, [], [weight])
        assert made.state[weight]["state1"].dtype == torch.uint8
        for step in range(4):
            if stops and step == 2:
                tensors = {"w": weight.data, **checkpoint.optimizer_tensors(made, names)}
                saved, _ = checkpoint.read(checkpoint.save(tmp_path, step, tensors, {}, 1))
                weight = torch.nn.Parameter(saved["w"])
                names, made = {weight: "weight"}, optimizer.make_optimizer(stage, [], [weight])
                checkpoint.load_optimizer(made, names, saved)
            weight.grad = gradients[step].clone()
            made.step()
        runs.append(weight.data)
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], torch.ones(128, 64))


def test_slips_of_the_pen_are_named(home, tmp_path, capsys):
    with pytest.raises(UserError, match=r"data\.images: there is no folder .*absent"):
        train.train(settings(home, tmp_path, "run", f"data.images={tmp_path}/absent", "data.skip_bad=true"), bar=False)
    with pytest.raises(UserError, match=r'set data\.kind = "chat" too'):
        settings(home, tmp_path, "run", "data.kind=digits")
    assert cli.main(["ask", str(home / "llava"), str(home / "images" / "p0-0.jpg")]) == 2
    assert "the last argument must be the question" in capsys.readouterr().err
