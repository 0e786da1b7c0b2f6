"""What training sees of a conversation is what the family's own processor makes of it, for every family."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support import processors, zoo

from tinyspeed import UserError
from tinyspeed.data.chat import Chat
from tinyspeed.data.conversations import Conversations
from tinyspeed.data.examples import Example, collate, of_pictures
from tinyspeed.data.record_formats import IMAGE, Turn
from tinyspeed.models.pictures import Pictures
from tinyspeed.recipe import DataSection
from tinyspeed.rows import IGNORE

FAMILIES = sorted({*processors.MAKERS} - {"qwen3_vl_moe"})  # whose processor is qwen3_vl's
PROCESSORS = {family: processors.processor(family) for family in FAMILIES}
CHATML = ("<|im_start|>assistant\n", "<|im_end|>")
SPOKEN = {  # what stands before an answer, and behind it
    "mistral3": ("[/INST]", "</s>"), "gemma3": ("<start_of_turn>model\n", "<end_of_turn>"),
    "smolvlm": ("Assistant:", "<end_of_utterance>"), "idefics3": ("Assistant:", "<end_of_utterance>"),
}  # fmt: skip

said = st.text("ab é猫?\n", min_size=1, max_size=8).map(str.strip).filter(bool)
sides = st.integers(6, 60)


@st.composite
def conversations(draw) -> tuple[list[Turn], list[Image.Image]]:
    """Up to two pictures, in front of the words, behind them or side by side."""
    turns, sizes = [Turn("system", (draw(said),))] if draw(st.booleans()) else [], []
    for _ in range(draw(st.integers(1, 2))):
        new = draw(st.lists(st.tuples(sides, sides), max_size=2 - len(sizes)))
        parts = draw(st.permutations([IMAGE] * len(new) + draw(st.lists(said, min_size=1, max_size=2))))
        turns += [Turn("user", tuple(parts)), Turn("assistant", (draw(said),))]
        sizes += new
    noise = np.random.default_rng(len(sizes))
    return turns, [Image.fromarray(noise.integers(0, 255, (high, wide, 3), np.uint8)) for wide, high in sizes]


def theirs(processor, talks) -> dict[str, torch.Tensor]:
    """The batch that the family's own processor makes of these conversations."""
    messages = []
    for turns, pictures in talks:
        left, told = list(pictures), []
        for turn in turns:
            content, texts = [], 0
            for part in turn.parts:
                if part is IMAGE:
                    content.append({"type": "image", "image": left.pop(0)})
                else:
                    content.append({"type": "text", "text": "\n" * (texts > 0) + part})
                    texts += 1
            told.append({"role": turn.role, "content": content})
        messages.append(told)
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    padding = {"padding": True, "padding_side": "right"}
    return dict(processor.apply_chat_template(messages, **how, processor_kwargs=padding))


def ours(processor, talks) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    chat, prepared, examples, rows = Chat(processor), Pictures(processor), [], []
    for turns, pictures in talks:
        texts = [prepared.text(*picture.size) for picture in pictures]
        ids, labels, _ = chat.encode(turns, texts)
        visual = of_pictures([*map(prepared.tensors, pictures)]) if pictures else {}
        examples.append(Example(torch.from_numpy(ids), torch.from_numpy(labels), visual))
        rows.append([*map(prepared.rows, texts)])
    return collate(examples, processors.PAD), rows


def learned_of(family: str, ids: list[int]) -> list[bool]:
    """Found in the ids: what stands between an answer's beginning and the first end of a turn behind it."""
    before, behind = SPOKEN.get(family, CHATML)
    spell = lambda text: PROCESSORS[family].tokenizer(text, add_special_tokens=False)["input_ids"]
    before, (behind,) = spell(before), spell(behind)
    learned, inside = [], False
    for i, token in enumerate(ids):
        inside |= i >= len(before) and ids[i - len(before) : i] == before
        learned.append(inside)
        inside &= token != behind
    return learned


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12)
@given(talks=st.lists(conversations(), min_size=1, max_size=3))
def test_a_batch_is_what_the_familys_own_processor_makes(family, talks):
    processor = PROCESSORS[family]
    if Pictures(processor).alone:
        talks = [talk for talk in talks if len(talk[1]) < 2] or [
            ([Turn("user", ("a",)), Turn("assistant", ("b",))], [])
        ]
    (batch, rows), wanted = ours(processor, talks), theirs(processor, talks)
    labels = batch.pop("labels")
    for name in {"mm_token_type_ids", "token_type_ids"} & wanted.keys():  # known from the ids
        assert ((wanted.pop(name) == 1) == (batch["input_ids"] == zoo.IMAGE)).all()
    assert batch.keys() == wanted.keys()
    for name, tensor in batch.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name
    assert (batch["input_ids"] == zoo.IMAGE).sum(1).tolist() == [*map(sum, rows)]
    for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], labels, strict=True):
        ids = ids[mask.bool()].tolist()
        assert label[mask.bool()].tolist() == [
            token if learned else IGNORE for token, learned in zip(ids, learned_of(family, ids), strict=True)
        ]
        assert (label[~mask.bool()] == IGNORE).all()


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=40)
@given(width=st.integers(1, 400), height=st.integers(1, 400))
def test_what_stands_for_a_picture_follows_from_its_size(family, width, height):
    """A blank picture that is never resized has the text of a real one, or is refused as that is."""
    prepared = Pictures(PROCESSORS[family])
    try:
        _, (real,) = prepared.processor._process_images([Image.new("RGB", (width, height))], **prepared.how)
    except (ValueError, ZeroDivisionError):
        with pytest.raises(UserError, match=f"a picture of {width} x {height} pixels is too thin"):
            prepared.text(width, height)
    else:
        assert prepared.text(width, height) == real


def source(folder, family, sizes, answer="Yes, a cat.", **how) -> Conversations:
    """One record about pictures of these sizes."""
    folder.mkdir(exist_ok=True)
    for k, size in enumerate(sizes):
        Image.effect_noise(size, 50).convert("RGB").save(folder / f"{k}.png")
    turns = [{"from": "human", "value": "Hi" + "<image>" * len(sizes)}, {"from": "gpt", "value": answer}]
    record = {"id": "a", "images": [f"{k}.png" for k in range(len(sizes))], "conversations": turns}
    (folder / "train.json").write_text(json.dumps([record]))
    data = DataSection(**{"kind": "chat", "file": str(folder / "train.json"), "workers": 0, "max_rows": 999, **how})
    return Conversations(data, PROCESSORS[family], folder / "cache", bar=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_record_becomes_an_example_whose_lengths_were_known(family, tmp_path):
    made = source(tmp_path, family, [(40, 25)] + [(9, 50)] * (family != "llava_onevision"))
    example, (text, visual, answers) = made.example(0), made.lengths(0)
    assert len(example.input_ids) == text + sum(visual)
    assert (example.input_ids == zoo.IMAGE).sum() == sum(visual)
    assert (example.labels[1:] != IGNORE).sum() == answers
    assert torch.equal(made.text(0)[0], example.input_ids)
    assert example.visual.keys() <= {*made.processor.model_input_names}


def test_several_pictures_of_a_model_that_would_prepare_them_in_another_way_are_refused(tmp_path):
    with pytest.raises(UserError, match="several pictures"):
        source(tmp_path, "llava_onevision", [(40, 25), (40, 25)])


@pytest.mark.parametrize("family", ["internvl", "mistral3", "smolvlm", "gemma3"])
def test_no_record_is_cut_before_its_last_picture_ends(family, tmp_path):
    """Neither amid the image tokens nor between them and the end that the processor writes behind them."""
    made = source(tmp_path / "whole", family, [(40, 25)])
    ids, labels = made.text(0)
    last = int((ids == zoo.IMAGE).nonzero()[-1])
    begin = int((labels != IGNORE).nonzero()[0])
    for most in (last, last + 1):
        with pytest.raises(UserError, match="cut through a picture"):
            source(tmp_path / f"{most}", family, [(40, 25)], max_rows=most, too_long="cut")
    cut = source(tmp_path / "cut", family, [(40, 25)], max_rows=begin + 2, too_long="cut").text(0)[0]
    assert torch.equal(cut, ids[: begin + 2])
