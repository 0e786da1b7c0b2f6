"""Accuracy without generating equals accuracy by generating."""

import pytest
import torch

from tinyspeed import DualSpeed
from tinyspeed.data import digits, digits_model
from tinyspeed.data.examples import Example
from tinyspeed.evaluation import accuracy
from tinyspeed.rows import IGNORE
from tinyspeed.scheduler import Plan

PROMPT = 1 + digits.DEFAULT.cells + 2


class Asked:
    """Prompts with given answers."""

    def __init__(self, answers):
        self.answers, self.source = answers, digits.Digits(len(answers), 1, "eval")

    def __len__(self):
        return len(self.answers)

    def lengths(self, i):
        return PROMPT - digits.DEFAULT.cells + len(self.answers[i]), [digits.DEFAULT.cells]

    def example(self, i):
        made, answer = self.source.example(i), self.answers[i]
        ids = torch.cat([made.input_ids[:PROMPT], answer])
        labels = torch.full_like(ids, IGNORE)
        labels[PROMPT:] = answer
        return Example(ids, labels, made.visual)


@pytest.fixture(scope="module")
def model():
    return DualSpeed(digits_model.build_model(1, width=32, layers=2, tower_width=16, tower_layers=1), isolator=0)


def generated(model, i, length):
    example = digits.Digits(99, 1, "eval").example(i)
    prompt = {"input_ids": example.input_ids[None, :PROMPT], "pixel_values": example.visual["pixel_values"]}
    model.model.eval()
    out = model.model.generate(**prompt, max_new_tokens=length, min_new_tokens=length, do_sample=False)
    return out[0, PROMPT:]


def test_it_counts_what_greedy_decoding_would_have_said(model):
    said = [generated(model, i, length) for i, length in enumerate([1, 2, 3, 2, 1, 3, 2])]
    right = [True, False, True, False, True, True, False]
    answers = []
    for tokens, keep in zip(said, right, strict=True):
        wrong = tokens.clone()
        wrong[-1] = (wrong[-1] + 1) % len(digits.DEFAULT.ids)
        answers.append(tokens if keep else wrong)
    for budget in (1, 400, 10**6):
        assert accuracy.accuracy(model, Asked(answers), Plan("full"), budget) == pytest.approx(100 * 4 / 7)


def test_keeping_everything_is_full(model):
    source = digits.Digits(30, 1, "eval")
    assert accuracy.accuracy(model, source, Plan("fast", keep=1.0)) == accuracy.accuracy(model, source, Plan("full"))


def test_the_mode_is_left_as_it_was(model):
    for training in (True, False):
        model.train(training)
        accuracy.accuracy(model, digits.Digits(2, 1, "eval"), Plan("fast", keep=0.1))
        assert model.training is training
