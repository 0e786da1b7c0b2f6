"""The planner: sizes against transformers' own models, laws of rings and steps, hours against published ones, the
simulation against enumeration, and a README that says what the code says."""

import dataclasses
import json
import math
import re
from itertools import product
from pathlib import Path

import flops_and_times
import numpy as np
import pytest
import straggling
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import published_models
from support.published_models import REAL
from transformers import AutoModelForImageTextToText

from scale.balancing import WINDOW
from scale.planner import hardware, plan
from scale.planner.hardware import GPUS, Sharding
from scale.planner.plan import ShardedModel, jobs
from tinyspeed import UserError
from tinyspeed.bench.estimate import flops
from tinyspeed.data import llava_mix
from tinyspeed.models import lora, memory, stages
from tinyspeed.models.memory import Settings, Shape

README = (Path(__file__).parents[2] / "scale" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def recipe(models):
    """`recipe("1.5-7b", train_batch=64, ...)`: LLaVA's own tuning of all weights, in micro-batches, unless said."""

    def made(name="1.5-7b", **changes):
        tables = {
            "model": {"path": str(models / name)},
            "train": {"epochs": 1.0, "batch": 128, "row_budget": 16384},
        }
        return published_models.recipe(tables, **changes)

    return made


@pytest.mark.parametrize(("rank", "views"), [(0, 1), (16, 1), (16, 2)])
@pytest.mark.parametrize("name", ["1.5-7b", "next-mistral"])
def test_what_is_gathered_and_what_trains_is_the_models_own(name, rank, views):
    config = REAL[name]()
    with torch.device("meta"):
        net = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    net = lora.add_lora(net, rank=rank, views=views == 2) if rank else net
    stages.set_trainable(net, "train")
    sizes = {"layers": 0, "tower": 0, "root": 0}
    trained = 0
    for key, p in net.named_parameters():
        part = "tower" if "vision_tower" in key else "layers" if ".layers." in key else "root"
        sizes[part] += p.numel()
        trained += p.numel() * (p.requires_grad and ".fast." not in key)  # a step moves one view
    model = ShardedModel(Shape(config), Settings(rank=rank, isolator=0, views=views))
    assert model.layer * model.shape.layers == 2 * sizes["layers"]
    assert model.root == 2 * sizes["root"]
    assert model.shape.layers * model.trained[0] + model.trained[1] == trained


def test_a_gpu_of_eight_holds_what_was_worked_out_by_hand():
    model = ShardedModel(Shape(REAL["1.5-7b"]()), Settings())
    of = model.shape.parameters
    llm = sum(of.values()) - of["tower"]
    by_hand = 16 * llm / 8 + 2 * of["tower"]  # weights, gradients and two moments in fp32, of an eighth; and the tower
    gathered = 2 * 2 * of["layers"] / 32 + 2 * (of["embeddings"] + of["head"])
    reducing = 6 * (of["embeddings"] + of["head"] + of["projector"])
    assert model.held(8) == pytest.approx(by_hand + gathered + reducing, rel=0.01)


@given(st.sampled_from([0, 16]), st.sampled_from([1, 2, 4, 8, 16, 512]), st.sampled_from(["align", "train"]))
def test_more_shards_hold_less_and_one_holds_what_one_gpu_does(rank, shards, stage):
    model = ShardedModel(Shape(REAL["1.5-7b"]()), Settings(rank=rank, stage=stage))
    held = lambda n: model.held(n)
    assert held(1) == memory.fixed(model.shape, model.s).total
    if shards > 1:
        assert held(2 * shards) < held(shards)


@given(n=st.integers(1, 12), chunk=st.integers(1, 10**9))
def test_a_ring_takes_as_long_as_passing_chunks_around(n, chunk):
    gpu = dataclasses.replace(GPUS["h100"], nic=1e9)
    held, passing, seconds = [{rank} for rank in range(n)], list(range(n)), 0.0
    while any(len(chunks) < n for chunks in held):
        passing = [passing[rank - 1] for rank in range(n)]  # what each gets from its neighbour
        held = [chunks | {got} for chunks, got in zip(held, passing, strict=True)]
        seconds += chunk / (gpu.link * 1e9 * hardware.LINKS) + hardware.HOP
    assert seconds == pytest.approx(Sharding(gpu, n, n).seconds(n * chunk, 1))


@pytest.mark.parametrize("name", GPUS)
def test_one_gpu_waits_for_no_network_and_one_replica_for_no_other(name):
    assert Sharding(GPUS[name], 1, 1).seconds(10**12, 100) == 0
    assert Sharding(GPUS[name], 8, 8).all_reduce(10**12, 100) == 0
    assert Sharding(GPUS[name], 64, 8).all_reduce(10**9, 1) > 0
    assert Sharding(GPUS[name], 64, 64).seconds(10**9, 1) >= Sharding(GPUS[name], 64, 8).seconds(10**9, 1)


def test_all_ranks_together_do_the_work_of_every_sample(recipe):
    """A window of the assumed samples is all of them, so the mean step's FLOPs are known without dealing."""
    (job,) = jobs(recipe(train_batch=16))
    shape, s = job.model.shape, job.model.s
    assert len(job.samples) == 16 * WINDOW
    for mode, gpus in product(("fast", "slow"), (1, 8)):
        every = sum(flops(shape, s, mode, sample, False) for sample in job.samples)
        most, mean = job.flops(mode, gpus, False)
        assert mean * gpus * WINDOW == pytest.approx(every)
        assert most >= mean * (1 - 1e-12)
    assert job.flops("slow", 1, False)[0] == pytest.approx(job.flops("slow", 1, False)[1])


def test_on_one_gpu_a_step_is_its_arithmetic(recipe):
    (job,) = jobs(recipe(train_batch=8))
    cost = plan.cost(job, Sharding(GPUS["h200"], 1, 1))
    for mode, found in cost.modes.items():
        assert found.step == found.compute == job.flops(mode, 1, found.recompute)[0] / (989e12 * plan.SUSTAINED)
        assert (found.sent, found.network, found.waiting) == (0, 0, pytest.approx(1))
        assert found.peak > memory.fixed(job.model.shape, job.model.s).total


@pytest.mark.parametrize("gpus", [8, 16])
def test_a_step_is_never_shorter_than_its_parts(recipe, gpus):
    (job,) = jobs(recipe(train_batch=32))
    for sharding in hardware.shardings("a100-80", [gpus]):
        cost = plan.cost(job, sharding)
        assert cost.hours == pytest.approx(
            job.steps * (0.9 * cost.modes["fast"].step + 0.1 * cost.modes["slow"].step) / 3600
        )
        assert cost.full_hours > cost.hours
        for found in cost.modes.values():
            assert found.step >= max(found.compute + found.ends, found.network)
            assert found.ends < found.network
            assert (found.between > 0) == (sharding.replicas > 1)
            assert found.waiting >= 1
        assert cost.modes["fast"].compute < cost.modes["full"].compute < cost.modes["slow"].compute
        assert cost.modes["slow"].network / cost.modes["slow"].forwards > (
            cost.modes["full"].network / cost.modes["full"].forwards
        )


def test_ordinary_training_gains_nothing(recipe):
    (job,) = jobs(recipe(train_batch=8, dualspeed_schedule="full"))
    cost = plan.cost(job, Sharding(GPUS["h100"], 8, 8))
    assert set(cost.modes) == {"full"}
    assert cost.hours == cost.full_hours


@pytest.mark.parametrize("schedule", ["full", "fast", "bernoulli"])
def test_steps_that_skip_layers_cost_what_a_model_without_them_costs(recipe, schedule):
    """Of 32 layers 8: steps compute and gather as those of a model with 24. Slow steps run all of them."""
    how = {"train_batch": 16, "dualspeed_schedule": schedule}
    (job,) = jobs(recipe(**how, sts_skip=0.25, sts_every=0))
    (whole,) = jobs(recipe(**how))
    config = REAL["1.5-7b"]()
    config.text_config.num_hidden_layers = 24
    shallow = dataclasses.replace(whole, model=ShardedModel(Shape(config), whole.model.s))
    sharding = Sharding(GPUS["h100"], 16, 8)
    found, less, more = (plan.cost(j, sharding) for j in (job, shallow, whole))
    mine = {"full": "skipping"}.get(schedule, "fast")
    pruned = less.modes["full" if schedule == "full" else "fast"]
    for name in ("compute", "network", "sent", "between", "forwards"):  # up to the norms, which count as the root's
        assert getattr(found.modes[mine], name) == pytest.approx(getattr(pruned, name), rel=1e-4)
    assert found.modes["full"] == dataclasses.replace(more.modes["full"], share=0.0)
    assert found.modes.get("slow") == more.modes.get("slow")
    assert found.peak == more.peak > less.peak  # every layer is there
    assert found.hours < more.hours
    assert found.full_hours == more.full_hours


def test_one_step_in_so_many_runs_all_layers(recipe):
    (job,) = jobs(recipe(train_batch=16, dualspeed_schedule="fast", sts_skip=0.25, sts_every=4))
    some, every, both = (job.flops("fast", 8, False, layers)[1] for layers in (24, 32, job.depth("fast")))
    assert both == pytest.approx(0.75 * some + 0.25 * every)


def test_lora_reduces_adapters_only(recipe):
    whole, lora = (ShardedModel(Shape(REAL["1.5-7b"]()), Settings(rank=rank)) for rank in (0, 16))
    extra = 2 * 2 * sum(a * b for a, b in lora.shape.adapters(16)) * 32  # gathered twice, in half precision
    reduced = 4 * (memory.fixed(whole.shape, whole.s).trainable - memory.fixed(lora.shape, lora.s).trainable)
    assert whole.traffic("full")[0] - lora.traffic("full")[0] == reduced - extra


# What LLaVA's README reports for its own code on 8 A100: hours of tuning and of aligning.
PUBLISHED = {("1.5-7b", "train"): 10, ("1.5-13b", "train"): 20, ("1.5-7b", "align"): 3.5, ("1.5-13b", "align"): 5.5}


@pytest.mark.parametrize(("name", "stage"), PUBLISHED)
def test_full_training_takes_about_the_published_hours(recipe, name, stage):
    changes = {"train_checkpointing": "on", "dualspeed_schedule": "full"}
    if stage == "align":
        changes = {
            "align_epochs": 1.0, "align_batch": 256, "align_row_budget": 16384, "align_checkpointing": "on",
            "train_epochs": 0.0, "data_template": "plain", "dualspeed_schedule": "full",
        }  # fmt: skip
    (job,) = jobs(recipe(name, **changes))
    cost = plan.cost(job, Sharding(GPUS["a100-80"], 8, 8))
    assert cost.hours == pytest.approx(PUBLISHED[name, stage], rel=0.3)
    assert f"| {PUBLISHED[name, stage]:g} | {cost.hours:.1f} |" in README


@given(
    fast=st.lists(st.integers(1, 50), min_size=1, max_size=7), more=st.lists(st.integers(0, 90), min_size=7),
    share=st.floats(0, 1),
)  # fmt: skip
def test_the_expected_longest_rank_is_that_of_all_ways_to_draw(fast, more, share):
    slow = [a + b for a, b in zip(fast, more, strict=False)]
    mean = 0.0
    for draw in product((0, 1), repeat=len(fast)):
        chance = math.prod(share if drawn else 1 - share for drawn in draw)
        mean += chance * max(s if drawn else f for drawn, f, s in zip(draw, fast, slow, strict=True))
    assert straggling.expected_longest(np.array(fast), np.array(slow), share) == pytest.approx(mean)


@pytest.fixture(scope="module")
def waits():
    return [straggling.simulate(ranks) for ranks in (8, 16, 32, 64)]


def test_dealing_by_rows_keeps_its_promise_at_64_ranks(waits):
    found = waits[-1]
    for mode in ("fast", "slow"):
        assert found.uneven["by rows, alike", mode] < 1.05 < found.uneven["by count", mode]
    for drawn in straggling.DRAWN:
        assert found.time[drawn, "by rows, alike"] < found.time[drawn, "by rows"] < found.time[drawn, "by count"]
    for way in straggling.WAYS:
        assert 1 <= found.time["together", way] < found.time["apart", way]


def test_the_readme_has_the_simulations_numbers(waits):
    rows = [line for line in straggling.tables(waits).splitlines() if re.match(r"\| +\d", line)]
    assert len(rows) == 8
    in_readme = [re.sub(r" +", " ", line) for line in README.splitlines()]
    assert [row for row in rows if re.sub(r" +", " ", row) not in in_readme] == []


def test_pictures_and_numbers_are_written(recipe, tmp_path, capsys):
    (tmp_path / "r.toml").write_text(recipe(train_batch=16).to_toml())
    files = [str(tmp_path / "plan.png"), str(tmp_path / "plan.json")]
    argv = [str(tmp_path / "r.toml"), "--gpus", "16,8", "--png", files[0], "--json", files[1], "--samples", "16000"]
    assert plan.main(argv) == 0
    found = json.loads(Path(files[1]).read_text())
    assert [(c["gpus"], c["sharding"]) for c in found] == [(8, "FSDP"), (16, "FSDP"), (16, "HSDP, 2 x 8")]
    assert found[0]["steps"] == 1000
    assert Path(files[0]).stat().st_size > 10_000
    assert not re.search(r"nan|inf\b|None", capsys.readouterr().out)


def test_what_does_not_fit_says_so(recipe, tmp_path, capsys):
    (tmp_path / "r.toml").write_text(recipe("1.5-13b", train_batch=8, train_row_budget=1).to_toml())
    assert plan.main([str(tmp_path / "r.toml"), "--gpus", "8", "--gpu", "4090"]) == 0
    said = capsys.readouterr().out
    assert "! does not fit 24 GiB" in said
    assert re.search(r"\| +\d+\.\d ! \|", said)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--gpu", "h10"], "unknown GPU 'h10'; did you mean 'h100'"),
        (["--gpus", "0"], "at least 1"),
        (["--gpus", "8,x"], "whole numbers"),
        (["--gpus", ""], "whole numbers"),
        (["--gpus", "12"], "multiple"),
        (["--gpus", "64"], "train.batch=64"),
        (["--samples", "0"], "--samples 0"),
        (["--set", "model.precision=fp32", "--gpus", "8"], "half precision"),
        (["--json", "/dev/null/x.json", "--gpus", "8"], "/dev/null"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(recipe, tmp_path, capsys, argv, says):
    (tmp_path / "r.toml").write_text(recipe(train_batch=16).to_toml())
    assert plan.main([str(tmp_path / "r.toml"), *argv]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("family", "longest"), [("1.5", 2048), ("next", 4096)])
def test_the_mix_is_what_is_public_of_it(family, longest):
    samples = llava_mix.mix(20_000, 0, family)
    assert samples == llava_mix.mix(20_000, 0, family, longest)
    assert abs(llava_mix.SAMPLES - 665_298) < 2000
    assert all(0 < answers <= text <= longest - sum(images) for text, images, answers in samples)
    without = [text for text, images, _ in samples if not images]
    assert len(without) / len(samples) == pytest.approx(40_688 / 665_298, rel=0.1)
    assert max(without) == longest
    assert {images[0] for _, images, _ in samples if images} == set(llava_mix.VISUAL[family])
    with pytest.raises(UserError, match="family"):
        llava_mix.mix(1, 0, "1.6")
    with pytest.raises(UserError, match="no room for pictures"):
        llava_mix.mix(1, 0, family, 600)


def test_steps_are_measured_beside_their_flops():
    size = flops_and_times.Size(hidden=64, inner=128, vocab=64, tower=64, pixels=56, samples=1, repeats=1)
    found = flops_and_times.measure(torch.device("cpu"), size, layers=(1, 2))
    assert [(timed.layers, timed.mode) for timed in found] == [
        (n, mode) for n in (1, 2) for mode in flops_and_times.MODES
    ]
    assert found[0].flops < found[2].flops < found[5].flops, "fast, full, and full with two layers"


def test_the_table_of_measured_steps_has_times_beside_flops():
    timed = {(2, "fast"): (1e9, 0.5), (2, "full"): (8e9, 2.0), (6, "fast"): (3e9, 1.0), (6, "full"): (24e9, 5.0)}
    lines = flops_and_times.describe(
        [flops_and_times.Timed(*of, *numbers) for of, numbers in timed.items()]
    ).splitlines()
    cells = [cell.strip() for cell in lines[-1].strip("|").split("|")]
    assert cells == ["6", "full", "24", "5e+03", "8.00x", "5.00x", "3.00x", "2.50x", "4.8"]
