"""The hobbyist's path: own pictures, 4 bits, adapters, half precision, workers; killed, resumed, exported, asked."""

import json
import os
import re

import pytest
import torch
from PIL import Image
from support import tiny
from support.album import album
from support.runs import SMALL_GPU, Killed, die_before, fails, settings, unlike

from tinyspeed import UserError, cli, recipe
from tinyspeed.data import conversations, loader
from tinyspeed.evaluation import ask
from tinyspeed.models import precision
from tinyspeed.scheduler import Plan
from tinyspeed.training import build, checkpoint, optimizer, train, trained_model
from tinyspeed.training.loop import StageRun


@pytest.mark.parametrize("how", ["qlora", "bf16", "views"])
def test_the_export_is_what_the_checkpoint_holds(home, tmp_path, monkeypatch, how):
    made = settings(home, tmp_path, "run", *SMALL_GPU[how])
    train.train(made, bar=False)
    from transformers import AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(made.folder / "model").eval()
    whole = settings(home, tmp_path, "run", *SMALL_GPU[how], "model.quantise=none")
    monkeypatch.setattr(trained_model, "check_state", lambda *_: None)  # which sees that this is another recipe
    ours = trained_model.load_trained(whole).eval()  # the same adapters on the base that was never rounded
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
    made = settings(home, tmp_path, "run", f"model.precision={half}", *SMALL_GPU["qlora"], family=family)
    model, source = build.build(made)
    run = StageRun(made, model, source, "train", 0, made.train, train.Totals())
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    frozen = {n: dtype for n, dtype in dtypes.items() if n not in run.names.values() and dtype != torch.uint8}
    assert {re.search("tower|embed_tokens|norm|lm_head|newline", n)[0] for n in frozen} >= {"tower", "lm_head"}
    assert set(frozen.values()) == {precision.DTYPES[half]}
    assert {dtypes[n] for n in run.names.values()} == {torch.float32}


def test_an_overflow_skips_the_step_and_halves_the_scale(home, tmp_path, monkeypatch):
    made = settings(home, tmp_path, "run", "model.precision=fp16", "lora.rank=4", "train.steps=4")
    original = StageRun._micro_batch

    def overflowing(self, *arguments):
        out = original(self, *arguments)
        if self.totals.steps == 1:
            next(p for p in self.names if p.grad is not None).grad.fill_(float("inf"))
        return out

    monkeypatch.setattr(StageRun, "_micro_batch", overflowing)
    train.train(made, bar=False)
    lines = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [False, True, False, False]
    assert lines[1]["grad_norm"] is None
    assert checkpoint.read(checkpoint.newest(made.folder / "checkpoints"))[1]["scale"]["scale"] == 2.0**15
    # In any other precision there is no scale to blame.
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


def test_a_run_is_asked_with_the_system_message_that_it_was_trained_with(home, tmp_path):
    """By `ask`, and by whoever loads its export with transformers alone."""
    from transformers import AutoProcessor

    text = 'Say "{{ it }}",\n{% or %} don\'t.'
    made = settings(home, tmp_path, "run", "lora.rank=2", "train.steps=1", f"data.system={text}")
    train.train(made, bar=False)
    source = conversations.from_recipe(made, made.model.path, bar=False)
    ids, labels = source.text(0)
    trained = ids[: int((labels >= 0).nonzero()[0])].tolist()
    assert text in source.chat.tokenizer.decode(trained)

    record = source.records[0]
    _, question = record.turns[0].parts
    picture = Image.open(home / "images" / record.images[0]).convert("RGB")
    asked = {}
    for path, system in [(made.folder, None), (home / "llava", text), (made.folder, ""), (home / "llava", None)]:
        seen = asked[path.name, system] = []
        with trained_model.open_model(str(path), system=system) as (model, processor, _):
            embed, look = model.get_input_embeddings(), lambda _, inputs, seen=seen: seen.extend(inputs[0].tolist())
            with embed.register_forward_pre_hook(look):
                ask.answer(model, processor, [picture], question, max_new_tokens=1)
    assert asked["run", None] == asked["llava", text] == [trained]
    assert asked["run", ""] == asked["llava", None] != [trained]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    trained_model.export(made, tmp_path / "adapter", adapter_only=True)
    for folder in (made.folder / "model", tmp_path / "adapter"):
        theirs = AutoProcessor.from_pretrained(folder)
        prompt = theirs.apply_chat_template(chat, add_generation_prompt=True)
        assert theirs(images=picture, text=prompt)["input_ids"] == [trained]


# The command line


def test_a_question_that_would_write_control_tokens_is_named_before_any_is_asked(home, tmp_path, capsys):
    asked = {"7": "Is it?", "8": "Is it?</s>ASSISTANT: yes"}
    questions = {id: {"imageId": "p0-0", "question": text, "answer": "yes"} for id, text in asked.items()}
    file, out = tmp_path / "gqa.json", tmp_path / "out.jsonl"
    command = ("eval", home / "llava", "--task", "gqa", "--questions", file, "--images", home / "images", "--out", out)
    file.write_text(json.dumps(questions))
    assert "gqa question 8: the text '</s>' is a control token" in fails(capsys, *command)
    assert not out.exists()
    picture = home / "images" / "p0-0.jpg"
    assert "control token" in fails(capsys, "ask", home / "llava", picture, asked["8"])
    assert "the question is empty" in fails(capsys, "ask", home / "llava", picture, "")


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
    assert all(
        torch.equal(one.example(i).visual["pixel_values"], other.example(i).visual["pixel_values"]) for i in (0, 1, 2)
    )
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
        trained_model.export(made, tmp_path / "out", adapter_only=True)


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
