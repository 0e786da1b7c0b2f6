"""What makes steps faster changes nothing but that: the same loss and gradients with it and without, and less work."""

import copy
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from torch.utils.flop_counter import FlopCounterMode

from tinyspeed import DualSpeed, UserError, pruning, rows
from tinyspeed.models import attention
from tinyspeed.scheduler import Plan
from tinyspeed.training.loop import StageRun
from tinyspeed.util import malloc

ROOT = Path(__file__).parents[2]
FAST = Plan("fast", keep=0.3)
ONCE = [name for name in pruning.names() if pruning.entry(name).merges == "features"]


def backward(model, batch):
    model.train().step = 3
    with FlopCounterMode(display=False) as counter:
        out = model(**batch, plan=FAST)
        out.loss.backward()
    return out.loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, counter


def wrapped(family, plugin):
    net = tiny.model(family)
    net.model.vision_tower.requires_grad_(False)
    return DualSpeed(net, plugin=plugin, keep=0.3, seed=1)


@pytest.mark.parametrize("plugin", pruning.names())
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_projecting_what_stays_once_more_is_projecting_everything_with_a_graph(family, plugin):
    twice, batch = wrapped(family, plugin), tiny.batch(family)
    once = copy.deepcopy(twice)
    once.vlm.rowwise = False
    assert twice.chooser.projects_twice == (plugin not in ONCE)
    assert not once.chooser.projects_twice
    (loss, gradients, less), (same, wanted, more) = (backward(model, batch) for model in (twice, once))
    assert loss == pytest.approx(same, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        near = 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=near, msg=name)
    projected = [counter.get_flop_counts()["Global"] for counter in (less, more)]
    assert (sum(projected[0].values()) < sum(projected[1].values())) == (pruning.entry(plugin).merges == "")


@pytest.mark.parametrize("frozen", ["projector", "nothing"])
def test_a_frozen_projector_or_a_tower_that_trains_is_asked_once(frozen):
    model = wrapped("llava", "divprune")
    (model.vlm.tower if frozen == "nothing" else model.vlm.projector).requires_grad_(frozen == "nothing")
    assert not model.chooser.projects_twice
    calls = []
    model.vlm.projector.register_forward_hook(lambda *_: calls.append(1))
    _, gradients, _ = backward(model, tiny.batch("llava"))
    assert len(calls) == 1
    assert any("vision_tower" in name for name in gradients) == (frozen == "nothing")


def test_a_plugin_that_merges_must_say_so():
    @pruning.register("secret")
    def secret(features, *, most, **_):
        index = torch.arange(most).expand(len(features), -1)
        return index, features.new_ones(len(features), most, features.shape[1]), None

    try:
        with pytest.raises(UserError, match='merges="features"'):
            pruning.choose("secret", torch.randn(1, 9, 4), keep=0.3)
    finally:
        del pruning.registry.PLUGINS["secret"]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_on_a_cpu_packed_is_what_padding_would_make_a_tenth_longer(lengths):
    sample = torch.tensor([b for b, n in enumerate(lengths) for _ in range(n)])
    some = rows.Rows(*[torch.zeros_like(sample)] * 3, sample, sample, len(lengths))
    waste = 1 - sum(lengths) / (len(lengths) * max(lengths))
    assert attention.choose_layout(torch.zeros(1), some) == ("packed" if waste > 0.1 + 1e-9 else "padded")


@given(st.lists(st.integers(1, 30), min_size=1), st.sampled_from(["auto", "packed", "padded"]), st.booleans())
def test_activations_are_those_of_rows_as_they_lie(lengths, layout, packs):
    """Whether a micro-batch is recomputed depends on its padding only where there is any."""
    model = SimpleNamespace(device=torch.device("cpu"), isolator=SimpleNamespace(weight=None), layout=layout)
    run = SimpleNamespace(precision="fp32", model=model)
    with mock.patch.object(attention, "has_packed_kernel", return_value=packs):
        count = StageRun.laid_out(run, lengths)
    assert count == (sum(lengths) if packs and layout != "padded" else len(lengths) * max(lengths))


def test_a_step_reads_only_words_that_it_uses():
    """Placeholders and padding have embeddings too, and nobody wants them."""
    model, batch = wrapped("llava", "divprune"), tiny.batch("llava")
    asked = []
    model.vlm.model.get_input_embeddings().register_forward_hook(lambda _, given, out: asked.append(given[0]))
    backward(model, batch)
    real = batch["input_ids"][batch["attention_mask"].bool()]
    assert torch.equal(asked[0], real[real != tiny.IMAGE])


def test_where_the_c_library_cannot_be_told_nothing_happens(monkeypatch):
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    assert malloc.keep_freed_memory() is False
