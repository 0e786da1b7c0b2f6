"""Killed and resumed is never killed, bit for bit: every system, alone and together, and every way to fit a GPU."""

import itertools
import re

import pytest
import torch
from safetensors.torch import load_file
from support import digits_runs, tiny
from support.digits_runs import ALIGN, TUNE, small_base
from support.runs import ADAPTIVE, SMALL_GPU, Killed, die_before, log_of, settings, train_through, unlike
from support.trainers import Pictures, adapting, arguments, gather, wrapped
from transformers import Trainer

from tinyspeed import UserError, adaptive, cli, recipe
from tinyspeed.data import conversations
from tinyspeed.scheduler import uniform
from tinyspeed.training import build, checkpoint, train
from tinyspeed.training.batching import Order
from tinyspeed.training.trainer_callback import SetStep


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    made = digits_runs.settings(base, tmp_path_factory.mktemp("whole"), "whole")
    train.train(made, bar=False)
    return made


@pytest.mark.parametrize("deaths", [(2,), (ALIGN + TUNE - 1,), (4, 5), (5, 5, 9)], ids=str)
def test_killed_and_resumed_equals_never_killed_at_more_steps(deaths, base, uninterrupted, tmp_path, monkeypatch):
    made = digits_runs.settings(base, tmp_path, "run")
    train_through(monkeypatch, made, *deaths)
    assert not unlike(made, uninterrupted)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("how", SMALL_GPU)
def test_killed_and_resumed_is_never_killed_for_every_way_to_fit_a_small_gpu(home, tmp_path, monkeypatch, how, family):
    if family == "llava_next" and how in ("fp16", "full", "views"):
        pytest.skip("the other two cover what NeXT does differently")
    whole = settings(home, tmp_path, "whole", *SMALL_GPU[how], family=family)
    train.train(whole, bar=False)
    made = settings(home, tmp_path, "run", *SMALL_GPU[how], family=family)
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


STS = {
    "random": ("sts.skip=0.34",),
    "influence": (
        "sts.skip=0.34", "sts.layers=influence", "train.row_budget=60", "sts.protect_first=0", "sts.protect_last=0",
    ),
    "alone": (
        "sts.skip=0.34", "sts.layers=influence", "sts.every=3", "dualspeed.schedule=full", "dualspeed.isolator=0",
        "align.steps=2", "align.batch=4", "sts.compress=0.5", "lora.rank=4", "model.quantise=nf4",
    ),
    "every": ("sts.skip=0.34", "sts.layers=influence", "sts.every=2", "dualspeed.schedule=fast"),
}  # fmt: skip


@pytest.mark.parametrize("which", STS)
def test_killed_and_resumed_is_never_killed_while_layers_are_skipped(home, tmp_path, monkeypatch, which):
    """Pruned rows and skipped layers in one run, whose measurements are in its checkpoints."""
    whole = settings(home, tmp_path, "whole", *STS[which])
    asked = itertools.chain(*(("--set", change) for change in STS[which]))
    assert cli.main(["train", str(tmp_path / "whole.toml"), *asked]) == 0
    made = settings(home, tmp_path, "run", *STS[which])
    train_through(monkeypatch, made, 1, 3)
    assert not unlike(made, whole)
    assert [e["layers"] for e in log_of(made)] == [e["layers"] for e in log_of(whole)]
    tuned = [e for e in log_of(whole) if e["stage"] == "train"]
    assert {e["layers"] for e in tuned if e["mode"] == "slow"} <= {None}
    assert {e["layers"] for e in tuned} == {None, 2}, "some steps skip one of three layers, and some do not"
    if which == "alone":
        aligned = [e for e in log_of(whole) if e["stage"] == "align"]
        assert {(e["mode"], e["layers"]) for e in aligned} == {("fast", None)}
        assert all(e["rows_kept"] < e["rows_full"] for e in aligned)
        assert all(e["rows_kept"] == e["rows_full"] for e in tuned)


def newest(made) -> dict:
    return checkpoint.read(checkpoint.newest(made.folder / "checkpoints"))[1]["schedule"]


@pytest.mark.parametrize("workers", [0, 3])
def test_killed_and_resumed_is_never_killed_from_any_number_of_workers(home, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(adaptive, "BLOCK", 2)
    whole = settings(home, tmp_path, "whole", *ADAPTIVE, "data.workers=0")
    train.train(whole, bar=False)
    made = settings(home, tmp_path, "run", *ADAPTIVE, f"data.workers={workers}")
    train_through(monkeypatch, made, 3, 8)
    assert not unlike(made, whole)
    state = newest(whole)
    assert newest(made) == state

    # What the run drew follows from what its log says, worked out once more from there.
    said, share, drawn = log_of(whole), [0.8, 0.8], []
    for step in range(len(said)):
        if step % 2 == 0 and step >= 4:
            before = [one for one in said[step - 4 : step - 2] if one["mode"] == "slow"]
            more = sum((one["ce"] - one["ce_teacher"]) * one["answers"] for one in before)
            x = min(max(more / sum(one["answers"] for one in before) / 0.02, 0), 2) if before else 1
            share.append(min(max(share[-1] * max(x, (1 + x) / 2), 0.2), 1.0))
        drawn.append("slow" if uniform(0, step) < share[step // 2] else "fast")
    assert [line["mode"] for line in said] == drawn
    moves = [b > a for a, b in itertools.pairwise(share) if a != b]
    assert {True, False} == {*moves}, "the share has moved, both ways"
    assert all((line["ce_teacher"] is None) == (line["mode"] == "fast") for line in said)


TOGETHER = (
    "lora.rank=4", "train.steps=12", "sts.skip=0.34", "sts.layers=influence", "sts.protect_first=0",
    "sts.protect_last=0", "sts.every=0", "regate.keep=0.5", "regate.cycle=6", "regate.refresh=1", "regate.warmup=0",
)  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "slow", "views", "positions"),
    [
        ("periodic", 0.25, "false", "original"), ("periodic", 0.25, "true", "compact"),
        ("adaptive", 0.7, "false", "compact"),
    ],
)  # fmt: skip
def test_one_recipe_asks_for_all_three_and_is_never_the_wiser_for_being_killed(
    home, tmp_path, monkeypatch, schedule, slow, views, positions
):
    monkeypatch.setattr(adaptive, "BLOCK", 2)
    together = (*TOGETHER, f"dualspeed.schedule={schedule}", f"dualspeed.slow={slow}", f"dualspeed.views={views}")
    together += (f"dualspeed.positions={positions}",)
    whole = settings(home, tmp_path, "whole", *together)
    train.train(whole, bar=False)
    steps = log_of(whole)
    fast = [step for step in steps if step["mode"] == "fast"]
    layers = [step["layers"] for step in steps if step["mode"] == "slow"]
    assert layers == [None] * len(layers)
    assert len(layers) >= 3
    assert any(step["layers"] for step in fast)
    assert all(step["rows_kept"] < step["rows_full"] for step in fast)
    # Once all have been seen (in one step of three, some). Slow steps learn every answer, and so does the first step of
    # each cycle of six.
    source = conversations.from_recipe(whole, whole.model.path, bar=False)
    order = Order(len(source), whole.run.seed)
    every = [sum(source.lengths(i)[2] for i in order.batch(at, whole.train.batch)) for at in range(len(steps))]
    for at, (step, answers) in enumerate(zip(steps, every, strict=True)):
        skips = step["mode"] == "fast" and at % 6 >= 1 and (at + 1) * whole.train.batch > len(source)
        assert (step["answers"] < answers) == skips
    made = settings(home, tmp_path, "run", *together)
    train_through(monkeypatch, made, 3, 7)
    assert not unlike(made, whole)


@pytest.mark.parametrize("plugin", ["dynamicvit", "tokenlearner"])
def test_a_learned_plugin_learns_is_never_the_wiser_for_being_killed_and_stays_behind(
    home, tmp_path, monkeypatch, plugin
):
    asked = ("train.steps=6", "dualspeed.slow=0.3", "dualspeed.schedule=periodic", f"dualspeed.plugin={plugin}")
    whole = settings(home, tmp_path, "whole", *asked)
    train.train(whole, bar=False)
    made = settings(home, tmp_path, "run", *asked)
    train_through(monkeypatch, made, 2, 5)
    assert not unlike(made, whole)

    saved, _ = checkpoint.read(checkpoint.newest(whole.folder / "checkpoints"))
    trained = {name.removeprefix("model/"): saved[name] for name in saved if name.startswith("model/chooser.")}
    fresh = build.build_model(whole)
    for name, weight in fresh.chooser.named_parameters():
        assert not torch.equal(trained[f"chooser.{name}"], weight)
    exported = load_file(whole.folder / "model" / "model.safetensors")
    assert not [name for name in exported if "chooser" in name]

    more = settings(home, tmp_path, "more", *asked, f"dualspeed.isolator_from={whole.folder}")
    for name, weight in build.build_model(more).chooser.named_parameters():
        assert torch.equal(trained[f"chooser.{name}"], weight)
    other = settings(home, tmp_path, "other", "dualspeed.plugin=grid")
    train.train(other, bar=False)
    with pytest.raises(UserError, match="that run had another"):
        build.build_model(settings(home, tmp_path, "none", *asked, f"dualspeed.isolator_from={other.folder}"))


def test_a_killed_run_with_features_resumes_bit_for_bit(home, tmp_path, monkeypatch):
    how = (f"run.cache={tmp_path}/cache", "data.feature_cache_gb=0.1", "model.precision=bf16", "lora.rank=4")
    whole, made = (settings(home, tmp_path, name, *how, family="llava_next") for name in ("whole", "run"))
    train.train(whole, bar=False)
    with monkeypatch.context() as patch:
        die_before(patch, 3)
        with pytest.raises(Killed):
            train.train(made, bar=False)
    train.train(made, resume=True, bar=False)
    assert not unlike(made, whole)
    assert [path for path in (tmp_path / "cache" / "features").rglob("*") if path.is_file()]
    assert log_of(made)[0]["rows_full"]
    assert recipe.of_run(str(made.folder)).data.feature_cache_gb == 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_a_trainer_run_resumes_bit_for_bit(tmp_path, tied):
    def run(folder, steps, resume):
        model = wrapped(slow=0.5)
        if tied:  # as small LLMs have it; safetensors refuses two names of one tensor
            model.model.lm_head.weight = model.model.get_input_embeddings().weight
        given = arguments(tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=3)
        trainer = Trainer(model, given, train_dataset=Pictures(64), data_collator=gather, callbacks=[SetStep(model)])
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach() for name, p in model.named_parameters()}

    whole = run("whole", 6, False)
    run("cut", 3, False)
    resumed = run("cut", 6, True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any("lm_head" in name for name in whole) is not tied


def test_a_schedule_with_a_state_resumes_under_the_trainer(tmp_path):
    def run(folder, steps, resume):
        model = adapting()
        given = arguments(tmp_path / folder, max_steps=steps, save_strategy="steps", save_steps=4)
        trainer = Trainer(model, given, train_dataset=Pictures(64), data_collator=gather, callbacks=[SetStep(model)])
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run("whole", 8, False)
    assert run("cut", 4, False).schedule.state_dict() != whole.schedule.state_dict()
    resumed = run("cut", 8, True)
    assert resumed.schedule.state_dict() == whole.schedule.state_dict()
    for (name, p), (_, q) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(p, q), name
