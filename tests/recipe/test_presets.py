"""The recipes for labs: LLaVA's and DualSpeed's published values, and an opening that says what the planner says. In
miniature, the stages of a model one after the other."""

import re
from pathlib import Path

import jinja2
import pytest
from support import published_recipes
from support.published_recipes import ALIGNS, LORA, NAMES, TUNES

from scale.planner import plan
from tinyspeed import UserError, recipe
from tinyspeed.models import assembling, loading
from tinyspeed.models.published import clip, vicuna

SCALE = Path(__file__).parents[2] / "scale"
README = (SCALE / "README.md").read_text(encoding="utf-8")


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
    assert job.steps == published_recipes.steps("llava-1.5-7b-stage1")
    assert "LLaVA's captions" in job.source


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
        assert made.model.llm == f"lmsys/vicuna-{published_recipes.size(name)}-v1.5"
        return
    assert (stage, values.batch, made.data.template) == ("train", 128, "chat")
    if name in LORA:
        assert (made.lora.rank, made.lora.alpha, values.lr, values.connector_lr) == (128, 256.0, 2e-4, 2e-5)
    else:
        assert (made.lora.rank, values.lr, values.connector_lr) == (0, 2e-5, 0.0)


@pytest.mark.parametrize("name", [name for name in TUNES if "next" not in name])
def test_stage_2_goes_on_where_stage_1_ends(name):
    first, then = recipe.read(f"llava-1.5-{published_recipes.size(name)}-stage1"), recipe.read(name)
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
