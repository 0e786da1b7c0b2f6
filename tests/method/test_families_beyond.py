"""Families beyond LLaVA (`support/zoo.py`): the laws of a step, held to transformers' own forward and LLM."""

import copy

import pytest
import torch
from support import tiny, zoo
from support.forwards import FAST, FULL, KEEP, SLOW, answers_of, backward, of_net, wrap
from support.tiny import IMG
from torch.nn import functional as F

from tinyspeed import UserError
from tinyspeed.scheduler import Plan

every_plan = pytest.mark.parametrize("plan", [FULL, FAST, SLOW], ids=lambda plan: plan.mode)
every_padding = pytest.mark.parametrize("padding", ["left", "right"])


@pytest.fixture(params=zoo.KINDS)
def family(request) -> str:
    return request.param


@pytest.fixture(params=["padded", "packed"])
def layout(request, family) -> str:
    if request.param == "packed" and not zoo.KINDS[family].packs:
        pytest.skip("refused: see test_a_layout_that_the_llm_cannot_have_is_refused")
    return request.param


@every_padding
def test_a_full_step_has_the_loss_logits_and_gradients_of_transformers(family, layout, padding):
    net, batch = zoo.model(family), zoo.batch(family, padding=padding)
    hf, whole = zoo.twin(net), zoo.KINDS[family].whole(batch)
    model = wrap(net, layout=layout)
    want, want_gradients = backward(hf, whole)
    got, got_gradients = backward(model, batch, plan=FULL)
    assert not tiny.difference(got, want)
    assert not tiny.difference(of_net(got_gradients), want_gradients)
    out = model(**batch, plan=FULL, return_logits=True)
    logits, targets = answers_of(hf(**whole).logits, batch["labels"])
    assert not tiny.difference(out.logits, logits)
    assert torch.equal(out.targets, targets)


def test_evaluation_is_the_wrapped_model_exactly(family):
    net = zoo.model(family)
    hf, model = zoo.twin(net).eval(), wrap(net).eval()
    for outlines in (tiny.OUTLINES, ((4,), (7,))):
        batch = zoo.KINDS[family].whole(zoo.batch(family, outlines=outlines))
        with torch.no_grad():
            got, want = model(**batch), hf(**batch)
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.loss, want.loss)


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("isolator", [0, 4])
def test_a_fast_step_has_the_logits_of_its_sequence_put_together_by_hand(family, layout, positions, isolator):
    net, data = zoo.model(family), zoo.samples(family)
    hf = zoo.twin(net)
    model = wrap(net, layout=layout, positions=positions, isolator=isolator)
    out = model(**zoo.collate(family, data, "left" if isolator else "right"), plan=FAST, return_logits=True)
    logits, targets = zoo.fast_by_hand(hf, family, data, model.isolator.weight, positions, KEEP)
    assert torch.equal(out.targets, targets)
    assert not tiny.difference(out.logits, logits)
    assert not tiny.difference(out.loss, F.cross_entropy(logits, targets))


def test_text_amid_an_image_may_be_an_answer(family):
    """As in a batch whose labels leave out the placeholders alone. A line without a kept row is predicted by the break
    before it."""
    net, data = zoo.model(family), zoo.samples(family)
    for s in data:
        s["labels"] = [tiny.IGNORE if token in (tiny.BOS, zoo.IMAGE) else token for token in s["ids"]]
    hf, model = zoo.twin(net), wrap(net, isolator=2)
    out = model(**zoo.collate(family, data), plan=FAST, return_logits=True)
    logits, targets = zoo.fast_by_hand(hf, family, data, model.isolator.weight, "original", KEEP)
    assert torch.equal(out.targets, targets)
    assert not tiny.difference(out.logits, logits)


def test_a_slow_step_is_taught_by_the_fast_forward(family):
    net, data = zoo.model(family), zoo.samples(family)
    hf = zoo.twin(net)
    model, batch = wrap(net), zoo.collate(family, data)
    out = model(**batch, plan=SLOW)
    teacher, _ = zoo.fast_by_hand(hf, family, data, model.isolator.weight, "original", KEEP)
    student, targets = answers_of(hf(**zoo.KINDS[family].whole(batch)).logits, batch["labels"])
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
    assert not tiny.difference(out.loss, F.cross_entropy(student, targets) + kl)


@every_plan
def test_layouts_and_micro_batches_have_the_same_loss_and_gradients(family, plan):
    data = zoo.samples(family)
    answers = sum(label != tiny.IGNORE for s in data for label in s["labels"])
    net = zoo.model(family)
    padded = wrap(copy.deepcopy(net), layout="padded")
    packed = wrap(net, layout="packed" if zoo.KINDS[family].packs else "auto")
    want = backward(padded, zoo.collate(family, data), plan=plan)
    total = 0.0
    for part in (data[:2], data[2:3], data[3:]):
        loss = packed(**zoo.collate(family, part), plan=plan, num_items_in_batch=answers).loss
        loss.backward()
        total += loss.detach()
    assert not tiny.difference(total, want[0])
    assert not tiny.difference(tiny.gradients(packed), want[1])


@every_plan
def test_every_batch_touches_the_same_parameters(family, plan):
    model = wrap(zoo.model(family))
    mixes = (tiny.OUTLINES, ((4,), (6,)))
    touched = [backward(model, zoo.batch(family, outlines=mix), plan=plan)[1].keys() for mix in mixes]
    assert touched[0] == touched[1]
    projectors = zoo.KINDS[family].projectors
    assert all(any(projector in name for name in touched[0]) for projector in projectors)


@pytest.mark.parametrize("plugin", ["tome", "pool", "coverage", "tokenlearner"])
def test_keeping_all_is_the_full_step_whatever_the_plugin(family, plugin):
    net, batch = zoo.model(family), zoo.batch(family)
    model = wrap(net, plugin=plugin, keep=1.0, isolator=0)
    every, full = (model(**batch, plan=plan).loss for plan in (Plan("fast", keep=1.0), FULL))
    assert not tiny.difference(every, full)


def test_layers_that_do_what_no_other_does_are_not_skipped(family):
    model, batch = wrap(zoo.model(family)), zoo.batch(family)
    first = model.vlm.first_layers
    if not zoo.KINDS[family].uniform:
        with pytest.raises(UserError, match=r"of several kinds \(full_attention, .*set sts.skip = 0"):
            model(**batch, plan=Plan("fast", keep=KEEP, layers=(0, 1)))
        return
    assert model(**batch, plan=Plan("fast", keep=KEEP, layers=(0, 1))).loss.isfinite()
    if first:
        with pytest.raises(UserError, match=f"the first {first} layers .*sts.protect_first = {first}"):
            model(**batch, plan=Plan("fast", keep=KEEP, layers=(0, 2)))


@every_plan
def test_truncated_placeholders_are_refused_with_both_counts(family, plan):
    batch = zoo.batch(family)
    rows = int((batch["input_ids"] == zoo.IMAGE).sum())
    batch["input_ids"][tuple((batch["input_ids"] == zoo.IMAGE).nonzero()[-1])] = tiny.TEXT
    with pytest.raises(UserError, match=rf"{rows - 1} image placeholder.* {rows} feature rows"):
        wrap(zoo.model(family))(**batch, plan=plan)


def test_a_batch_without_what_its_processor_makes_is_refused(family):
    batch = zoo.batch(family, outlines=((2, IMG, 3),))
    beside = [name for name in batch if name in ("image_grid_thw", "image_sizes")]
    for name in beside:
        with pytest.raises(UserError, match=f"needs {name}"):
            wrap(zoo.model(family))(**{key: value for key, value in batch.items() if key != name}, plan=FULL)


@pytest.mark.parametrize("family", [name for name, kind in zoo.KINDS.items() if not kind.packs])
def test_a_layout_that_the_llm_cannot_have_is_refused(family):
    net = zoo.model(family)
    assert wrap(net, layout="auto").layout == wrap(net, layout="padded").layout == "padded"
    with pytest.raises(UserError, match=r'layout = "packed": .*; choose "padded" or "auto"'):
        wrap(net, layout="packed")


@pytest.mark.parametrize("family", ["qwen3_5", "gemma4"])
def test_layers_that_run_twice_find_their_states_masks_and_shared_keys_again(family):
    net, batch = zoo.model(family), zoo.batch(family)
    once, twice = wrap(copy.deepcopy(net)), wrap(net)
    twice.gradient_checkpointing_enable()
    twice.vlm.recompute(True)
    (loss, gradients), (same, others) = (backward(model, batch, plan=SLOW) for model in (once, twice))
    assert not tiny.difference(loss, same)
    assert not tiny.difference(gradients, others)


@pytest.mark.parametrize("family", [name for name, kind in zoo.KINDS.items() if type(kind.mask([])) is dict])
def test_a_weight_does_not_undo_the_mask(family):
    """Equal weights for every token that stays and for nothing else: an addition to the scores of a few keys."""
    net, data = zoo.model(family), zoo.samples(family)
    model = wrap(net, weights="uniform")
    out = model(**zoo.collate(family, data), plan=FAST, return_logits=True)
    logits, _ = zoo.fast_by_hand(zoo.twin(net), family, data, model.isolator.weight, "original", KEEP, weigh=True)
    assert not tiny.difference(out.logits, logits)
