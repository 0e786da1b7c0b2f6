"""A training step waits for the GPU once, when its numbers are read for the log."""

import pytest
from support import gpu_runs, pretend_cuda, runs

from tinyspeed.training.loop import StageRun

pytestmark = pytest.mark.skipif(bool(pretend_cuda.unavailable()), reason=pretend_cuda.unavailable() or "available")
FEW = ("model.precision=fp32", "train.steps=3", "train.row_budget=150", "dualspeed.slow=0.5")


def test_a_step_waits_once(home, tmp_path, monkeypatch):
    """Whatever its mode and its micro-batches: for the norm of the gradients, the loss and what else is logged."""
    made = runs.settings(home, tmp_path, "waits", *FEW, "run.device=cuda")
    found = gpu_runs.train_there(monkeypatch, made)
    assert {mode for mode, _ in found} == {"fast", "slow"}
    for mode, waits in found:
        assert [*waits.values()] == [1], mode
        assert "training/loop.py" in next(iter(waits))
        assert "_update" in next(iter(waits))


def test_an_item_in_the_loop_is_found(home, tmp_path, monkeypatch):
    micro_batch = StageRun._micro_batch

    def chatty(self, *args):
        out = micro_batch(self, *args)
        out.loss.item()
        return out

    monkeypatch.setattr(StageRun, "_micro_batch", chatty)
    found = gpu_runs.train_there(monkeypatch, runs.settings(home, tmp_path, "chatty", *FEW, "run.device=cuda"))
    assert all(sum(waits.values()) > 1 for _, waits in found)
