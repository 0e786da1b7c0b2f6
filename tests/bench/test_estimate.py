"""Estimates: laws, advice that holds when it is followed, FLOPs against torch's counter, and text that makes sense."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import published_models, tiny
from support.album import album
from support.memory_models import ANSWERS, TEXT, batch_of, small
from support.published_models import REAL
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from tinyspeed import DualSpeed, UserError
from tinyspeed.bench.estimate import GRAIN, changed, compare_measured, describe, estimate, flops
from tinyspeed.models import lora, stages
from tinyspeed.models.memory import GIB, RESERVE, Settings, Shape
from tinyspeed.models.published import clip, vicuna
from tinyspeed.recipe import from_tables, read
from tinyspeed.scheduler import Plan


@pytest.fixture(scope="module")
def recipe(models):
    """`recipe("1.5-7b", train_batch=8, ...)`: QLoRA of rank 16 unless something else is said."""

    def made(name="1.5-7b", **changes):
        tables = {
            "model": {"path": str(models / name), "quantise": "nf4"},
            "lora": {"rank": 16},
            "train": {"epochs": 1.0, "batch": 32, "row_budget": 2048},
        }
        return published_models.recipe(tables, **changes)

    return made


@pytest.mark.parametrize(
    ("name", "rows", "fixed", "peak"),
    [("1.5-7b", 676, 5.1, 5.4), ("next-7b", 2900, 5.1, 6.4), ("1.5-13b", 676, 8.7, 9.1), ("next-13b", 2900, 8.7, 10.5)],
)
def test_qlora_of_real_models_is_what_was_worked_out_by_hand(recipe, name, rows, fixed, peak):
    found = estimate(recipe(name, data_max_rows=rows, train_row_budget=1, train_checkpointing="on"), 24)
    modes = found.case.worst_batches(found.recipe)
    assert modes["train", "slow"].rows == rows
    assert found.peak / GIB == pytest.approx(peak, rel=0.08)
    assert (found.peak - fixed * GIB) / GIB < 2.5


budgets = st.sampled_from([64, 512, 1024, 2048, 8192, 0])


@given(budgets, budgets, st.sampled_from(["1.5-7b", "next-7b"]), st.sampled_from(["on", "off"]))
def test_larger_micro_batches_more_bits_and_no_recomputing_never_need_less(recipe, one, other, name, checkpointing):
    less, more = sorted((one, other), key=lambda budget: budget or 10**9)
    found = estimate(recipe(name, train_row_budget=less, train_checkpointing=checkpointing))

    def peak(**changes) -> int:
        changes = {key.replace("_", ".", 1): value for key, value in changes.items()}
        return max(mode.peak for mode in found.case.worst_batches(changed(found.recipe, changes)).values())

    assert found.peak == peak()
    assert peak(train_optimizer="paged_adamw8bit") <= peak() <= peak(train_row_budget=more)
    assert peak(dualspeed_schedule="fast") <= peak() <= peak(train_checkpointing="off")
    assert peak() < peak(model_quantise="none")
    assert peak() < peak(lora_rank=32)


gpus = st.sampled_from([6, 8, 10, 12, 16, 24, 40, 80, 160])
recipes = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["1.5-7b", "next-7b", "1.5-13b", "next-mistral"]),
        "model_quantise": st.sampled_from(["none", "nf4"]),
        "lora_rank": st.sampled_from([8, 16, 128]),
        "train_row_budget": st.sampled_from([0, 700, 4096]),
        "train_checkpointing": st.sampled_from(["auto", "on", "off"]),
        "train_optimizer": st.sampled_from(["adamw", "paged_adamw8bit"]),
        "align_steps": st.sampled_from([0, 10]),
    }
)


def again(found, *changes):
    """Estimated once more, with changes: whether it fits, and how many modes recompute."""
    recipe = changed(found.recipe, *changes)
    return not found.case.too_large(recipe), sum(mode.recompute for mode in found.case.worst_batches(recipe).values())


@given(recipes, gpus)
def test_advice_helps_when_it_is_followed(recipe, how, gpu):
    found = estimate(recipe(**how), gpu)
    assert (found.peak + RESERVE <= gpu * GIB) == (found.changes == {})
    for advice in (found.changes or {}, found.room):
        fits, recomputing = again(found, advice)
        assert fits or not advice
        for key, value in advice.items():
            if "row_budget" in key:  # a larger one does not fit, or recomputes more, or holds the whole batch
                larger = again(found, advice, {key: value + GRAIN})
                whole = value >= getattr(found.recipe, key.split(".")[0]).batch * longest(found)
                assert not larger[0] or larger[1] > recomputing or whole


def longest(found) -> int:
    return max(text + sum(images) for text, images, _ in found.case.samples)


def test_no_advice_says_more_than_is_needed(recipe):
    found = estimate(recipe(model_quantise="none", lora_rank=64, train_row_budget=0, train_checkpointing="off"), 24)
    assert found.changes
    for key in found.changes:
        fewer = {other: value for other, value in found.changes.items() if other != key}
        assert not again(found, fewer)[0]


def test_the_next_larger_row_budget_does_not_fit(recipe):
    found = estimate(recipe("next-7b", train_checkpointing="on", train_row_budget=64, train_batch=512), 12)
    budget = found.room["train.row_budget"]
    rows = found.case.worst_batches(found.recipe)["train", "slow"].rows
    assert again(found, {"train.row_budget": budget})[0]
    assert not again(found, {"train.row_budget": (budget // rows + 1) * rows})[0]


def test_what_helps_most_harmlessly_is_said_first(recipe):
    too_large = recipe(train_row_budget=0, train_batch=128, train_checkpointing="on")
    assert set(estimate(too_large, 12).changes) == {"train.row_budget"}
    off = recipe(train_row_budget=1, train_checkpointing="off")
    assert estimate(off, 7).changes == {"train.checkpointing": "on"}
    half = recipe(model_quantise="none")
    assert estimate(half, 12).changes == {"model.quantise": "nf4"}
    assert estimate(recipe(lora_rank=0, model_quantise="none"), 24).changes == {
        "lora.rank": 16,
        "model.quantise": "nf4",
    }
    assert estimate(half, 4).changes is None


def test_a_long_text_is_cut_before_giving_up(recipe, monkeypatch):
    base = recipe("1.5-13b", train_row_budget=64)
    found = estimate(base, 12)
    case = dataclasses.replace(found.case, samples=[(12_000, [576], 60)])
    monkeypatch.setattr("tinyspeed.bench.estimate.Case", lambda *_: case)
    found = estimate(base, 12)
    assert found.changes["data.too_long"] == "cut"
    assert 576 < found.changes["data.max_rows"] < 12_000
    assert again(found, found.changes)[0]


def halved(q, k, v, dropout=0.0, causal=False, *_, out_shape=None, **__):
    batch, heads, rows, width = q
    return 4 * batch * heads * rows * k[2] * width * (0.5 if causal else 1)


def halved_backward(grad, q, k, v, out, lse, dropout, causal, *_, out_shape=None, **__):
    return 2.5 * halved(q, k, v, dropout, causal)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: halved,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: halved_backward,
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["full", "fast", "slow"])
@pytest.mark.parametrize(
    ("family", "rank", "stage"),
    [("llava", 0, "train"), ("llava", 16, "train"), ("llava_next", 16, "train"), ("llava_next", 0, "align")],
)
def test_flops_are_those_that_torch_counts(family, rank, stage, mode, recompute):
    config = small(family, hidden=128, layers=3)
    net = AutoModelForImageTextToText.from_config(config)
    model = DualSpeed(lora.add_lora(net, rank=rank) if rank else net)
    stages.set_trainable(model.model, stage)
    model.train().activation_checkpointing_enable()
    model.vlm.recompute(recompute)
    batch, visual = batch_of(config, 1)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        model(**batch, plan=Plan(mode, keep=0.1, distill=float(mode == "slow"))).loss.backward()
    s = Settings("fp32", rank=rank, stage=stage)
    said = flops(Shape(config), s, mode, (TEXT, [visual], ANSWERS), recompute)
    assert said == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_pruning_saves_what_the_rows_say(recipe):
    _, full, ours = estimate(recipe()).work("train")
    assert 2.5 < full / ours < 4
    _, full, ours = estimate(recipe("next-7b")).work("train")
    assert 4 < full / ours < 7
    _, full, ours = estimate(recipe(dualspeed_schedule="full")).work("train")
    assert full == ours


def test_lengths_come_from_the_data_where_it_is_there(tmp_path):
    model = tiny.checkpoint("llava", tmp_path / "model")
    tables = {
        "model": {"path": str(model)},
        "data": {"kind": "chat", "file": album(tmp_path), "images": str(tmp_path / "images"), "workers": 0},
        "run": {"cache": str(tmp_path / "cache")},
        "train": {"epochs": 2.0, "batch": 4},
    }
    found = estimate(from_tables(tables, "the test"))
    assert (len(found.case.samples), found.case.epoch) == (12, 12)
    assert found.case.worst_batches(found.recipe)["train", "slow"].rows == 4 * longest(found)
    assert found.work("train")[0] == 24
    assert "12 samples of" in describe(found)


def test_a_model_from_parts(tmp_path, models):
    clip().save_pretrained(tmp_path / "clip")
    vicuna(vocab_size=32000).save_pretrained(tmp_path / "vicuna")
    tables = {
        "model": {"tower": str(tmp_path / "clip"), "llm": str(tmp_path / "vicuna")},
        "data": {"kind": "chat", "file": "x.json"},
        "align": {"epochs": 1.0},
    }
    found = estimate(from_tables(tables, "the test"), 24)
    assert found.case.shape.parameters == Shape(REAL["1.5-7b"]()).parameters
    tables["model"]["tower"] = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        estimate(from_tables(tables, "the test"))


@pytest.mark.parametrize("gpu", [None, 4, 8, 12, 24, 200])
@pytest.mark.parametrize("name", ["1.5-7b", "next-13b", "digits"])
def test_what_is_printed_makes_sense(recipe, name, gpu):
    chosen = read("digits") if name == "digits" else recipe(name, align_epochs=1.0)
    text = describe(estimate(chosen, gpu))
    assert not re.search(r"nan|inf\b|None|-\d|\{|e\+", text.split("\n", 1)[1])
    assert all(len(line) < 200 for line in text.splitlines())
    for stage, _ in chosen.stages():
        assert re.search(rf"^\| {stage} ", text, flags=re.MULTILINE)
    for unit in ("iB", "FLOP", "TFLOP/s"):
        assert unit in text
    assert ("A GPU would need" in text) == (gpu is None)


def test_flags_can_be_given_to_a_recipe(tmp_path, recipe):
    found = estimate(recipe("next-13b", model_quantise="none", train_row_budget=0), 16)
    file = tmp_path / "recipe.toml"
    file.write_text(found.recipe.to_toml())
    mended = read(str(file), re.findall(r"--set (\S+)", describe(found)))
    assert mended == changed(found.recipe, found.changes)
    assert estimate(mended, 16).changes == {}


def test_measured_beside_estimated(recipe):
    found = estimate(recipe(train_row_budget=700), 12)
    slow = found.case.worst_batches(found.recipe)["train", "slow"]
    measured = {"stage": "train", "mode": "slow", "samples": 1, "rows": 676, "memory_mib": slow.peak / 2**20 / 1.1}
    text = compare_measured(found, [measured, {**measured, "mode": "fast", "memory_mib": None}])
    assert re.search(r"\| train \| slow \| +676 \| .* \| +\+10 \|", text)
    assert "whole process" not in text


def test_a_whole_process_on_a_cpu_is_not_compared_with_the_estimate_for_a_gpu(recipe):
    text = compare_measured(estimate(recipe()), [{"stage": "train", "mode": "slow", "samples": 1, "memory_mib": 870.0}])
    assert "whole process" in text
    assert re.search(r"\| train \| slow \| +676 \| +0\.85 \| +\d+\.\d\d \| +\|", text)


@pytest.mark.parametrize(("gpu", "tflops"), [(0, None), (-3, None), (float("inf"), None), (12, 0)])
def test_impossible_hardware_is_an_error(recipe, gpu, tflops):
    with pytest.raises(UserError, match="must be above 0"):
        estimate(recipe(), gpu, tflops)


def test_what_regate_saves_is_not_promised(recipe):
    """It depends on samples seen before. Memory is that of the steps that see all answers, whatever others skip."""
    plain, skipping = (estimate(recipe(**changes), 12) for changes in ({}, {"regate_keep": 0.5}))
    assert (plain.peak, plain.work("train")) == (skipping.peak, skipping.work("train"))
    assert [describe(found).count("ReGATE") for found in (plain, skipping)] == [0, 1]
