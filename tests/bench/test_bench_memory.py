"""Measured peaks are worth what the example, the weights and the processes are worth that they are measured with."""

import json
import math
import os
import re
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from support.published_models import REAL
from transformers import LlavaNextImageProcessor, LlavaNextProcessor

from tinyspeed import UserError, cli, recipe
from tinyspeed.bench import memory as bench_memory
from tinyspeed.bench import random_examples
from tinyspeed.bench.estimate import estimate
from tinyspeed.models import loading, memory
from tinyspeed.models.memory import GIB
from tinyspeed.models.published import GRIDS
from tinyspeed.rows import IGNORE
from tinyspeed.training.loop import StageRun

QLORA = "llava-1.5-7b-qlora-12gb"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Folders with the configurations of tiny models, and no weights."""
    folder = tmp_path_factory.mktemp("shapes")
    for family in (*tiny.FAMILIES, "llava_onevision"):
        tiny.config(family).save_pretrained(folder / family)
    return folder


@pytest.fixture
def here(monkeypatch, tmp_path):
    """No processes of their own, which take seconds to begin; and temporary folders in `here`."""
    monkeypatch.setattr(bench_memory, "_in_a_process", lambda task, *arguments: task(*arguments))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


def tiny_recipe(path, *changes):
    sizes = ["train.row_budget=400", "train.batch=4", "run.device=cpu"]
    return recipe.read(QLORA, [f"model.path={path}", *sizes, *changes])


# The example


class Counts:
    """transformers' own count, for the true pinpoints."""

    of = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, image_grid_pinpoints=GRIDS
        ),
        tokenizer=tiny.tokenizer(), patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip

    @classmethod
    def rows(cls, height, width):
        return cls.of._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0]


sides = st.integers(30, 2000)


@given(sides, sides)
def test_visual_rows_are_the_processors(height, width):
    assert random_examples.visual_rows(REAL["next-7b"](), height, width) == Counts.rows(height, width)
    assert random_examples.visual_rows(REAL["1.5-7b"](), height, width) == 576


@given(st.integers(900, 4096), sides, sides)
def test_no_other_picture_is_nearer_to_what_is_assumed(most, height, width):
    """And text makes up for the rest."""
    config, chosen = REAL["next-7b"](), tiny_recipe("somebody/model", f"data.max_rows={most}")
    found = bench_memory.longest_example(chosen, config)
    text, (rows,), answers = found.lengths(0)
    assert rows == Counts.rows(*found.sizes[0])
    assert text >= 100
    assert text + rows == min(most, 100 + 2928)
    assert answers == 60
    other = Counts.rows(height, width)
    assert other <= rows or other > min(most - 100, 2928)


@pytest.mark.parametrize(("name", "sample"), [("1.5-7b", (100, [576], 60)), ("next-mistral", (100, [2928], 60))])
def test_where_there_is_such_a_picture_it_is_what_estimate_assumes(name, sample):
    chosen = tiny_recipe("somebody/model", "data.max_rows=4096")
    assert bench_memory.longest_example(chosen, REAL[name]()).lengths(0) == sample


@pytest.mark.parametrize("name", sorted(p.stem for p in recipe.BUILT_IN.glob("llava-*gb*.toml")))
def test_what_is_measured_of_a_recipe_is_the_peak_that_it_names(name):
    chosen = recipe.read(name)
    found = estimate(chosen, 24)
    assert [
        bench_memory.longest_example(chosen, loading.load_config(chosen.model.path)).lengths(0)
    ] == found.case.samples


@pytest.mark.parametrize("name", ["1.5-7b", "next-7b"])
def test_the_example_is_as_long_as_it_says(name):
    config = REAL[name]()
    source = bench_memory.longest_example(tiny_recipe("somebody/model", "data.max_rows=2900"), config)
    (text, (rows,), answers), example = source.lengths(0), source.example(0)
    pictured = example.input_ids == config.image_token_id
    assert (int(pictured.sum()), int((~pictured).sum())) == (rows, text)
    assert int((example.labels[1:] != IGNORE).sum()) == answers
    assert not (example.labels[pictured] != IGNORE).any()
    assert example.visual["pixel_values"].shape[-3:] == (3, 336, 336)
    if name == "next-7b":
        assert example.visual["pixel_values"].shape[:2] == (1, 5), "a grid of two by two, and the whole"
        assert random_examples.visual_rows(config, *example.visual["image_sizes"][0].tolist()) == rows


# The measuring


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_written_is_what_was_measured(family, shapes, here, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tinyspeed.util.provenance.peak_memory_mib", lambda device: 512.0)
    out = tmp_path / "deep" / "memory.json"
    words = ["model.path=" + str(shapes / family), "train.row_budget=400", "train.batch=4", "lora.rank=16"]
    words += ["align.steps=1", "align.batch=2", "run.device=cpu"]
    command = ["bench", "memory", QLORA, "--out", str(out)]
    assert cli.main([*command, *(word for value in words for word in ("--set", value))]) == 0
    result = json.loads(out.read_text())
    assert result["bench"] == "memory"
    assert {"command", "commit", "cores", "device", "versions"} <= result.keys()
    (found,) = result["recipes"]
    assert (found["recipe"], found["path"], found["error"]) == (QLORA, str(shapes / family), None)
    assert (found["precision"], found["quantise"], found["rank"]) == ("fp32", "nf4", 16)
    assert (found["gpu_gib"], found["outside_gib"], result["held_to_gib"]) == (None, None, None)
    rows = sum(tiny.image_rows(family, found["picture"]))
    assert (found["text"], found["visual"], found["answers"]) == (100, [rows], 60)
    modes = {(m["stage"], m["mode"]): m for m in found["modes"]}
    assert list(modes) == [("align", "fast"), ("train", "fast"), ("train", "slow")]
    slow = modes["train", "slow"]
    assert slow["samples"] == 400 // (100 + rows)
    assert slow["rows"] == slow["samples"] * (100 + rows)
    printed = capsys.readouterr().out
    for (stage, mode), m in modes.items():
        assert m["measured_gib"] == 0.5
        assert math.isfinite(m["seconds"])
        assert m["reserved_gib"] is None
        assert m["recompute"] is m["estimated_recompute"] is False
        assert m["off_percent"] is None, "a whole process is not compared with a GPU"
        assert re.search(rf"\| {stage} +\| {mode} .* \| +0\.50 \| +{m['estimated_gib']:.2f} \| +\| ", printed)
    assert "whole process" in printed
    assert not list(here.iterdir()), "the weights are gone"


def test_estimates_are_those_of_the_same_micro_batches(shapes, here):
    """Written out: `estimate` of the shape, with the samples that were in the measured micro-batch."""
    chosen = tiny_recipe(shapes / "llava_next")
    found = bench_memory.run({"mine": chosen})["recipes"][0]
    s, shape = memory.Settings.of(chosen, "train", "fp32"), memory.Shape(tiny.config("llava_next"))
    for m in found["modes"]:
        batch = memory.MicroBatch.of(m["mode"], found["text"], found["visual"], found["answers"], s, m["samples"])
        assert batch.rows == m["rows"]
        want = memory.fixed(shape, s).total + memory.Step(shape, s, batch, recompute=False).peak
        assert m["estimated_gib"] * GIB == pytest.approx(want)


def test_weights_are_as_the_hub_has_them(shapes, tmp_path):
    bench_memory.write_random_weights(str(shapes / "llava"), str(tmp_path / "drawn"), "cpu")
    model = loading.load_model(str(tmp_path / "drawn"), "bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.nbytes for p in model.parameters()) == bench_memory._bytes(str(shapes / "llava"))
    assert all(p.isfinite().all() for p in model.parameters())
    assert 0 < model.lm_head.weight.float().std() < 0.1


def test_the_last_micro_batch_is_beside_moments_and_gradients(shapes, tmp_path, monkeypatch):
    """Of every mode, the first one too."""
    beside, micro_batch = [], StageRun._micro_batch

    def watched(run, *arguments):
        beside.append((bool(run.optimizer.state), any(p.grad is not None for p in run.names)))
        return micro_batch(run, *arguments)

    monkeypatch.setattr(StageRun, "_micro_batch", watched)
    bench_memory.write_random_weights(str(shapes / "llava"), str(tmp_path / "drawn"), "cpu")
    found = bench_memory.measure(tiny_recipe(shapes / "llava"), str(tmp_path / "drawn"), None)
    assert [m["mode"] for m in found["modes"]] == ["fast", "slow"]
    assert beside == 2 * [(True, False), (True, True)]


def test_one_that_fails_costs_no_other_its_numbers(shapes, here, tmp_path, monkeypatch):
    fails, fits = tiny_recipe(shapes / "llava", "train.lr=0.5"), tiny_recipe(shapes / "llava")
    micro_batch = StageRun._micro_batch

    def full(run, batch, rows, plan, answers):
        if run.stage.lr == 0.5 and plan.mode == "slow":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return micro_batch(run, batch, rows, plan, answers)

    monkeypatch.setattr(StageRun, "_micro_batch", full)
    out = tmp_path / "memory.json"
    with pytest.raises(UserError, match=r"^fails: .* slow micro-batch of .* does not fit"):
        bench_memory.run({"fails": fails, "fits": fits}, out=out)
    first, second = json.loads(out.read_text())["recipes"]
    assert [m["mode"] for m in first["modes"]] == ["fast"]
    assert [m["mode"] for m in second["modes"]] == ["fast", "slow"]
    assert second["error"] is None


def test_each_recipe_has_a_process_of_its_own():
    first, second = bench_memory._in_a_process(os.getpid), bench_memory._in_a_process(os.getpid)
    assert len({first, second, os.getpid()}) == 3
    with pytest.raises(UserError, match="lack of memory"):
        bench_memory._in_a_process(os._exit, 9)


class Gpu:
    """12 GiB, of which half a GiB is CUDA's own; 3 are reserved."""

    def __init__(self, monkeypatch):
        self.fraction = None
        monkeypatch.setattr(bench_memory.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(bench_memory.cuda, "mem_get_info", lambda device: (int(8.5 * GIB), 12 * GIB))
        monkeypatch.setattr(bench_memory.cuda, "memory_reserved", lambda device: 3 * GIB)
        monkeypatch.setattr(bench_memory.cuda, "set_per_process_memory_fraction", self.hold)

    def hold(self, fraction, index):
        self.fraction = fraction


def test_a_gpu_is_held_to_what_a_smaller_one_leaves(monkeypatch):
    gpu, device = Gpu(monkeypatch), torch.device("cuda", 0)
    assert bench_memory._limit(device, None) == (12, 0.5)
    assert gpu.fraction is None
    assert bench_memory._limit(device, 8) == (8, 0.5)
    assert gpu.fraction * 12 == pytest.approx(7.5)
    with pytest.raises(UserError, match=r"this one has 12\.0 GiB"):
        bench_memory._limit(device, 13)


def test_mistakes_are_named(shapes, here, monkeypatch):
    good = tiny_recipe(shapes / "llava")
    with pytest.raises(UserError, match="must be above 0"):
        bench_memory.run({"good": good}, gpu=0)
    with pytest.raises(UserError, match=r"digits: .* model\.path"):
        bench_memory.run({"digits": recipe.read("digits")})
    with pytest.raises(UserError, match="not llava_onevision"):
        bench_memory.run({"one": tiny_recipe(shapes / "llava_onevision")})
    with pytest.raises(UserError, match=r"no picture has 5 rows or fewer; data.max_rows = 105"):
        bench_memory.run({"short": tiny_recipe(shapes / "llava", "data.max_rows=105")})
    with pytest.raises(UserError, match="--gpu: there is no GPU"):
        bench_memory.run({"good": good}, gpu=8)
    monkeypatch.setattr(bench_memory.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(UserError, match=r"need 13.8 GiB of disk, .* has 9.0 GiB free: set TMPDIR"):
        bench_memory.run({"large": recipe.read(QLORA)})


class Usage:
    free = 9 * GIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bench_memory_on_a_gpu(shapes, tmp_path):
    chosen = recipe.read(QLORA, [f"model.path={shapes / 'llava_next'}", "train.row_budget=400", "train.batch=4"])
    result = bench_memory.run({"mine": chosen}, gpu=4, out=tmp_path / "memory.json")
    found = result["recipes"][0]
    assert found["gpu_gib"] == 4
    for m in found["modes"]:
        assert 0 < m["measured_gib"] <= m["reserved_gib"] < 4
    assert result["device"] == torch.cuda.get_device_name()
