"""One model over two ranks, against the core alone: the same losses, gradients and weights; and ranks that die, hang,
are told to stop or find something wrong. Real torchrun and real signals, two processes on a CPU."""

import json
import os
import platform
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launching import log, rank_of, torchrun
from support.runs import HELD_RUN, recipe_file, run_held, settings, steps_done, unlike
from support.sharded_ranks import CASES, PLANS
from support.waiting import HANGS, until

from tinyspeed.training import checkpoint, train

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def ranks(home, tmp_path_factory):
    """What two ranks and the core found, for every case of sharded_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    agent = torchrun(folder, SUPPORT / "sharded_ranks.py", home, folder / "found.json")
    assert agent.wait(HANGS) == 0, log(folder)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("mode", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_in_two_micro_batches(ranks, name, mode):
    """The difference is that of sums in another order: 1e-5 of the largest gradient. In bf16, where the core casts only
    what enters a matrix product and FSDP casts all that it gathers, a few of its roundings, 2^-8 each."""
    found, half = ranks[name][mode], "bf16" in name
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


def test_ranks_adapt_as_one_process_does(ranks):
    one, other = ranks["adapting"]["ranks"]
    assert one == other, "what they heard is the same to the last bit"
    (modes, shares), (alone, want) = one, ranks["adapting"]["alone"]
    assert modes == alone
    assert shares == pytest.approx(want, rel=0.02)  # a gap is a difference of sums that are taken in another order
    assert len(set(shares)) > 2


def test_every_rank_is_told_of_what_is_wrong_on_one(ranks):
    found = ranks["mistakes"]
    assert all(re.match(r"step 1 \(\w+, train\): loss nan.*: on rank 1 the loss of ", told) for told in found["NaN"])
    assert all(re.search(r": on rank 1 the optimizer's exp_avg_sq of \S+ \(1 of .*inf\)", t) for t in found["moment"])
    assert all(re.search(r"was not written: on rank 1 model/\S+ \(1 of .*nan\)", told) for told in found["saving"])
    assert found["steps"] == [0, 0]
    assert [told.rpartition(";")[2] for told in found["disagree"]] == [" rank 0 has 0", " rank 1 has 1"]
    assert found["agree"] == ["nothing"] * 2
    assert found["stops"] == [[[True, False], [signal.SIGTERM]]] * 2, "a signal to one rank stops all"
    assert found["late"] == [[False, True]] * 2, "if a checkpoint is late on one rank, all save after the same step"
    assert found["alive"] == [0, 0], "no rank holds a whole layer once it is sharded"
    other = f"rank 1 on {platform.node()} was started with another recipe than rank 0: train.lr"
    assert found["recipes"] == [other] * 2
    assert found["goes on"] == [[[False, False], []]] * 2
    assert found["divide"] == ["scale.shard = 3 does not divide the 2 ranks"] * 2


def test_a_rank_with_other_files_is_named(ranks):
    found = ranks["other files"]
    assert found.pop("nothing") == ["nothing"] * 2, "copies in other places are the same files"
    wanted = {
        "a letter": "data.file", "the order": "data.file", "fewer": "data.file",
        "a picture": "pictures in data.images", "a weight": "model.safetensors", "the tokenizer": "tokenizer.json",
        "another program": "scale/loop.py", "an isolator": "dualspeed.isolator_from",
    }  # fmt: skip
    assert found.keys() == wanted.keys()
    for name, what in wanted.items():
        said = f"rank 1 on {platform.node()} and rank 0 do not have the same {what}: "
        assert all(told.startswith(said) for told in found[name]), name


def test_a_run_whose_ranks_have_other_data_ends_before_the_first_step(home, tmp_path):
    made, other = settings(home, tmp_path, "run", "lora.rank=4"), tmp_path / "other.json"
    other.write_text((home / "train.json").read_text().replace("number 4", "number 5"))
    set_other = f'[ $RANK = 1 ] && set -- "$@" --set data.file={other}; exec {sys.executable} -m scale "$@"'
    agent = torchrun(tmp_path, "--no-python", "sh", "-c", set_other, "sh", recipe_file(made))
    assert agent.wait(HANGS) == 1
    assert log(tmp_path).count("tinyspeed: ") == 1
    assert re.search(
        r"tinyspeed: rank \d on .*: rank 1 on .* and rank 0 do not have the same data\.file: ", log(tmp_path)
    )
    assert not checkpoint.newest(made.folder / "checkpoints")
    assert not steps_done(made)


def test_a_rank_is_killed_and_the_run_ends_as_if_it_had_not_been(home, tmp_path):
    """And it measures layers, and skips some, which both ranks must agree on."""
    changes = ("lora.rank=4", "model.quantise=nf4", "train.steps=30", "run.save_every=4", "scale.check_every=1")
    changes += ("sts.skip=0.34", "sts.layers=influence", "sts.protect_first=0", "sts.protect_last=0")
    whole = settings(home, tmp_path, "whole", *changes)
    assert torchrun(tmp_path, "-m", "scale", recipe_file(whole)).wait(HANGS) == 0, log(tmp_path)
    made = settings(home, tmp_path, "killed", *changes)
    agent = torchrun(tmp_path, HELD_RUN, 6, "scale", recipe_file(made), restarts=1)
    until(lambda: steps_done(made) == 6, "it stands still after step 6", agent)
    os.kill(rank_of(agent, 1), signal.SIGKILL)
    assert agent.wait(HANGS) == 0, log(tmp_path)
    assert "going on after step 4 of" in log(tmp_path), "torchrun has started it again"
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
    file = recipe_file(made)

    agent = torchrun(tmp_path, HELD_RUN, 3, "scale", file)
    until(lambda: steps_done(made) == 3, "two ranks stand still after step 3", agent)
    agent.send_signal(signal.SIGTERM)
    agent.wait(HANGS)
    assert steps_done(made) == 3, log(tmp_path)
    assert checkpoint.newest(made.folder / "checkpoints").name == "step-00000003", "it was saved before it left"
    assert log(tmp_path).count("the same command goes on") == 1

    one = run_held(9, "scale", file, folder=tmp_path)
    until(lambda: steps_done(made) == 9, "one rank has gone on", one)
    one.send_signal(signal.SIGTERM)
    one.communicate(timeout=HANGS)
    assert one.returncode == 143
    assert steps_done(made) == 9

    assert torchrun(tmp_path, "-m", "scale", file).wait(HANGS) == 0, log(tmp_path)
    assert steps_done(made) == 16
    before = load_file(home / "llava" / "model.safetensors")
    want, got = (load_file(r.folder / "model" / "model.safetensors") for r in (alone, made))
    went = sum(float((want[name] - before[name]).square().sum()) for name in want) ** 0.5
    apart = sum(float((want[name] - got[name]).square().sum()) for name in want) ** 0.5
    assert went > 0
    assert apart < 1e-3 * went


def test_a_rank_that_hangs_ends_the_run_and_the_step_is_named(home, tmp_path):
    made = settings(home, tmp_path, "run", "lora.rank=4", "train.steps=9")
    agent = torchrun(tmp_path, HELD_RUN, 3, "scale", recipe_file(made))
    until(lambda: steps_done(made) == 3, "it stands still after step 3", agent)
    hangs = rank_of(agent, 1)
    os.kill(hangs, signal.SIGSTOP)
    (tmp_path / "late").touch()
    try:
        until(lambda: "no answer" in log(tmp_path), "the other one complains", agent)
    finally:
        os.kill(hangs, signal.SIGCONT)
    assert agent.wait(HANGS) != 0
    here = re.escape(platform.node())
    assert re.search(rf"no answer from rank 1 on {here}; rank 0 on {here} was .* of step 3", log(tmp_path))
    assert re.search(rf"and rank 1 on {here} was .* of step 3", log(tmp_path))


def test_a_folder_that_one_rank_cannot_see_is_told_once_and_at_once(home, tmp_path):
    made = settings(home, tmp_path, "run", "lora.rank=4")
    blind = f'[ $RANK = 1 ] && set -- "$@" --set data.images={tmp_path}/nowhere; exec {sys.executable} -m scale "$@"'
    agent = torchrun(tmp_path, "--no-python", "sh", "-c", blind, "sh", recipe_file(made))
    assert agent.wait(HANGS) == 1
    assert log(tmp_path).count("tinyspeed: ") == 1
    said = f"tinyspeed: rank 1 on {platform.node()}: data.images: there is no folder {tmp_path}/nowhere"
    assert said in log(tmp_path)
