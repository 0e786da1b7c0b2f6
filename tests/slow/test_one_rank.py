"""`scale` with one rank is the core, bit for bit; training goes on while a checkpoint is written; a run ends well."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import recipe_file, settings, steps_done, unlike
from support.waiting import until

from scale import __main__, ranks, run
from tinyspeed import adaptive
from tinyspeed.training import checkpoint, train


@pytest.mark.parametrize(
    "changes",
    [
        ("lora.rank=4", "model.quantise=nf4"),
        ("lora.rank=4", "train.row_budget=60"),
        ("align.steps=2",),
        ("align.steps=2", "model.precision=bf16"),
        ("sts.skip=0.34", "sts.layers=influence", "sts.protect_first=0", "sts.protect_last=0"),
        ("lora.rank=4", "dualspeed.schedule=adaptive", "dualspeed.slow=0.8", "train.steps=8"),
    ],
    ids=["4-bit", "lora", "all weights", "all weights, bf16", "skipping", "adaptive"],
)
def test_one_rank_is_the_core_bit_for_bit(home, tmp_path, monkeypatch, changes):
    """With dropout, through both stages, to the exported weights."""
    monkeypatch.setattr(adaptive, "BLOCK", 2)
    alone = settings(home, tmp_path, "alone", *changes)
    train.train(alone, bar=False)
    made = settings(home, tmp_path, "scaled", *changes)
    assert __main__.main([str(tmp_path / recipe_file(made))]) == 0
    assert not unlike(made, alone)
    one, other = (load_file(r.folder / "model" / "model.safetensors") for r in (alone, made))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_goes_on_while_a_checkpoint_is_written(home, tmp_path, monkeypatch):
    made = settings(home, tmp_path, "run", "lora.rank=4", "train.steps=30", "run.save_every=10")
    write, gone, kept = checkpoint.write, [], []

    def slowly(temporary, *given):
        began = steps_done(made)
        until(lambda: steps_done(made) >= min(began + 3, 30), "three steps are done beside the writing")
        gone.append(steps_done(made) - began)
        kept.append([path.name for path in checkpoint._complete(temporary.parent)])
        return write(temporary, *given)

    monkeypatch.setattr(checkpoint, "write", slowly)
    with ranks.join() as here:
        assert run.train(made, here) is None
    assert min(gone[:2]) >= 3, "behind the last step there is nothing to go on with"
    assert kept == [[], ["step-00000010"], ["step-00000010", "step-00000020"]], "half-written ones have no name"
    monkeypatch.undo()
    alone = settings(home, tmp_path, "alone", "lora.rank=4", "train.steps=30", "run.save_every=10")
    train.train(alone, bar=False)
    assert not unlike(made, alone)


READING_THE_STORE = """
import time
from scale import ranks

def check(self, store):
    until = time.monotonic() + 1
    while time.monotonic() < until:
        store.check(["anything"])

ranks.Ranks._check, ranks.CHECK_EVERY = check, 0.0
with ranks.join():
    time.sleep(0.2)
"""


def test_a_run_that_is_done_ends_well_while_its_thread_reads_the_store():
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", READING_THE_STORE], cwd=root, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr  # -6: aborted by a thread that comes back from the store to no Python
