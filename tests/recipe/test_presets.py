"""The recipes for labs: LLaVA's and DualSpeed's published values, and an opening that says what the planner says. In
miniature, the stages of a model one after the other."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import jinja2
import pytest

from scale.balancing import WINDOW, LengthGroupedOrder
from scale.planner import hardware, plan
from tinyspeed import UserError, recipe
from tinyspeed.models import assembling, loading, memory
from tinyspeed.models.memory import GIB, Settings
from tinyspeed.models.published import clip, vicuna

SAMPLES = {"1.5 stage1": 558_128, "1.5 stage2": 665_298, "next stage2": 779_289}
STEPS = {"1.5 stage1": 2_181, "1.5 stage2": 5_198, "next stage2": 6_089}  # LLaVA's own bars show the first two
SCALE = Path(__file__).parents[2] / "scale"
README = (SCALE / "README.md").read_text(encoding="utf-8")
SIZES = ("7b", "13b")
NAMES = sorted(p.stem for p in recipe.BUILT_IN.glob("*-stage?*.toml"))
LORA = [name for name in NAMES if name.endswith("lora")]
ALIGNS = [name for name in NAMES if "stage1" in name]
TUNES = [name for name in NAMES if "stage2" in name]


def kind(name):
    return " ".join(re.search(r"llava-(1\.5|next)-.*(stage\d)", name).groups())


def size(name):
    return re.search(r"-(\d+b)-", name)[1]


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
                changes = [f"model.tower={folder / 'clip'}", f"model.llm={folder / size(name)}"]
            (job,) = plan.jobs(recipe.read(name, changes), SAMPLES[kind(name)])
            found[name, gpu] = plan.cost(job, hardware.Sharding(hardware.GPUS[gpu], 8, 8))
        return found[name, gpu]

    return made


def test_there_is_one_for_each_published_run():
    published = {f"llava-1.5-{size}-{stage}" for size in ("7b", "13b") for stage in ("stage1", "stage2", "stage2-lora")}
    assert set(NAMES) == published | {"llava-next-7b-stage2"}


def test_before_a_model_is_put_together_its_data_cannot_be_read_and_the_published_lengths_count(tmp_path):
    clip().save_pretrained(tmp_path / "clip")
    vicuna(vocab_size=32000).save_pretrained(tmp_path / "llm")
    (tmp_path / "captions.json").write_text("[]")
    where = {"model.tower": "clip", "model.llm": "llm", "data.file": "captions.json"}
    changes = [f"{key}={tmp_path / name}" for key, name in where.items()]
    (job,) = plan.jobs(recipe.read("llava-1.5-7b-stage1", changes))
    assert job.steps == STEPS["1.5 stage1"]
    assert "LLaVA's captions" in job.source


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_has_the_published_steps_and_fits(planned, name):
    for gpu in ("a100-80", "h100"):
        cost = planned(name, gpu)
        assert cost.job.steps == STEPS[kind(name)]
        assert cost.fits
        assert not any(mode.recompute for mode in cost.modes.values() if mode.share)


@pytest.mark.parametrize("name", NAMES)
def test_the_opening_says_what_the_planner_says(planned, name):
    opening = (recipe.BUILT_IN / f"{name}.toml").read_text(encoding="utf-8").split("[run]")[0]
    for box, gpu in (("A100", "a100-80"), ("H100", "h100")):
        cost = planned(name, gpu)
        hours, full = plan._hours(cost.hours), plan._hours(cost.full_hours)
        assert f"# 8 {box} of 80 GB: {cost.peak / GIB:.1f} GiB a GPU, {hours} hours; full training {full}.\n" in opening
    assert f" {SAMPLES[kind(name)]:,} " in opening
    assert f" {STEPS[kind(name)]:,} steps" in opening
    assert f"plan {name} --gpus 8,64 --gpu h100 --samples {SAMPLES[kind(name)]}" in opening
    assert f"torchrun --nproc-per-node 8 -m scale {name}\n" in opening
    assert "not yet measured" in opening


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_published_ones(name):
    made = recipe.read(name)
    d = made.dualspeed
    assert (d.plugin, d.keep, d.isolator, d.positions) == ("divprune", 0.1, 4, "compact")
    assert (d.schedule, d.slow, d.distill, d.temperature) == ("bernoulli", 0.1, 1.0, 1.0)
    ((stage, values),) = made.stages()
    assert (values.epochs, values.warmup, values.weight_decay, values.optimizer) == (1.0, 0.03, 0.0, "adamw")
    assert values.checkpointing == "auto"
    assert (made.run.name, made.data.too_long) == (name, "cut")
    assert made.data.max_rows == (4096 if "next" in name else 2048)
    if name in ALIGNS:
        assert (stage, values.batch, values.lr, values.connector_lr) == ("align", 256, 1e-3, 0.0)
        assert (made.model.tower, made.data.template) == ("openai/clip-vit-large-patch14-336", "plain")
        assert made.model.llm == f"lmsys/vicuna-{size(name)}-v1.5"
        return
    assert (stage, values.batch, made.data.template) == ("train", 128, "chat")
    if name in LORA:
        assert (made.lora.rank, made.lora.alpha, values.lr, values.connector_lr) == (128, 256.0, 2e-4, 2e-5)
    else:
        assert (made.lora.rank, values.lr, values.connector_lr) == (0, 2e-5, 0.0)


@pytest.mark.parametrize("name", [name for name in TUNES if "next" not in name])
def test_stage_2_goes_on_where_stage_1_ends(name):
    first, then = recipe.read(f"llava-1.5-{size(name)}-stage1"), recipe.read(name)
    assert then.model.path == str(first.folder / "model")
    assert then.dualspeed.isolator_from == str(first.folder)
    assert first.data.file.startswith(first.data.images.removesuffix("images"))
    with pytest.raises(UserError, match="no model folder runs/"):
        loading.load_config(then.model.path)


@pytest.mark.parametrize("name", [name for name in TUNES if "next" not in name])
def test_the_prompt_is_llavas_own(name):
    """`conv_vicuna_v1` of LLaVA's conversation.py."""
    part = lambda text: [{"type": "text", "text": text}]
    chat = [
        {"role": "system", "content": part(recipe.read(name).data.system)},
        {"role": "user", "content": [{"type": "image"}, *part("What is it?")]},
        {"role": "assistant", "content": part("A wren.")},
    ]
    assert jinja2.Template(assembling.TEMPLATE).render(messages=chat, eos_token="</s>") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A wren.</s>"
    )


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
    said = [f"{SAMPLES[kind(name)]:,}", f"{STEPS[kind(name)]:,}", f"{a100.peak / GIB:.1f}", *hours]
    assert [cell.strip() for cell in row.split("|")][3:-1] == said


def test_the_readme_says_how_large_checkpoints_are(planned):
    """12 bytes for each weight that trains."""

    def gb(name):
        job = planned(name, "h100").job
        trained = 12e-9 * memory.fixed(job.model.shape, job.model.s).trainable
        return f"{trained:.1f}" if trained < 1 else f"{trained:.0f}"

    small, large = (
        [gb(f"llava-1.5-{size}-{stage}") for stage in ("stage1", "stage2-lora", "stage2")] for size in SIZES
    )
    said = "of the 7B {} GB in stage 1, {} GB with LoRA and {} GB with all weights, of the 13B {}, {} and {} GB."
    assert said.format(*small, *large) in " ".join(README.split())


def test_the_readmes_commands_name_recipes_and_keys_that_exist():
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", " ")
    launched = r"^(?:\w+=\S+ )*(?:tinyspeed estimate|scale/launch/torchrun\.sh|sbatch .*slurm\.sbatch) (\S+)([^#\n]*)"
    commands = re.findall(launched, blocks, flags=re.MULTILINE)
    assert {name for name, _ in commands} >= {"llava-1.5-7b-stage1", "llava-1.5-7b-stage2"}
    in_text = re.findall(r"`(--set\s[^`]+)`", README)
    assert len(in_text) > 5
    for name, changes in commands:
        assert recipe.read(name, re.findall(r"--set (\S+)", changes)).stages()
    for text in in_text:
        changes = re.findall(r"--set\s+(\w+\.\w+=\S*)", text)
        if changes != ["section.key=value"]:
            assert recipe.read(f"llava-1.5-7b-stage{1 if 'model.llm' in text else 2}", changes).stages()


def test_the_readmes_links_lead_somewhere():
    targets = re.findall(r"\]\((?!http)([^)]+)\)", README)
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in README.splitlines()}
    assert targets
    for target in targets:
        assert target[1:] in headings if target.startswith("#") else (SCALE / target).exists(), target
