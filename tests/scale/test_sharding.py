"""One model over several ranks, in one process: with one rank it is the core, bit for bit. What needs two of them is in
tests/slow/test_two_ranks.py."""

import json
import shutil
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from support.runs import recipe_file, settings
from support.waiting import HANGS
from transformers import AutoModelForImageTextToText

from scale import __main__, ranks, run, shard
from scale.loop import ShardedStage
from scale.planner.sharded_model import ShardedModel
from tinyspeed import DualSpeed, UserError, recipe
from tinyspeed.models import loading, memory
from tinyspeed.training import checkpoint


def test_a_checkpoint_under_way_outlives_a_loss_that_is_not_finite(home, tmp_path, monkeypatch):
    made = settings(home, tmp_path, "run", "lora.rank=4", "train.steps=9")
    write, backward, gone = checkpoint.write, ShardedStage._micro_batch, threading.Event()

    def slowly(*given):
        assert gone.wait(HANGS)
        return write(*given)

    def broken(self, *given):
        out = backward(self, *given)
        if self.totals.steps == 2:  # behind the first checkpoint
            out.loss = out.loss * float("nan")
            gone.set()
        return out

    monkeypatch.setattr(checkpoint, "write", slowly)
    monkeypatch.setattr(ShardedStage, "_micro_batch", broken)
    with ranks.join() as here, pytest.raises(UserError, match=r"step 3 .*loss nan"):
        run.train(made, here)
    state = checkpoint.read(checkpoint.newest(made.folder / "checkpoints"))[1]
    assert state["step"] == 2


def test_a_run_goes_on_only_with_its_own_model_and_data(home, tmp_path):
    shutil.copytree(home / "llava", tmp_path / "model")
    shutil.copy(home / "train.json", tmp_path)
    own = ("lora.rank=4", "train.steps=2", f"model.path={tmp_path}/model", f"data.file={tmp_path}/train.json")
    made = settings(home, tmp_path, "run", *own)

    def refused(message: str, *changes: str) -> None:
        with ranks.join() as here, pytest.raises(UserError, match=message):
            run.train(settings(home, tmp_path, "run", *own, *changes), here)

    with ranks.join() as here:
        assert run.train(made, here) is None
    refused("train.lr differs", "train.lr=0.5")
    records = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train.json").write_text(json.dumps(records[1:]))
    refused("the data has changed")
    shutil.copy(home / "train.json", tmp_path)
    other = tiny.config("llava")
    other.text_config.hidden_size //= 2
    AutoModelForImageTextToText.from_config(other).save_pretrained(tmp_path / "model")
    refused(r"the base model is not the one that the run began with: config\.json, .*model\.safetensors.* differ")
    damaged = next((made.folder / "checkpoints").glob("step-*/tensors.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    refused("is damaged")


def test_a_dry_run_takes_a_step_of_each_mode_and_leaves_nothing(home, tmp_path, capsys):
    made = settings(home, tmp_path, "dry", "lora.rank=4", "align.steps=1", "align.batch=2", "train.batch=3")
    assert __main__.main([str(tmp_path / recipe_file(made)), "--dry-run"]) == 0
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[2:]]
    assert sorted([cell.strip() for cell in row] for row in rows) == [
        ["align", "fast", "2"], ["train", "fast", "3"], ["train", "slow", "3"],
    ]  # fmt: skip
    assert not made.folder.exists()


def test_four_bits_as_bytes_are_refused(home):
    model = DualSpeed(loading.load_model(str(home / "llava"), quantise="nf4"))
    with pytest.raises(UserError, match=r"uint8.*storage=torch.bfloat16"):
        shard.has_4_bits(model)
    assert shard.has_4_bits(DualSpeed(loading.load_model(str(home / "llava"), quantise="nf4", storage=torch.bfloat16)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("train.optimizer=adamw8bit",), "8-bit moments"),
        (("train.batch=1",), "less than 2 ranks"),
        (("data.feature_cache_gb=1.0",), "feature cache"),
        (("scale.offload=true",), "on a GPU"),
    ],
)
def test_what_cannot_be_spread_is_refused(home, tmp_path, changes, message):
    two = ranks.Ranks(0, 2, torch.device("cpu"), None)
    run.require_supported(settings(home, tmp_path, "run", "lora.rank=4"), two)
    with pytest.raises(UserError, match=message):
        run.require_supported(settings(home, tmp_path, "run", "lora.rank=4", *changes), two)


def test_a_model_that_cannot_read_the_digits_is_refused(home, tmp_path):
    model = settings(home, tmp_path, "run").model.path
    made = recipe.from_tables({"model": {"path": model}, "train": {"steps": 1}}, "a recipe")
    with ranks.join() as here, pytest.raises(UserError, match=r'is not a model for data\.kind = "digits"'):
        run.read_source(made, here)


def test_usage_is_explained_by_one_rank_only(monkeypatch, capsys):
    for rank, said in (("0", "unknown flag '--no-such-thing'"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            __main__.main(["digits", "--no-such-thing"])
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert bool(error) == bool(said)


def test_a_rank_keeps_room_for_what_is_gathered_and_not_for_gradients_of_others(models):
    shape = memory.Shape(loading.load_config(str(models / "1.5-7b")))
    model = ShardedModel(shape, memory.Settings())
    alone, gradients = model.coming(1), memory.fixed(shape, memory.Settings()).gradients
    assert alone == gradients
    assert model.coming(8) == gradients // 8 + model.borrowed
    fits = [memory.rows_within(60 * memory.GIB, shape, model.s, model.coming(n)) for n in (1, 2, 8, 64)]
    assert fits == sorted(fits)
    assert fits[0] == memory.rows_within(60 * memory.GIB, shape, model.s) < fits[-1]


hashes = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("01"))


@given(every=st.lists(hashes, min_size=1, max_size=4))
def test_the_first_rank_with_other_files_is_named_with_all_of_them(every):
    here = ranks.Ranks(0, len(every), torch.device("cpu"), None)
    here.gather = lambda mine: [(f"rank {rank} on node{rank}", of) for rank, of in enumerate(every)]
    others = [rank for rank, of in enumerate(every) if of != every[0]]
    if not others:
        run.require_same_files(here, every[0])
        return
    differ = sorted(name for name, _ in set(every[0].items()) ^ set(every[others[0]].items()))
    said = f"^rank {others[0]} on node{others[0]} and rank 0 do not have the same {', '.join(dict.fromkeys(differ))}: "
    with pytest.raises(UserError, match=said):
        run.require_same_files(here, every[0])
