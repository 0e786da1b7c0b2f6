"""The planner's numbers in the recipes and in scale/README.md are those that it computes."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
from support import published_recipes
from support.published_recipes import ALIGNS, LORA, NAMES, TUNES

from scale.balancing import WINDOW, LengthGroupedOrder
from scale.planner import hardware, plan
from tinyspeed import recipe
from tinyspeed.models import memory
from tinyspeed.models.memory import GIB, Settings
from tinyspeed.models.published import clip, vicuna

README = (Path(__file__).parents[2] / "scale" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def planned(models, tmp_path_factory):
    """`planned(name, gpu)`: what the planner says of 8 GPUs. Models are configurations without weights."""
    folder, found = tmp_path_factory.mktemp("parts"), {}
    clip().save_pretrained(folder / "clip")
    vicuna(vocab_size=32000).save_pretrained(folder / "7b")
    vicuna(5120, 13824, 40, 40, vocab_size=32000).save_pretrained(folder / "13b")

    def made(name, gpu):
        if (name, gpu) not in found:
            changes = [f"model.path={models / name.split('-stage')[0].removeprefix('llava-')}"]
            if name in ALIGNS:
                changes = [f"model.tower={folder / 'clip'}", f"model.llm={folder / published_recipes.size(name)}"]
            (job,) = plan.jobs(recipe.read(name, changes), published_recipes.samples(name))
            found[name, gpu] = plan.cost(job, hardware.Sharding(hardware.GPUS[gpu], 8, 8))
        return found[name, gpu]

    return made


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_has_the_published_steps_and_fits(planned, name):
    for gpu in ("a100-80", "h100"):
        cost = planned(name, gpu)
        assert cost.job.steps == published_recipes.steps(name)
        assert cost.fits
        assert not any(mode.recompute for mode in cost.modes.values() if mode.share)


@pytest.mark.parametrize("name", NAMES)
def test_the_opening_says_what_the_planner_says(planned, name):
    opening = (recipe.BUILT_IN / f"{name}.toml").read_text(encoding="utf-8").split("[run]")[0]
    for box, gpu in (("A100", "a100-80"), ("H100", "h100")):
        cost = planned(name, gpu)
        hours, full = plan._hours(cost.hours), plan._hours(cost.full_hours)
        assert f"# 8 {box} of 80 GB: {cost.peak / GIB:.1f} GiB a GPU, {hours} hours; full training {full}.\n" in opening
    assert f" {published_recipes.samples(name):,} " in opening
    assert f" {published_recipes.steps(name):,} steps" in opening
    assert f"plan {name} --gpus 8,64 --gpu h100 --samples {published_recipes.samples(name)}" in opening
    assert f"torchrun --nproc-per-node 8 -m scale {name}\n" in opening
    assert "not yet measured" in opening


@pytest.mark.parametrize("name", [name for name in TUNES if name not in LORA])
def test_a_checkpoint_is_as_large_as_the_recipe_says(planned, name):
    model = planned(name, "h100").job.model
    trained = memory.fixed(model.shape, Settings.of(recipe.read(name), "train", "bf16")).trainable
    text = (recipe.BUILT_IN / f"{name}.toml").read_text(encoding="utf-8")
    assert int(re.search(r"# (\d+) GB each: weights and two moments in fp32", text)[1]) == round(12 * trained / 1e9)


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_made_alike_where_ranks_would_wait_for_each_other(planned, name, monkeypatch):
    """A picture and its caption are like any other; instructions are not."""
    cost = planned(name, "a100-80")
    monkeypatch.setattr(plan, "LengthGroupedOrder", partial(LengthGroupedOrder, window=1))
    drawn = plan.cost(dataclasses.replace(cost.job), cost.sharding)
    waiting = 1 - 1 / drawn.waiting
    window = recipe.read(name).scale.window
    if name in ALIGNS:
        assert window == 1
        assert waiting < 0.01
    else:
        text = (recipe.BUILT_IN / f"{name}.toml").read_text(encoding="utf-8")
        assert window == WINDOW
        assert f"or 8 GPUs would wait {waiting:.0%}".replace("%", " %") in text
        assert 1 - 1 / cost.waiting < 0.05 < waiting


@pytest.mark.parametrize("name", NAMES)
def test_the_readmes_table_says_what_the_planner_says(planned, name):
    row = next(
        line for line in README.splitlines() if line.startswith(f"| [{name}](../tinyspeed/recipe/presets/{name}.toml)")
    )
    a100, h100 = planned(name, "a100-80"), planned(name, "h100")
    hours = [f"{plan._hours(cost.hours)}, {plan._hours(cost.full_hours)}" for cost in (a100, h100)]
    assert a100.peak == h100.peak
    said = [
        f"{published_recipes.samples(name):,}",
        f"{published_recipes.steps(name):,}",
        f"{a100.peak / GIB:.1f}",
        *hours,
    ]
    assert [cell.strip() for cell in row.split("|")][3:-1] == said


def test_the_readme_says_how_large_checkpoints_are(planned):
    """12 bytes for each weight that trains."""

    def gb(name):
        job = planned(name, "h100").job
        trained = 12e-9 * memory.fixed(job.model.shape, job.model.s).trainable
        return f"{trained:.1f}" if trained < 1 else f"{trained:.0f}"

    small, large = (
        [gb(f"llava-1.5-{size}-{stage}") for stage in ("stage1", "stage2-lora", "stage2")] for size in ("7b", "13b")
    )
    said = "of the 7B {} GB in stage 1, {} GB with LoRA and {} GB with all weights, of the 13B {}, {} and {} GB."
    assert said.format(*small, *large) in " ".join(README.split())


def test_the_readme_has_the_planners_numbers(models, capsys):
    commands = re.findall(r"^python -m scale plan (.*?)(?<!\\)$", README, flags=re.MULTILINE | re.DOTALL)
    assert commands
    for command in commands:
        name = "next-mistral" if "next" in command else "1.5-7b"
        argv = [*command.replace("\\\n", " ").split(), "--set", f"model.path={models / name}"]
        assert plan.main(argv) == 0
        table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
        assert len(table) > 3
        assert "\n".join(table) in README
