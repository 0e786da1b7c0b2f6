"""More under torchrun: ReGATE on two ranks, transformers.Trainer on two, and the launch file on two nodes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import tiny, trainer_ranks
from support.launching import log, torchrun
from support.runs import Killed, die_before, log_of, recipe_file, settings
from support.waiting import HANGS

from tinyspeed.training import checkpoint, train

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "scale" / "launch" / "torchrun.sh"
SKIPPING = (
    "train.steps=9", "train.batch=3", "train.row_budget=1", "train.lr=0.001", "dualspeed.slow=0.2", "regate.keep=0.4",
    "regate.cycle=4", "regate.refresh=1", "regate.warmup=2",
)  # fmt: skip
EVERYTHING = (
    "dualspeed.schedule=periodic", "dualspeed.slow=0.25", "dualspeed.plugin=tome", "lora.rank=4", "lora.dropout=0",
    "dualspeed.views=true", "sts.skip=0.34", "sts.layers=influence", "sts.protect_first=0", "sts.protect_last=0",
)  # fmt: skip


@pytest.mark.parametrize("together", [False, True], ids=["answers", "answers, rows, layers and views"])
def test_two_ranks_go_on_skipping_and_remembering_as_one_process_does(home, tmp_path, monkeypatch, together):
    """Also where a rank has nothing to learn: three samples a step, a forward each."""
    changes = (f"regate.reference={tiny.llm(tmp_path / 'llm')}", f"run.cache={tmp_path / 'cache'}", *SKIPPING)
    changes += EVERYTHING if together else ()
    alone, made = (settings(home, tmp_path, name, *changes) for name in ("alone", "scaled"))
    train.train(alone, bar=False)
    with monkeypatch.context() as patch:
        die_before(patch, 3)
        with pytest.raises(Killed):
            train.train(made, bar=False)
    assert torchrun(tmp_path, "-m", "scale", recipe_file(made)).wait(HANGS) == 0, log(tmp_path)
    for a, b in zip(log_of(alone), log_of(made), strict=True):
        assert all(a[of] == b[of] for of in ("mode", "answers", "rows_kept", "layers"))
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert any(line["layers"] for line in log_of(made)) == together
    assert "going on after step 2" in log(tmp_path)
    one, other = (checkpoint.read(checkpoint.newest(run.folder / "checkpoints"))[0] for run in (made, alone))
    torch.testing.assert_close(one["regate/difficulty"], other["regate/difficulty"], rtol=1e-3, atol=1e-4)


def test_two_ranks_are_one_with_twice_the_samples(tmp_path):
    """Under torchrun the Trainer wraps the model in DistributedDataParallel. Modes touch different parameters, but the
    same ones on all ranks; and the schedule hears what all of them saw."""
    agent = torchrun(tmp_path, trainer_ranks.__file__, tmp_path)
    assert agent.wait(HANGS) == 0, log(tmp_path)
    for number, name in enumerate(trainer_ranks.CASES):
        alone, state = trainer_ranks.train(name, tmp_path / "alone", ranks=1)
        for rank in (0, 1):
            weights, told = torch.load(tmp_path / f"{number}-{rank}.pt")
            assert weights.keys() == alone.keys()
            for key, p in weights.items():
                assert torch.allclose(p, alone[key], rtol=1e-4, atol=1e-6), (name, key)
            if "adaptive" in name:  # sums over ranks, of numbers that are added in another order
                told, expected = ([n for pair in found["schedule"]["sums"] for n in pair] for found in (told, state))
                assert told == pytest.approx(expected, rel=1e-3)
                assert len(told) == 6  # a sum and a count for each block that is over
            else:
                assert told == state


def test_two_nodes_meet_and_train(tmp_path):
    """Both are this machine, with one process each; the rest is as it would be: real torchruns, and a real run."""
    shim = tmp_path / "torchrun"  # there need not be one on the PATH
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    shim.chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    changes = ("run.device=cpu", "digits.tower_steps=5", "data.eval_pictures=20", "align.steps=2", "train.steps=3")
    arguments = [word for change in ("run.name=two", *changes) for word in ("--set", change)]
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "NNODES": "2", "GPUS": "1",
        "HEAD": f"localhost:{port}", "RESTARTS": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    logs = [tmp_path / "log0", tmp_path / "log1"]
    nodes = [
        subprocess.Popen(
            ["bash", LAUNCH, "digits", *arguments], cwd=tmp_path, env=environment, stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for log in logs
    ]  # fmt: skip
    try:
        codes = [node.wait(timeout=HANGS) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    said = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], said
    assert said.count("5 steps, ") == 1
    run = tmp_path / "runs" / "two"
    assert (run / "model" / "model.safetensors").is_file()
    assert list((run / "checkpoints").glob("*/*-00001-of-00002*")), "both wrote their part of the checkpoint"
