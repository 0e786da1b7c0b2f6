"""ReGATE in whole runs: the reference's losses and their cache, killed and resumed, what is refused."""

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import hostile, tiny
from support.album import album
from support.runs import Killed, die_before, fails, unlike
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from scale.__main__ import main as scaled
from tinyspeed import UserError, cli, recipe
from tinyspeed.data import conversations, digits
from tinyspeed.recipe import schedules
from tinyspeed.regate import NEVER, kept
from tinyspeed.rows import IGNORE
from tinyspeed.training import answer_gate, checkpoint, reference, train
from tinyspeed.training.reference import Reference

CPU = torch.device("cpu")
STEPS = 9
SKIPS = ("regate.keep=0.4", "regate.cycle=4", "regate.refresh=1", "regate.warmup=2")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    album(home, 10)
    tiny.checkpoint("llava", home / "llava")
    tiny.llm(home / "llm", 1)
    return home


def settings(home, folder, name, *changes):
    tables = {
        "run": {
            "name": name, "folder": str(folder), "cache": str(folder / "cache"), "threads": 1, "device": "cpu",
            "save_every": 2,
        },
        "model": {"path": str(home / "llava")},
        "data": {"kind": "chat", "file": str(home / "train.json"), "images": str(home / "images"), "workers": 0},
        "dualspeed": {"slow": 0.2, "keep": 0.3},
        "train": {"steps": STEPS, "batch": 4, "lr": 0.01, "row_budget": 150},
    }  # fmt: skip
    (folder / f"{name}.toml").write_text(recipe.from_tables(tables, "here").to_toml())
    return recipe.read(str(folder / f"{name}.toml"), [*SKIPS, *changes])


def lines(made) -> list[dict]:
    return [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]


def source_of(made) -> conversations.Conversations:
    return conversations.from_recipe(made, made.model.path, bar=False)


def reference_of(made, path=None, source=None) -> Reference:
    source = source or source_of(made)
    every = list(range(len(source)))
    return Reference(
        path or made.regate.reference, made.model.path, source, every, "fp32", made.folder.parent / "cache"
    )


# Runs


@pytest.mark.parametrize("alone", [True, False], ids=["own losses", "reference"])
def test_killed_and_resumed_is_never_killed(home, tmp_path, monkeypatch, alone):
    more = () if alone else (f"regate.reference={home / 'llm'}", "regate.fusion=mix")
    whole, made = (settings(home, tmp_path, name, *more) for name in ("whole", "run"))
    words = ["--set", "run.name=run", *(word for change in (*SKIPS, *more) for word in ("--set", change))]
    assert train.train(whole, bar=False).totals.steps == STEPS
    with monkeypatch.context() as patch:
        die_before(patch, 5, 8)
        for resume in ([], ["--resume"]):
            with pytest.raises(Killed):
                cli.main(["train", str(tmp_path / "run.toml"), *words, *resume])
    assert cli.main(["train", str(tmp_path / "run.toml"), *words, "--resume"]) == 0
    assert not unlike(made, whole)

    source, order = source_of(made), answer_gate.Order(10, made.run.seed)
    every = [sum(source.lengths(i)[2] for i in order.batch(step, 4)) for step in range(STEPS)]
    least = [sum(kept(0.4, source.lengths(i)[2]) for i in order.batch(step, 4)) for step in range(STEPS)]
    skipped = 0
    for step, line in enumerate(lines(made)):
        skips = step >= 2 and step % 4 >= 1 and line["mode"] != "slow"
        if skips:
            assert least[step] <= line["answers"] <= every[step]
            assert line["answers"] == least[step] or (alone and step * 4 < 10)  # all have been seen after one epoch
            skipped += line["answers"] < every[step]
        else:
            assert line["answers"] == every[step]
    assert skipped >= 3


def test_how_a_step_is_cut_changes_neither_loss_nor_memory(home, tmp_path):
    more = (f"regate.reference={home / 'llm'}", "dualspeed.plugin=divprune")
    cut = settings(home, tmp_path, "cut", *more)
    at_once = settings(home, tmp_path, "at_once", *more, "train.row_budget=0")
    for made in (cut, at_once):
        train.train(made, bar=False)
    for a, b in zip(lines(cut), lines(at_once), strict=True):
        assert (a["answers"], a["rows_kept"]) == (b["answers"], b["rows_kept"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    torch.testing.assert_close(remembered(cut), remembered(at_once), rtol=1e-2, atol=1e-3)


def test_a_dry_run_takes_its_steps_with_all_answers(home, tmp_path):
    """And asks no reference, which may take hours."""
    made = settings(home, tmp_path, "dry", f"regate.reference={home / 'llm'}")
    _, found = train.dry_run(made)
    assert {step["mode"] for step in found} == {"fast", "slow"}
    assert not (tmp_path / "cache").exists()


def test_nothing_is_learned_of_a_sample_that_lost_its_labels(home, tmp_path):
    made = settings(home, tmp_path, "run")
    gate = answer_gate.Gate(made, source_of(made), CPU, made.model.path)
    n, answers = (len(gate.memory.keep(i, 1.0)) for i in (0, 1))
    labels = torch.full((2, answers + 2), IGNORE)
    labels[1, 2:] = 5
    gate.begin([0, 1], 0.5)
    batch = gate.mark([0, 1], {"labels": labels})
    assert batch["answers"][0].all()
    losses = torch.arange(1.0, 1 + answers)
    gate.ran(losses)
    gate.learn(gate.losses())
    assert (gate.memory.difficulty[:n] == NEVER).all()
    assert gate.memory.difficulty[n : n + answers].tolist() == losses.tolist()


# Several processes


def remembered(made) -> torch.Tensor:
    return checkpoint.read(checkpoint.newest(made.folder / "checkpoints"))[0]["regate/difficulty"]


def test_one_rank_is_the_core_bit_for_bit(home, tmp_path):
    more = (f"regate.reference={home / 'llm'}",)
    alone, made = (settings(home, tmp_path, name, *more) for name in ("alone", "scaled"))
    train.train(alone, bar=False)
    (tmp_path / "scaled.toml").write_text(made.to_toml())
    assert scaled([str(tmp_path / "scaled.toml")]) == 0
    assert not unlike(made, alone)


def test_a_sample_that_a_step_has_twice_counts_once_by_its_mean(home, tmp_path):
    made = settings(home, tmp_path, "run")
    gate = answer_gate.Gate(made, source_of(made), CPU, made.model.path)
    n = len(gate.memory.keep(0, 1.0))
    labels = torch.full((1, n + 1), 5)
    assert gate.begin([0, 0], 1.0) == 2 * n
    for losses in (torch.arange(n) + 1.0, torch.arange(n) + 2.0):
        gate.mark([0], {"labels": labels})
        gate.ran(losses)
    gate.learn(gate.losses())
    assert gate.memory.difficulty[:n].tolist() == [i + 1.5 for i in range(n)]


# The reference


def test_reference_losses_are_transformers_own_of_the_text_with_blank_pictures(home, tmp_path):
    made = settings(home, tmp_path, "run", f"regate.reference={home / 'llm'}")
    source, model = source_of(made), LlamaForCausalLM.from_pretrained(home / "llm").eval()
    want = []
    for i in range(len(source)):
        example = source.example(i)
        ids = example.input_ids.masked_fill(example.input_ids == tiny.IMAGE, tiny.PAD)
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double()
        for j in range(1, len(ids)):
            if example.labels[j] != IGNORE:
                want.append(F.cross_entropy(logits[j - 1], ids[j]).item())
    got = reference_of(made).losses(CPU, bar=False)
    assert not tiny.difference(torch.from_numpy(got), torch.tensor(want))
    assert np.std(want) > 0.5


def test_text_alone_is_the_text_of_the_example(home, tmp_path):
    made = settings(home, tmp_path, "run")
    for source in (source_of(made), digits.Digits(10, 3)):
        for i in range(10):
            example = source.example(i)
            ids, labels = source.text(i)
            assert torch.equal(ids, example.input_ids)
            assert torch.equal(labels, example.labels)


def test_losses_are_made_once_and_never_taken_for_those_of_other_data_or_another_model(home, tmp_path, monkeypatch):
    made = settings(home, tmp_path, "run", f"regate.reference={home / 'llm'}")
    loaded, load = [], Reference._load

    def counted(self, device):
        loaded.append(self.key)
        return load(self, device)

    monkeypatch.setattr(Reference, "_load", counted)
    first = reference_of(made).losses(CPU, bar=False)
    assert np.array_equal(first, reference_of(made).losses(CPU, bar=False))
    assert len(loaded) == 1

    other = reference_of(made, tiny.llm(tmp_path / "other", 2)).losses(CPU, bar=False)
    assert len(loaded) == 2
    assert not np.allclose(first, other)

    records = json.loads((home / "train.json").read_text())
    records[1]["conversations"][1]["value"] = "It is new, 1."
    (tmp_path / "train.json").write_text(json.dumps(records))
    changed = settings(
        home, tmp_path, "run", f"data.file={tmp_path / 'train.json'}", f"regate.reference={home / 'llm'}"
    )
    reference_of(changed).losses(CPU, bar=False)
    assert len(set(loaded)) == 3


@pytest.mark.parametrize("how", ["cut", "other", "not finite", "a byte"])
def test_a_file_that_is_damaged_or_of_something_else_is_made_anew(home, tmp_path, capsys, how):
    made = settings(home, tmp_path, "run", f"regate.reference={home / 'llm'}")
    mine = reference_of(made)
    first = mine.losses(CPU, bar=False)
    file = mine._file(0)
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif how == "a byte":
        file.write_bytes(file.read_bytes()[:-4] + b"\0" + file.read_bytes()[-3:])
    elif how == "not finite":
        mine._write(0, np.full_like(first, np.nan))
    else:
        other = reference_of(made, tiny.llm(tmp_path / "other", 2))
        other.losses(CPU, bar=False)
        file.write_bytes(other._file(0).read_bytes())
    assert np.array_equal(reference_of(made).losses(CPU, bar=False), first)
    assert "made anew" in capsys.readouterr().err


def test_a_reference_is_known_by_the_hash_that_checkpoints_have_had_of_it_since_ever(home, tmp_path):
    made, whole = settings(home, tmp_path, "run", f"regate.reference={home / 'llm'}"), hashlib.blake2b(digest_size=16)
    for name in ("config.json", "model.safetensors"):
        whole.update(hashlib.blake2b((home / "llm" / name).read_bytes()).digest())
    assert reference_of(made).content == whole.hexdigest()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_place_of_losses_is_replaced_and_one_in_the_reference_is_refused(home, tmp_path):
    made = settings(home, tmp_path, "run", f"regate.reference={home / 'llm'}")
    first = reference_of(made).losses(CPU, bar=False)
    file = reference_of(made)._file(0)
    file.unlink()
    os.mkfifo(file)
    assert np.array_equal(reference_of(made).losses(CPU, bar=False), first)
    assert file.is_file()
    shutil.copytree(home / "llm", tmp_path / "piped")
    os.mkfifo(tmp_path / "piped" / "more.safetensors")
    with pytest.raises(UserError, match=r"more\.safetensors is a pipe or a device"):
        reference_of(made, str(tmp_path / "piped"))


def test_a_reference_that_lacks_a_weight_is_refused(home, tmp_path):
    """transformers would draw it at random."""
    shutil.copytree(home / "llm", tmp_path / "part")
    tensors = load_file(tmp_path / "part" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    made = settings(home, tmp_path, "run", f"regate.reference={tmp_path / 'part'}")
    with pytest.raises(UserError, match=r"regate\.reference: .*part lacks 1 of the model's weights"):
        reference_of(made).losses(CPU, bar=False)


def test_a_reference_with_a_loss_that_is_not_finite_is_refused_and_nothing_kept(home, tmp_path):
    net = LlamaForCausalLM.from_pretrained(home / "llm")
    net.lm_head.weight.data[:] = float("nan")
    net.save_pretrained(tmp_path / "broken")
    tiny.tokenizer().save_pretrained(tmp_path / "broken")
    broken = reference_of(settings(home, tmp_path, "run", f"regate.reference={tmp_path / 'broken'}"))
    with pytest.raises(UserError, match=r"broken has a loss that is not finite on train\.json.*: try another"):
        broken.losses(CPU, bar=False)
    assert not broken.folder.exists()


def test_an_interruption_loses_one_file_at_most(home, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "AT_ONCE", 3)
    made = settings(home, tmp_path, "run", f"regate.reference={home / 'llm'}")
    parts, make = [], Reference._make

    def dying(self, model, part):
        if len(parts) == 2:
            parts.append("dead")
            raise Killed
        parts.append(part)
        return make(self, model, part)

    monkeypatch.setattr(Reference, "_make", dying)
    with pytest.raises(Killed):
        reference_of(made).losses(CPU, bar=False)
    got = reference_of(made).losses(CPU, bar=False)
    assert parts == [[0, 1, 2], [3, 4, 5], "dead", [6, 7, 8], [9]]
    monkeypatch.setattr(reference, "AT_ONCE", 100)
    whole = settings(home, tmp_path, "run", f"regate.reference={home / 'llm'}", "run.folder=" + str(tmp_path / "b"))
    assert np.allclose(got, reference_of(whole).losses(CPU, bar=False), rtol=1e-4)


def test_old_losses_make_room(home, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDERS", 2)
    made = settings(home, tmp_path, "run", f"regate.reference={home / 'llm'}")
    for seed in range(3):
        reference_of(made, tiny.llm(tmp_path / f"llm{seed}", seed)).losses(CPU, bar=False)
    assert len(list((tmp_path / "cache").iterdir())) == 2


# What is refused


def test_mistakes_are_one_line(home, tmp_path, capsys):
    made = settings(home, tmp_path, "run")
    file = tmp_path / "run.toml"
    file.write_text(made.to_toml())
    tiny.llm(tmp_path / "stranger", 1)
    tokens = json.loads((tmp_path / "stranger" / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "stranger" / "tokenizer.json").write_text(json.dumps(tokens))
    said = fails(capsys, "train", file, "--set", f"regate.reference={tmp_path / 'stranger'}")
    assert "has another tokenizer" in said
    assert "2 of 260" in said
    assert "no model folder" in fails(capsys, "train", file, "--set", "regate.reference=./absent")
    assert "at most 1" in fails(capsys, "train", file, "--set", "regate.keep=2")
    assert "did you mean 'mix'" in fails(capsys, "train", file, "--set", "regate.fusion=mixx")
    assert "did you mean 'regate.keep'" in fails(capsys, "train", file, "--set", "regate.kep=0.5")
    assert "set regate.keep below 1" in fails(
        capsys, "train", file, "--set", "regate.keep=1.0", "--set", f"regate.reference={home / 'llm'}"
    )
    assert "no sample is seen twice" in fails(capsys, "train", file, "--set", "train.steps=2")


@given(
    samples=st.integers(1, 60), batch=st.integers(1, 20), epochs=st.integers(1, 4), warmup=st.integers(0, 40),
    cycle=st.integers(2, 12), known=st.booleans(), data=st.data(),
)  # fmt: skip
def test_a_run_is_refused_exactly_if_no_step_would_skip(home, samples, batch, epochs, warmup, cycle, known, data):
    """By the plans of its steps, and what has been seen before each. (An epoch's last step, of which a few samples may
    have been seen, does not count.)"""
    refresh, slow = data.draw(st.integers(1, cycle - 1)), data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.9]))
    made = settings(
        home, home, "asked", "train.steps=0", f"train.epochs={epochs}", f"train.batch={batch}",
        f"dualspeed.slow={slow}", "dualspeed.schedule=periodic",
        f"regate.warmup={warmup}", f"regate.cycle={cycle}", f"regate.refresh={refresh}",
        *([f"regate.reference={home / 'llm'}"] if known else []),
    )  # fmt: skip
    schedule, steps = schedules.schedule_of(made, "train", 2), made.train.total(samples)
    skipping = [
        step
        for step in range(steps)
        if schedule.plan(step).answer_keep < 1 and (known or step * batch >= samples)  # of their second epoch
    ]
    if skipping:
        answer_gate.require_some_skipping(made, samples)
    else:
        with pytest.raises(UserError, match=r"would (be skipped|skip)"):
            answer_gate.require_some_skipping(made, samples)


def test_what_would_skip_nothing_is_said_before_the_first_stage(home, tmp_path):
    for more in ("train.steps=2", "regate.warmup=9"):
        made = settings(home, tmp_path, "run", "align.steps=2", more)
        with pytest.raises(UserError, match=r"regate\.keep: .*would (be skipped|skip)"):
            train.train(made, bar=False)
        assert not made.folder.exists()


def test_a_run_does_not_go_on_with_another_reference(home, tmp_path, monkeypatch):
    tiny.llm(tmp_path / "llm", 1)
    made = settings(home, tmp_path, "run", f"regate.reference={tmp_path / 'llm'}")
    with monkeypatch.context() as patch:
        die_before(patch, 5)
        with pytest.raises(Killed):
            train.train(made, bar=False)
    shutil.rmtree(tmp_path / "llm")
    tiny.llm(tmp_path / "llm", 2)
    with pytest.raises(UserError, match="the reference has changed since the run was stopped"):
        train.train(made, resume=True, bar=False)


def test_a_reference_that_ends_its_answers_otherwise_is_refused(home, tmp_path):
    """Special tokens may differ, but not one that is learned."""
    tiny.llm(tmp_path / "other", 1)
    file = tmp_path / "other" / "tokenizer.json"
    tokens, config = file.read_text(), (tmp_path / "other" / "tokenizer_config.json").read_text()
    file.write_text(tokens.replace('"</s>"', '"<end>"'))
    (tmp_path / "other" / "tokenizer_config.json").write_text(config.replace('"</s>"', '"<end>"'))
    made = settings(home, tmp_path, "run", f"regate.reference={tmp_path / 'other'}")
    with pytest.raises(UserError, match=f"does not know the token {tiny.EOS}, which answers are made of"):
        reference_of(made).losses(CPU, bar=False)


def test_a_reference_that_cannot_read_so_far_is_refused(home, tmp_path):
    tiny.llm(tmp_path / "short", 1)
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    made = settings(home, tmp_path, "run", f"regate.reference={tmp_path / 'short'}")
    with pytest.raises(UserError, match="reads at most 20 tokens"):
        reference_of(made).losses(CPU, bar=False)


@pytest.mark.parametrize("plant", [hostile.unknown_model, hostile.unknown_tokenizer], ids=lambda plant: plant.__name__)
def test_code_that_comes_with_a_reference_is_not_run_and_nobody_is_asked(plant, home, tmp_path, monkeypatch):
    code, asked = hostile.Code(tmp_path / "canary"), []
    monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
    folder = hostile.copy(home / "llm", tmp_path / "llm")
    plant(folder, code)
    made = settings(home, tmp_path, "run", f"regate.reference={folder}")
    with pytest.raises(UserError, match=r"regate\.reference: .* such code is never run here"):
        train.train(made, bar=False)
    assert not asked
    assert not code.canary.exists()


def test_a_reference_whose_index_names_a_pickle_is_refused(home, tmp_path):
    folder = hostile.copy(home / "llm", tmp_path / "llm")
    hostile.index_of_pickles(folder, hostile.Code(tmp_path / "canary"))
    with pytest.raises(UserError, match="Only safetensors are read"):
        train.train(settings(home, tmp_path, "run", f"regate.reference={folder}"), bar=False)
