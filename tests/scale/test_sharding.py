"""One model over several ranks, against the core alone: the same losses, gradients and weights; and ranks that die,
hang, are sent away or find something wrong. Real torchrun, real signals, two processes on a CPU."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.launching import log, torchrun
from support.runs import settings, unlike
from support.sharded_ranks import CASES, PLANS
from transformers import AutoModelForImageTextToText

from scale import __main__, ranks, run, shard
from scale.loop import ShardedStage
from scale.planner.sharded_model import ShardedModel
from tinyspeed import DualSpeed, UserError, adaptive
from tinyspeed.models import loading, memory
from tinyspeed.training import checkpoint, train

SUPPORT = Path(__file__).parents[1] / "support"
PROGRAM = ("-m", "scale")


def until(happens, what: str) -> None:
    deadline = time.monotonic() + 120
    while not happens():
        assert time.monotonic() < deadline, f"still waiting until {what}"
        time.sleep(0.02)


def steps(made) -> int:
    file = made.folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def process(agent: subprocess.Popen, rank: int) -> int:
    """The process of a rank."""
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


def saved(made) -> str:
    (made.folder.parent / f"{made.run.name}.toml").write_text(made.to_toml())
    return f"{made.run.name}.toml"


@pytest.fixture(scope="module")
def computed(home, tmp_path_factory):
    """What two ranks and the core found, for every case of sharded_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    agent = torchrun(folder, SUPPORT / "sharded_ranks.py", home, folder / "found.json")
    assert agent.wait(240) == 0, log(folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("mode", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_in_two_micro_batches(computed, name, mode):
    """The difference is that of sums in another order: 1e-5 of the largest gradient. In bf16, where the core casts only
    what enters a matrix product and FSDP casts all that it gathers, a few of its roundings, 2^-8 each."""
    found, half = computed[name][mode], "bf16" in name
    assert not found["different"]
    near = 1e-3 if half else 1e-6
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=near, abs=near * found["losses"][1][0])
    assert (found["losses"][1][-1] > 0) == (mode == "slow"), "the teacher's"
    assert found["influence"][0] == pytest.approx(found["influence"][1], rel=1e-2 if half else 1e-4)
    assert len(found["influence"][0]) == 3 * (mode != "fast" and "skipping" not in name)
    assert found["norm"][0] == pytest.approx(found["norm"][1], rel=1e-2 if half else 1e-5)
    assert found["way"][0] < (0.2 if half else 1e-3) * found["way"][1], "and a step leads to the same weights"
    assert len(found["samples"][0]) == len(found["samples"][1])
    batch = next((change for change in CASES[name] if change.startswith("train.batch")), "train.batch=4")
    assert sum(map(sum, found["samples"])) == int(batch.partition("=")[2])
    if "idle" in name:
        assert found["samples"] == [[1, 0], [1, 1]], "and one of these forwards has nothing to learn"


def test_ranks_adapt_as_one_process_does(computed):
    one, other = computed["adapting"]["ranks"]
    assert one == other, "what they heard is the same to the last bit"
    (modes, shares), (alone, want) = one, computed["adapting"]["alone"]
    assert modes == alone
    assert shares == pytest.approx(want, rel=0.02)  # a gap is a difference of sums that are taken in another order
    assert len(set(shares)) > 2


def test_every_rank_is_told_of_what_is_wrong_on_one(computed):
    found = computed["mistakes"]
    assert all(re.match(r"step 1 \(\w+, train\): loss nan.*: on rank 1 the loss of ", told) for told in found["NaN"])
    assert all(re.search(r": on rank 1 the optimizer's exp_avg_sq of \S+ \(1 of .*inf\)", t) for t in found["moment"])
    assert all(re.search(r"was not written: on rank 1 model/\S+ \(1 of .*nan\)", told) for told in found["saving"])
    assert found["steps"] == [0, 0]
    assert [told.rpartition(";")[2] for told in found["disagree"]] == [" rank 0 has 0", " rank 1 has 1"]
    assert found["agree"] == ["nothing"] * 2
    assert found["stops"] == [[True, [signal.SIGTERM]]] * 2, "a signal to one rank stops all"
    assert found["alive"] == [0, 0], "no rank holds a whole layer once it is sharded"
    assert found["recipes"] == ["rank 1 was started with another recipe than rank 0: train.lr"] * 2
    assert found["goes on"] == [[False, []]] * 2
    assert found["divide"] == ["scale.shard = 3 does not divide the 2 ranks"] * 2


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
    assert __main__.main([str(tmp_path / saved(made))]) == 0
    assert not unlike(made, alone)
    one, other = (load_file(r.folder / "model" / "model.safetensors") for r in (alone, made))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_goes_on_while_a_checkpoint_is_written(home, tmp_path, monkeypatch):
    made = settings(home, tmp_path, "run", "lora.rank=4", "train.steps=30", "run.save_every=10")
    write, gone, kept = checkpoint.write, [], []

    def slowly(temporary, *given):
        began = steps(made)
        until(lambda: steps(made) >= min(began + 3, 30), "three steps are done beside the writing")
        gone.append(steps(made) - began)
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


def test_a_checkpoint_under_way_outlives_a_loss_that_is_not_finite(home, tmp_path, monkeypatch):
    made = settings(home, tmp_path, "run", "lora.rank=4", "train.steps=9")
    write, backward, gone = checkpoint.write, ShardedStage._micro_batch, threading.Event()

    def slowly(*given):
        assert gone.wait(60)
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
    refused("it is of another model or recipe")
    damaged = next((made.folder / "checkpoints").glob("step-*/tensors.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    refused("is damaged")


def test_a_dry_run_takes_a_step_of_each_mode_and_leaves_nothing(home, tmp_path, capsys):
    made = settings(home, tmp_path, "dry", "lora.rank=4", "align.steps=1", "align.batch=2", "train.batch=3")
    assert __main__.main([str(tmp_path / saved(made)), "--dry-run"]) == 0
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[2:]]
    assert sorted([cell.strip() for cell in row] for row in rows) == [
        ["align", "fast", "2"], ["train", "fast", "3"], ["train", "slow", "3"],
    ]  # fmt: skip
    assert not made.folder.exists()


def test_a_rank_is_killed_and_the_run_ends_as_if_it_had_not_been(home, tmp_path):
    """And it measures layers, and skips some, which both ranks must agree on."""
    changes = ("lora.rank=4", "model.quantise=nf4", "train.steps=30", "run.save_every=4", "scale.check_every=1")
    changes += ("sts.skip=0.34", "sts.layers=influence", "sts.protect_first=0", "sts.protect_last=0")
    whole = settings(home, tmp_path, "whole", *changes)
    assert torchrun(tmp_path, *PROGRAM, saved(whole)).wait(120) == 0, log(tmp_path)
    made = settings(home, tmp_path, "killed", *changes)
    agent = torchrun(tmp_path, *PROGRAM, saved(made), restarts=1)
    until(lambda: checkpoint.newest(made.folder / "checkpoints"), "there is a checkpoint")
    os.kill(process(agent, 1), signal.SIGKILL)
    assert agent.wait(120) == 0, log(tmp_path)
    assert re.search(r"going on behind step \d+ of", log(tmp_path)), "torchrun has started it again"
    assert not unlike(made, whole)
    one, other = (load_file(r.folder / "model" / "model.safetensors") for r in (whole, made))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_stopped_on_two_ranks_resumed_on_one_and_then_on_two_again(home, tmp_path):
    """Through both stages, all weights of the LLM trained. AdamW's first steps are about as long for a tiny gradient as
    for a large one, so rounding shows in single weights: what is held is the way that all have gone, within 1e-3."""
    changes = ("align.steps=6", "train.steps=10", "run.save_every=2", "train.lr=0.001")
    alone = settings(home, tmp_path, "alone", *changes)
    train.train(alone, bar=False)
    made = settings(home, tmp_path, "run", *changes)
    file = saved(made)

    agent = torchrun(tmp_path, *PROGRAM, file)
    until(lambda: steps(made) > 1, "a few steps are done")
    agent.send_signal(signal.SIGTERM)
    agent.wait(60)
    first = steps(made)
    assert 1 < first < 16, log(tmp_path)
    assert checkpoint.newest(made.folder / "checkpoints").name == f"step-{first:08d}", "it was saved before it left"
    assert log(tmp_path).count("the same command goes on") == 1

    one = subprocess.Popen(
        [sys.executable, *PROGRAM, file], cwd=tmp_path, env={**os.environ, "PYTHONPATH": SUPPORT.parents[1]}
    )
    until(lambda: steps(made) > first + 2, "one rank has gone on")
    one.send_signal(signal.SIGTERM)
    assert one.wait(60) == 143
    second = steps(made)

    assert torchrun(tmp_path, *PROGRAM, file).wait(120) == 0, log(tmp_path)
    assert first + 2 < second < steps(made) == 16
    before = load_file(home / "llava" / "model.safetensors")
    want, got = (load_file(r.folder / "model" / "model.safetensors") for r in (alone, made))
    went = sum(float((want[name] - before[name]).square().sum()) for name in want) ** 0.5
    apart = sum(float((want[name] - got[name]).square().sum()) for name in want) ** 0.5
    assert went > 0
    assert apart < 1e-3 * went


def test_a_rank_that_hangs_ends_the_run_and_the_step_is_named(home, tmp_path):
    made = settings(home, tmp_path, "run", "lora.rank=4", "train.steps=500", "scale.timeout=3.0")
    agent = torchrun(tmp_path, *PROGRAM, saved(made))
    until(lambda: steps(made) > 2, "a few steps are done")
    stopped = process(agent, 1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        until(lambda: "no progress" in log(tmp_path), "the other one complains")
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert agent.wait(60) != 0
    assert re.search(r"rank 0 has made no progress for 3 s, .* of step \d+", log(tmp_path))
    assert re.search(r"and rank 1 was .* of step \d+", log(tmp_path))


def test_a_folder_that_one_rank_cannot_see_is_told_once_and_at_once(home, tmp_path):
    made = settings(home, tmp_path, "run", "lora.rank=4")
    blind = f'[ $RANK = 1 ] && set -- "$@" --set data.images={tmp_path}/nowhere; exec {sys.executable} -m scale "$@"'
    began = time.monotonic()
    agent = torchrun(tmp_path, "--no-python", "sh", "-c", blind, "sh", saved(made))
    assert agent.wait(60) == 1
    assert time.monotonic() - began < 45
    assert log(tmp_path).count("tinyspeed: ") == 1
    said = f"tinyspeed: rank 1 on {platform.node()}: data.images: there is no folder {tmp_path}/nowhere"
    assert said in log(tmp_path)


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


def test_usage_is_explained_by_one_rank_only(monkeypatch, capsys):
    for rank, said in (("0", "unrecognized arguments"), ("1", "")):
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
