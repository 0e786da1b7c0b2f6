"""Whole runs and what they find on disk when they go on: a base model may move but not change, and damaged features are
made anew."""

import json
import shutil

import pytest
from support.runs import flip, settings, train_until, unlike

from tinyspeed import UserError, recipe
from tinyspeed.training import train
from tinyspeed.training.loop import StageRun
from tinyspeed.training.trained_model import export
from tinyspeed.util import files

OTHER = "not the one that the run began with"


def test_a_base_that_was_moved_while_a_run_stood_still_changes_nothing(home, tmp_path):
    whole = settings(home, tmp_path, "whole", "lora.rank=2")
    train.train(whole, bar=False)
    shutil.copytree(home / "llava", tmp_path / "base")
    made = settings(home, tmp_path, "run", "lora.rank=2", f"model.path={tmp_path / 'base'}")
    train_until(made, 3)
    (tmp_path / "base").rename(tmp_path / "moved")
    file = made.folder / "recipe.toml"
    file.write_text(file.read_text().replace(str(tmp_path / "base"), str(tmp_path / "moved")))
    train.train(recipe.of_run(str(made.folder)), resume=True, bar=False)
    assert not unlike(made, whole)


def test_a_base_that_changes_during_the_run_is_not_exported(home, tmp_path, monkeypatch):
    shutil.copytree(home / "llava", tmp_path / "base")
    made = settings(home, tmp_path, "run", "lora.rank=2", "align.steps=1", f"model.path={tmp_path / 'base'}")
    original = StageRun.go

    def go(run, *given):
        if run.name == "align":
            flip(tmp_path / "base" / "model.safetensors", -2)
        original(run, *given)

    monkeypatch.setattr(StageRun, "go", go)
    with pytest.raises(UserError, match=rf"{OTHER}: model\.safetensors"):
        train.train(made, bar=False)
    assert not (made.folder / "model").exists()


def test_a_base_of_the_runs_own_is_held_to_the_same(tmp_path):
    """Its manifest would fit another one that was built in the same way, say by another version of torch."""
    small = ("digits.width=32", "digits.layers=2", "digits.tower_width=16", "digits.tower_layers=1", "align.steps=0")
    small += ("digits.tower_steps=1", f"run.folder={tmp_path}", "train.steps=3", "run.save_every=1", "train.batch=2")
    made = recipe.read("digits", [*small, "run.device=cpu", "run.threads=1", "run.name=run"])
    train_until(made, 2)
    weights, manifest = (made.folder / "base" / name for name in ("model.safetensors", "digits.json"))
    flip(weights, -2)
    said = json.loads(manifest.read_text())
    said["files"][weights.name] = [*files.fingerprint(weights)]
    manifest.write_text(json.dumps(said))
    for use in (lambda: train.train(made, resume=True, bar=False), lambda: export(made, tmp_path / "out")):
        with pytest.raises(UserError, match=rf"{OTHER}: model\.safetensors of {weights.parent} "):
            use()


def test_features_that_were_damaged_while_a_run_stood_still_change_nothing(home, tmp_path, capsys):
    def how(name):
        return (f"run.cache={tmp_path}/{name}-cache", "data.feature_cache_gb=0.1", "lora.rank=4")

    whole, made = (settings(home, tmp_path, name, *how(name)) for name in ("whole", "run"))
    train.train(whole, bar=False)
    train_until(made, 3)
    one, two, three, *_ = sorted((tmp_path / "run-cache" / "features").rglob("*.safetensors"))
    flip(one, -6)
    kept = two.read_bytes()
    two.write_bytes(three.read_bytes())
    three.write_bytes(kept)
    train.train(made, resume=True, bar=False)
    assert not unlike(made, whole)
    assert "features of 3 pictures" in capsys.readouterr().err
