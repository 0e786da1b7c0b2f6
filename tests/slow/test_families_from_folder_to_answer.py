"""A small checkpoint of each family in the hub's format, and a folder of pictures: trained, killed, resumed, exported
and asked. The oracles are a run that nobody interrupted, and transformers' own loading of what was exported."""

import pytest
import torch
from PIL import Image
from support import processors
from support.album import album
from support.runs import settings, train_through, unlike
from transformers import AutoModelForImageTextToText, AutoProcessor

from tinyspeed import UserError
from tinyspeed.bench import estimate
from tinyspeed.evaluation.ask import answer
from tinyspeed.models.without_torchvision import loading_pictures_alone
from tinyspeed.training import train, trained_model

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl", "mistral3", "smolvlm", "gemma3")


@pytest.fixture(scope="module", params=FAMILIES)
def home(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    processors.checkpoint(request.param, home / "base")
    album(home, records=8)
    return home


def of(home, name: str, *changes: str):
    return settings(home, home / "runs", name, "train.steps=4", "lora.rank=2", *changes, family="base")


def test_a_run_that_was_killed_ends_as_one_that_was_not_and_answers_in_plain_transformers(home, monkeypatch):
    whole, killed = of(home, "whole"), of(home, "killed")
    assert train.train(whole, bar=False).totals.steps == 4
    train_through(monkeypatch, killed, 3)
    assert unlike(killed, whole) == []

    picture, question = Image.open(home / "images" / "p0-0.jpg").convert("RGB"), "What is this?"
    with trained_model.open_model(str(whole.folder), "cpu") as (model, processor, _):
        said = answer(model, processor, [picture], question, max_new_tokens=8)
    folder = whole.folder / "model"
    with loading_pictures_alone():
        theirs = AutoProcessor.from_pretrained(folder)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = theirs.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    begun = bool(theirs.tokenizer.bos_token) and text.startswith(theirs.tokenizer.bos_token)
    batch = theirs(images=[picture], text=text, add_special_tokens=not begun, return_tensors="pt")
    with torch.no_grad():
        plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
        made = plain.generate(**batch, max_new_tokens=8, do_sample=False)
    assert said == theirs.decode(made[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_what_it_needs_is_measured_and_not_estimated(home):
    run = of(home, "tried")
    with pytest.raises(UserError, match=r"is not known beforehand.*--dry-run"):
        estimate.estimate(run)
    assert not estimate.is_possible(run)
    _, measured = train.dry_run(run)
    assert {m["mode"] for m in measured} == {"fast", "slow"}
    assert estimate.compare_measured(None, measured).count("| train | ") == 2
