"""Whole runs in half precision: fp16 learns and stays stable, and a model is evaluated in the precision it had."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.runs import log_of, settings

from tinyspeed import UserError, recipe
from tinyspeed.evaluation import accuracy
from tinyspeed.training import checkpoint, train, trained_model
from tinyspeed.training.loop import StageRun


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


@pytest.mark.parametrize("every", [1, 2])
def test_overflows_without_end_stop_an_fp16_run_before_a_weight_is_harmed(home, tmp_path, monkeypatch, every):
    """The scale is halved 26 times, from 2^16 to 2^-10; at the next overflow it is not to blame any more."""
    made = settings(
        home, tmp_path, "run", "model.precision=fp16", "lora.rank=4", "train.steps=100", "train.batch=1",
        "run.keep_checkpoints=99", "dualspeed.slow=0.0",
    )  # fmt: skip
    original, before = StageRun._update, {}

    def overflowing(self, *given):
        before.update({name: p.detach().clone() for p, name in self.names.items()} if not before else {})
        if self.totals.steps % every == 0:
            self._gradients()[0].fill_(float("inf"))
        return original(self, *given)

    monkeypatch.setattr(StageRun, "_update", overflowing)
    last = 26 * every + 1
    said = rf"^step {last} \(fast, train\): .*gradient norm inf: the gradient of .*Stopped before the optimizer used it"
    with pytest.raises(UserError, match=said):
        train.train(made, bar=False)
    lines = log_of(made)
    assert [line["skipped"] for line in lines] == [step % every == 0 for step in range(last - 1)]
    saved, state = checkpoint.read(checkpoint.newest(made.folder / "checkpoints"))
    assert all(t.isfinite().all() for t in saved.values() if t.is_floating_point())
    assert state["scale"]["scale"] == 2.0**-10
    assert (every == 1) == all(torch.equal(saved[f"model/{name}"], weight) for name, weight in before.items())


def test_a_model_in_half_precision_is_evaluated_as_it_trained(tmp_path):
    """Full tuning in bf16: the trained weights are fp32, and the export has the precision of its base."""
    changes = ["digits.tower_steps=2", "align.steps=1", "train.steps=2", "model.precision=bf16", "run.device=cpu"]
    changes += ["digits.width=32", "digits.tower_width=16", "data.eval_pictures=8", f"run.folder={tmp_path}"]
    made = recipe.read("digits", changes)
    model = train.train(made, bar=False).model
    assert {p.dtype for p in model.model.parameters() if p.requires_grad} == {torch.float32}
    scores = accuracy.held_out(model, made, bar=False)
    assert scores == accuracy.held_out(trained_model.load_trained(made), made, bar=False)
    saved = load_file(made.folder / "model" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
