"""The embedded default: what the direct path makes equals what a real processor makes, and the answers are true."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinyspeed import digits
from tinyspeed.rows import IGNORE

seeds = st.integers(0, 2**32)


@given(seed=seeds, split=st.sampled_from(["train", "eval"]))
def test_a_picture_holds_at_most_one_digit_a_quadrant(seed, split):
    _, cells = digits.picture(np.random.default_rng(seed), split)
    half = digits.SIDE // 2
    for r in (0, half):
        for c in (0, half):
            assert (cells[r : r + half, c : c + half] != digits.BLANK).sum() <= 1


@given(seed=seeds, count=st.integers(1, 10))
def test_questions_are_different_and_their_answers_true(seed, count):
    rng = np.random.default_rng(seed)
    _, cells = digits.picture(rng, "train")
    asked = digits.questions(rng, cells, count)
    assert len({question for question, _ in asked}) == count
    for question, answer in asked:
        kind, what = question.split()
        if kind == "any":
            assert answer == ("yes" if digits.NUMBERS.index(what) in cells else "no")
        else:
            rows = slice(0, 6) if what.startswith("top") else slice(6, 12)
            columns = slice(0, 6) if what.endswith("left") else slice(6, 12)
            there = [str(d) for d in cells[rows, columns].flatten() if d != digits.BLANK]
            assert [answer] == (there or ["none"])


def test_no_evaluation_scan_is_ever_trained_on():
    train, held_out = digits.scans("train")[0], digits.scans("eval")[0]
    assert len(train) + len(held_out) == 1797
    assert not {s.tobytes() for s in train} & {s.tobytes() for s in held_out}


@given(i=st.integers(0, 10**6 - 1), turns=st.integers(1, 10), split=st.sampled_from(["train", "eval"]))
def test_lengths_are_those_of_the_example(i, turns, split):
    source = digits.Digits(10**6, turns, split)
    example = source.example(i)
    text, images, answers = source.lengths(i)
    assert len(example.input_ids) == text + sum(images)
    assert (example.input_ids == digits.ID["<image>"]).sum() == sum(images)
    assert (example.labels != IGNORE).sum() == 2 * turns == answers
    assert torch.equal(source.example(i).pixel_values, example.pixel_values)


@pytest.fixture(scope="module")
def processor():
    return digits.build_processor()


@settings(max_examples=15)
@given(i=st.integers(0, 999))
def test_the_saved_processor_makes_the_same_example(processor, i):
    source = digits.Digits(1000, 3)
    example, rng = source.example(i), source._rng(i)
    canvas, cells = digits.picture(rng, "train")
    chat = []
    for turn, (question, answer) in enumerate(digits.questions(rng, cells, 3)):
        image = [{"type": "image"}] if turn == 0 else []
        chat.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text = processor.apply_chat_template(chat)
    batch = processor(images=Image.fromarray(canvas).convert("RGB"), text=text, return_tensors="pt")
    assert torch.equal(batch["input_ids"][0], example.input_ids)
    # The processor rescales by 1/255 and normalises, in that order: equal up to fp32 rounding.
    torch.testing.assert_close(batch["pixel_values"], example.pixel_values, atol=1e-6, rtol=0)


def test_the_tower_learns_and_leaves_the_random_state_alone():
    model = digits.build_model(0, width=16, layers=1, tower_width=16, tower_layers=1)
    before = torch.get_rng_state()
    losses = []
    digits.train_tower(model.model.vision_tower, 0, 25, batch=8, report=lambda _, loss: losses.append(loss.item()))
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[-1] < 0.9 * losses[0]
    assert not any(p.requires_grad for p in model.model.vision_tower.parameters())
