"""The built-in digits: what the direct path makes equals what a real processor makes, and the answers are true."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from tinyspeed import UserError, recipe
from tinyspeed.data import digits, digits_model
from tinyspeed.evaluation import accuracy
from tinyspeed.rows import IGNORE
from tinyspeed.training import train

seeds = st.integers(0, 2**32)
canvases = st.sampled_from([digits.Canvas(*sizes) for sizes in ((12, 2), (12, 3), (12, 4), (4, 2), (6, 3), (24, 2))])
# The regions' names in the order in which one reads a page, written out.
NAMES = {
    2: "top-left top-right bottom-left bottom-right",
    3: "top-left top-centre top-right middle-left middle-centre middle-right bottom-left bottom-centre bottom-right",
    4: "top-left top-inner-left top-inner-right top-right upper-left upper-inner-left upper-inner-right upper-right "
    "lower-left lower-inner-left lower-inner-right lower-right bottom-left bottom-inner-left bottom-inner-right "
    "bottom-right",
}


def regions(canvas, cells):
    """What is in each region, by its name."""
    size, held = canvas.side // canvas.regions, {name: [] for name in NAMES[canvas.regions].split()}
    for row, line in enumerate(cells):
        for column, content in enumerate(line):
            if content != digits.BLANK:
                held[list(held)[row // size * canvas.regions + column // size]].append(content)
    return held


@given(seed=seeds, split=st.sampled_from(["train", "eval"]), canvas=canvases)
def test_a_picture_holds_at_most_one_digit_a_region(seed, split, canvas):
    pixels, cells = digits.picture(np.random.default_rng(seed), split, canvas)
    assert pixels.shape == (canvas.side * 8, canvas.side * 8)
    assert cells.shape == (canvas.side, canvas.side)
    assert all(len(found) <= 1 for found in regions(canvas, cells).values())


@given(seed=seeds, split=st.sampled_from(["train", "eval"]), canvas=canvases)
def test_where_a_digit_is_said_to_be_there_is_a_scan_of_it(seed, split, canvas):
    """Of its own split. The ground is at most 90, so whatever is brighter is ink."""
    pixels, cells = digits.picture(np.random.default_rng(seed), split, canvas)
    images, labels = digits.scans(split)
    for (row, column), content in np.ndenumerate(cells):
        window = pixels[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        if content == digits.BLANK:
            assert window.max() <= 90
        else:
            ink = np.where(images > 90, images, 0)[labels == content]
            assert (ink == np.where(window > 90, window, 0)).all(axis=(1, 2)).any()


@given(seed=seeds, canvas=canvases, data=st.data())
def test_questions_are_different_and_their_answers_true(seed, canvas, data):
    count = data.draw(st.integers(1, canvas.regions**2 + 10))
    rng = np.random.default_rng(seed)
    _, cells = digits.picture(rng, "train", canvas)
    asked = digits.questions(rng, cells, count, canvas)
    assert len({question for question, _ in asked}) == count
    for question, answer in asked:
        kind, what = question.split()
        if kind == "any":
            assert answer == ("yes" if digits.NUMBERS.index(what) in cells else "no")
        else:
            there = [str(d) for d in regions(canvas, cells)[what]]
            assert [answer] == (there or ["none"])


def test_one_region_in_four_is_empty():
    canvas, rng = digits.Canvas(6, 3), np.random.default_rng(0)
    held = sum((digits.picture(rng, "train", canvas)[1] != digits.BLANK).sum() for _ in range(500))
    assert abs(held / (500 * 9) - 0.75) < 0.03


def test_questions_come_to_an_end_where_every_digit_is_there():
    cells = np.arange(16).reshape(4, 4) % 10
    asked = dict(digits.questions(np.random.default_rng(0), cells, 26, digits.Canvas(4, 4)))
    assert len(asked) == 26
    assert {asked[f"any {number}"] for number in digits.NUMBERS} == {"yes"}


def test_scans_are_scikit_learns_own_and_every_fifth_is_held_out():
    whole = load_digits()
    for split, mine in ("eval", np.arange(1797) % 5 == 0), ("train", np.arange(1797) % 5 != 0):
        images, labels = digits.scans(split)
        assert np.array_equal(images, np.floor(whole.images[mine] * 255 / 16))
        assert np.array_equal(labels, whole.target[mine])


def test_without_scikit_learn_what_to_install_is_said(monkeypatch):
    monkeypatch.setattr(digits, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '\.\[demo\]'"):
        digits.scans.__wrapped__("train")


def test_no_evaluation_scan_is_ever_trained_on():
    train, held_out = digits.scans("train")[0], digits.scans("eval")[0]
    assert len(train) + len(held_out) == 1797
    assert not {s.tobytes() for s in train} & {s.tobytes() for s in held_out}


@given(i=st.integers(0, 10**6 - 1), turns=st.integers(1, 14), split=st.sampled_from(["train", "eval"]), canvas=canvases)
def test_lengths_are_those_of_the_example(i, turns, split, canvas):
    source = digits.Digits(10**6, turns, split, canvas=canvas)
    example = source.example(i)
    text, images, answers = source.lengths(i)
    assert len(example.input_ids) == text + sum(images)
    assert (example.input_ids == canvas.ids["<image>"]).sum() == sum(images) == canvas.side**2
    assert (example.labels != IGNORE).sum() == 2 * turns == answers
    assert torch.equal(source.example(i).visual["pixel_values"], example.visual["pixel_values"])


@pytest.mark.parametrize("canvas", [digits.DEFAULT, digits.Canvas(6, 3)], ids=["default", "3 x 3 regions"])
def test_the_saved_processor_makes_the_same_example(canvas):
    processor = digits_model.build_processor(canvas)
    for i in range(15):
        source = digits.Digits(1000, 3, canvas=canvas)
        example, rng = source.example(i), source._rng(i)
        pixels, cells = digits.picture(rng, "train", canvas)
        chat = []
        for turn, (question, answer) in enumerate(digits.questions(rng, cells, 3, canvas)):
            image = [{"type": "image"}] if turn == 0 else []
            chat.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        text = processor.apply_chat_template(chat)
        batch = processor(images=Image.fromarray(pixels).convert("RGB"), text=text, return_tensors="pt")
        assert torch.equal(batch["input_ids"][0], example.input_ids)
        # The processor rescales by 1/255 and normalises, in that order: equal up to fp32 rounding.
        torch.testing.assert_close(batch["pixel_values"], example.visual["pixel_values"], atol=1e-6, rtol=0)
    # Without a look at the picture, as a file of conversations is measured: the demo's model can be fine-tuned on one.
    counted = processor._get_num_multimodal_tokens(image_sizes=[pixels.shape]).num_image_tokens
    assert counted == [canvas.cells]


def test_the_tower_learns_and_leaves_the_random_state_alone():
    model = digits_model.build_model(0, width=16, layers=1, tower_width=16, tower_layers=1)
    before = torch.get_rng_state()
    losses = []
    digits_model.train_tower(
        model.model.vision_tower, 0, 25, batch=8, report=lambda _, loss: losses.append(loss.item())
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[-1] < 0.9 * losses[0]
    assert not any(p.requires_grad for p in model.model.vision_tower.parameters())


def test_the_models_context_holds_every_question_about_the_largest_picture():
    for canvas in (digits.DEFAULT, digits.Canvas(24, 2), digits.Canvas(24, 4)):
        source = digits.Digits(1, canvas.regions**2 + 10, canvas=canvas)
        text, images, _ = source.lengths(0)
        model = digits_model.build_model(
            0, width=8, layers=1, tower_width=8, tower_layers=1, side=canvas.side, regions=canvas.regions
        )
        assert text + sum(images) <= model.config.text_config.max_position_embeddings
        assert model.config.text_config.vocab_size == len(canvas.ids) > source.example(0).input_ids.max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_tower_is_trained_on_the_gpu_and_saved_as_on_a_cpu(tmp_path):
    sizes = {"width": 16, "layers": 1, "tower_width": 16, "tower_layers": 1, "tower_steps": 3}
    one, other = (digits_model.prepare(tmp_path / at, 0, bar=False, device=at, **sizes) for at in ("cpu", "cuda"))
    made = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert made[0].keys() == made[1].keys()
    for name, tensor in made[0].items():
        torch.testing.assert_close(made[1][name], tensor, atol=1e-3, rtol=1e-2)


def test_a_base_model_of_other_pictures_is_refused(tmp_path):
    sizes = {"width": 16, "layers": 1, "tower_width": 16, "tower_layers": 1, "tower_steps": 1}
    folder = digits_model.prepare(tmp_path / "base", 0, bar=False, **sizes, side=6, regions=3)
    with pytest.raises(UserError, match="was not built with"):
        digits_model.prepare(folder, 0, bar=False, **sizes)
    changes = [f"model.path={folder}", f"run.folder={tmp_path}", "data.eval_pictures=4", "align.steps=0"]
    changes += ["train.steps=2", "train.batch=2", "digits.side=6"]
    with pytest.raises(UserError, match=r"digits\.side and digits\.regions must be"):
        train.train(recipe.read("digits", changes), bar=False)
    made = recipe.read("digits", [*changes, "digits.regions=3", "data.turns=19", "digits.pictures=3"])
    trained = train.train(made, bar=False)
    assert trained.totals.steps == 2
    assert len(digits.from_recipe(made)) == 3
    full, pruned = accuracy.held_out(trained.model, made, bar=False)
    assert 0 <= min(full, pruned) <= max(full, pruned) <= 100


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("digits.regions=5", "must be 2, 3 or 4"),
        ("digits.side=13", "a multiple of digits.regions"),
        ("digits.pictures=0", "at least 1"),
        ("data.turns=15", "a picture has 14 questions"),
    ],
)
def test_pictures_that_cannot_be_are_refused(change, says):
    with pytest.raises(UserError, match=says):
        recipe.read("digits", [change])
    assert recipe.read("digits", ["digits.regions=3", "data.turns=19"]).data.turns == 19
