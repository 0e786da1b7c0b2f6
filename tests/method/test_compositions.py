"""All three systems in one recipe: rows that DualSpeed prunes, layers that STS skips, answers that ReGATE skips."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from support import pages
from support.runs import settings, train_through, unlike

from tinyspeed import UserError, adaptive, pruning, recipe
from tinyspeed.data import conversations
from tinyspeed.recipe import schedules
from tinyspeed.training import answer_gate, build, checkpoint, train
from tinyspeed.training.batching import Order

TOGETHER = (
    "lora.rank=4", "train.steps=12", "sts.skip=0.34", "sts.layers=influence", "sts.protect_first=0",
    "sts.protect_last=0", "sts.every=0", "regate.keep=0.5", "regate.cycle=6", "regate.refresh=1", "regate.warmup=0",
)  # fmt: skip


def test_the_guides_recipe_for_all_of_them_skips_rows_layers_and_answers():
    (command,) = [
        command for command in pages.commands(pages.ROOT / "tutorials" / "guide" / "methods.md") if "regate" in command
    ]
    made = recipe.read("digits", re.findall(r"--set (\S+)", command))
    answer_gate.require_some_skipping(made, made.digits.pictures)
    plans = list(map(schedules.schedule_of(made, "train", made.digits.layers).plan, range(made.train.steps)))
    assert any(plan.keep < 1 and plan.answer_keep < 1 for plan in plans)
    skipper = schedules.skipper_of(made, "train", made.digits.layers)
    assert skipper.on_average < made.digits.layers
    assert pruning.needs(made.dualspeed.plugin)


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
    steps = [json.loads(line) for line in (whole.folder / "metrics.jsonl").read_text().splitlines()]
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
