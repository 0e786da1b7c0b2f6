"""Whole runs on a pretend GPU: training, resuming, measuring, answering and rehearsing, with the numbers of a CPU."""

import pytest
import torch
from support import gpu_runs, pretend_cuda, runs

from tinyspeed.data import images
from tinyspeed.evaluation import accuracy, ask
from tinyspeed.training import build, train, trained_model

pytestmark = pytest.mark.skipif(bool(pretend_cuda.unavailable()), reason=pretend_cuda.unavailable() or "available")
FP32 = ("model.precision=fp32", "dualspeed.layout=padded")  # so that dropout draws the same
LORA = ("lora.rank=4",)


def alike(here, there, rel: float) -> None:
    """The same losses and norms at every step."""
    mine, its = runs.log_of(here), runs.log_of(there)
    assert [entry["mode"] for entry in mine] == [entry["mode"] for entry in its]
    for name in ("loss", "ce", "kl", "grad_norm"):
        assert [entry[name] for entry in its] == pytest.approx([entry[name] for entry in mine], rel=rel, abs=rel)
    for name in ("answers", "rows_kept", "rows_taught", "rows_full", "layers"):
        assert [entry[name] for entry in its] == [entry[name] for entry in mine]


KINDS = {
    "full": FP32,
    "lora": (*FP32, *LORA),  # with its dropout
    "qlora": (*FP32, *LORA, "model.quantise=nf4", "train.checkpointing=on"),
    "views": (*FP32, *LORA, "dualspeed.views=true"),
    "sts": (*FP32, *LORA, "sts.compress=0.2", "sts.skip=0.4", "sts.layers=influence", "align.steps=2"),
    "dynamicvit": (*FP32, *LORA, "dualspeed.plugin=dynamicvit"),
    "adaptive": (*FP32, *LORA, "dualspeed.schedule=adaptive"),
    "bf16": ("model.precision=bf16", *LORA, "lora.dropout=0"),  # packed
    "fp16": ("model.precision=fp16", *LORA, "lora.dropout=0"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_what_it_is_on_a_cpu_with_one_wait_a_step(home, tmp_path, monkeypatch, kind):
    here, there, waits = gpu_runs.on_both(monkeypatch, home, tmp_path, kind, *KINDS[kind], "train.row_budget=200")
    alike(here, there, rel=0.1 if "16" in kind else 1e-3)
    assert [sum(found.values()) for _, found in waits] == [1] * len(waits), waits


def test_llava_next(home, tmp_path, monkeypatch):
    here, there, waits = gpu_runs.on_both(monkeypatch, home, tmp_path, "next", *FP32, *LORA, family="llava_next")
    alike(here, there, rel=1e-3)
    assert [sum(found.values()) for _, found in waits] == [1] * len(waits), waits


REGATE = ("regate.keep=0.5", "regate.warmup=1", "regate.cycle=4", "regate.refresh=1", "train.steps=10")


def test_skipping_answers(home, tmp_path, monkeypatch):
    """The losses of each token reach the memory with the step's numbers."""
    here, there, waits = gpu_runs.on_both(monkeypatch, home, tmp_path, "regate", *FP32, *LORA, *REGATE)
    alike(here, there, rel=1e-3)
    assert [sum(found.values()) for _, found in waits] == [1] * len(waits), waits


def test_features_from_the_cache(home, tmp_path, monkeypatch):
    cache = ("data.feature_cache_gb=0.1", f"run.cache={tmp_path / 'cache'}")
    here, there, waits = gpu_runs.on_both(monkeypatch, home, tmp_path, "cache", *FP32, *cache)
    alike(here, there, rel=1e-3)
    assert [sum(found.values()) for _, found in waits] == [1] * len(waits), waits
    again = runs.settings(
        home, tmp_path, "made-there", *FP32, *cache[:1], f"run.cache={tmp_path / 'it'}", "run.device=cuda"
    )
    gpu_runs.train_there(monkeypatch, again)
    names = [
        sorted(file.name for file in (tmp_path / of / "features").rglob("*.safetensors")) for of in ("cache", "it")
    ]
    assert names[0] == names[1] != []


def test_a_run_that_was_killed_goes_on_there(home, tmp_path, monkeypatch):
    """Also on another device than before: a checkpoint is a CPU's."""
    whole = runs.settings(home, tmp_path, "whole", *FP32, *LORA, "run.device=cuda")
    gpu_runs.train_there(monkeypatch, whole)
    cut = runs.settings(home, tmp_path, "cut", *FP32, *LORA, "run.device=cuda")
    with pretend_cuda.device():
        runs.train_until(cut, 4)
    gpu_runs.train_there(monkeypatch, cut, resume=True)
    assert not runs.unlike(cut, whole)


def test_a_trained_model_answers_there(home, tmp_path, monkeypatch):
    made = runs.settings(home, tmp_path, "asked", *FP32, *LORA)
    train.train(made, bar=False)
    picture = images.decode(next((home / "images").iterdir()), "here")
    said = []
    for device in ("cpu", "cuda"):
        with (
            pretend_cuda.device(),
            trained_model.open_model(str(made.folder / "model"), device) as (model, processor, _),
        ):
            assert model.device.type == device
            said.append(ask.answer(model, processor, [picture], "What is it?", max_new_tokens=8))
    assert said[0] == said[1]


def test_accuracy_there(home, tmp_path):
    made = runs.settings(home, tmp_path, "measured", *FP32, *LORA)
    plans = [train.build(made)[0].schedule.plan(step) for step in range(2)]
    found = []
    for device in ("cpu", "cuda"):
        with pretend_cuda.device():
            recipe = runs.settings(home, tmp_path, f"measured-{device}", *FP32, *LORA, f"run.device={device}")
            model, source = build.build(recipe)
            assert model.device.type == device
            found.append([accuracy.accuracy(model, source, plan, row_budget=100) for plan in plans])
    assert found[0] == found[1]


def test_a_dry_run_there(home, tmp_path):
    made = runs.settings(home, tmp_path, "rehearsed", *FP32, *LORA, "run.device=cuda")
    with pretend_cuda.device():
        _, found = train.dry_run(made)
    assert {entry["mode"] for entry in found} == {"fast", "slow"}
    assert all(entry["memory_mib"] > 0 for entry in found)
    assert not torch.cuda.is_available()
