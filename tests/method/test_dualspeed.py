"""`DualSpeed` as a whole, against transformers' own forward and against sequences put together by hand.

Tolerances: fp32 sums taken in another order, 1e-5 of the largest entry (`tiny.difference`); equal where nothing is
computed in another order.
"""

import copy
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from support import tiny
from support.forwards import (
    FAST,
    FULL,
    KEEP,
    SLOW,
    answers_of,
    backward,
    fast_by_hand,
    features_of,
    kept_of,
    of_net,
    wrap,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM

from tinyspeed import DualSpeed, UserError, pruning, rows
from tinyspeed.isolator import PromptIsolator
from tinyspeed.models import attention, loading, stages
from tinyspeed.scheduler import Plan

SKIPPING = Plan("fast", keep=KEEP, layers=(0, 2))  # of three layers

every_plan = pytest.mark.parametrize("plan", [FULL, FAST, SLOW], ids=lambda plan: plan.mode)
every_layout = pytest.mark.parametrize("layout", ["padded", "packed"])
every_padding = pytest.mark.parametrize("padding", ["left", "right"])
every_positions = pytest.mark.parametrize("positions", ["compact", "original"])


# The oracle: a step's sequences, put together by hand


# Full plans and evaluation are the wrapped model


@every_padding
@every_layout
@every_positions
def test_a_full_step_has_the_loss_logits_and_gradients_of_transformers(family, padding, layout, positions):
    net, batch = tiny.model(family), tiny.batch(family, padding=padding)
    hf = tiny.twin(net)
    model = wrap(net, layout=layout, positions=positions)
    want, want_gradients = backward(hf, batch)
    got, got_gradients = backward(model, batch, plan=FULL)
    assert not tiny.difference(got, want)
    assert not tiny.difference(of_net(got_gradients), want_gradients)
    out = model(**batch, plan=FULL, return_logits=True)
    logits, targets = answers_of(hf(**batch).logits, batch["labels"])
    assert not tiny.difference(out.logits, logits)
    assert torch.equal(out.targets, targets)


def test_evaluation_is_the_wrapped_model_exactly(family):
    net, batch = tiny.model(family), tiny.batch(family)
    hf, model = tiny.twin(net).eval(), wrap(net).eval()
    with torch.no_grad():
        got, want = model(**batch), hf(**batch)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.loss, want.loss)
    prompt = {name: value for name, value in tiny.batch(family, padding="left").items() if name != "labels"}
    said = [m.generate(**prompt, max_new_tokens=6, do_sample=False) for m in (model.model, hf)]
    assert torch.equal(*said)
    assert said[0].shape[1] > prompt["input_ids"].shape[1]


def test_training_and_evaluating_in_turn_leaves_evaluation_as_it_was(llava):
    """Evaluation must not see what a step left behind: a plan, a layout, an attention function."""
    model, batch = wrap(llava, positions="original", layout="packed"), tiny.batch("llava")
    with torch.no_grad():
        before = model.eval()(**batch).logits
        for plan in (FAST, SLOW, SKIPPING):
            model.train()(**batch, plan=plan)
        assert torch.equal(model.eval()(**batch).logits, before)


# Fast plans are the sequence one would write down


@every_layout
@every_positions
@pytest.mark.parametrize("isolator", [0, 4])
def test_a_fast_step_has_the_logits_of_its_sequence_put_together_by_hand(family, layout, positions, isolator):
    net, batch = tiny.model(family), tiny.batch(family, padding="left" if isolator else "right")
    hf = tiny.twin(net)
    model = wrap(net, layout=layout, positions=positions, isolator=isolator)
    out = model(**batch, plan=FAST, return_logits=True)
    logits, targets = fast_by_hand(hf, batch, model.isolator.weight, positions)
    assert torch.equal(out.targets, targets)
    assert not tiny.difference(out.logits, logits)
    assert not tiny.difference(out.loss, F.cross_entropy(logits, targets))


@every_layout
def test_original_positions_are_the_full_sequence_with_the_dropped_rows_hidden(family, layout):
    """An independent route: all rows stay where they are, and a mask hides the ones that were dropped from all."""
    net = tiny.model(family)
    hf = tiny.twin(net)
    out_of = wrap(net, layout=layout, positions="original", isolator=0)
    for data in tiny.samples(family):
        batch = tiny.collate([data])
        visual = batch["input_ids"][0] == tiny.IMAGE
        embeddings = hf.get_input_embeddings()(batch["input_ids"])[0]
        features = features_of(hf, batch)
        shown = torch.ones_like(visual)
        if features:
            embeddings = embeddings.index_put((visual.nonzero()[:, 0],), torch.cat(features))
            shown[visual] = torch.tensor([stays for image in kept_of(hf, features) for stays in image])
        seen = torch.ones(len(visual), len(visual)).tril().bool() & (shown | torch.eye(len(visual)).bool())
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        hidden = hf.model.language_model(
            inputs_embeds=embeddings[None], attention_mask=mask[None, None], use_cache=False
        ).last_hidden_state[0]
        # The row that predicts an answer is the last one shown before it.
        answers = (batch["labels"][0] != tiny.IGNORE).nonzero()[:, 0].tolist()
        predicting = [int(shown[:i].nonzero()[-1, 0]) for i in answers]
        out = out_of(**batch, plan=FAST, return_logits=True)
        assert not tiny.difference(out.logits, hf.lm_head(hidden[predicting]))


def test_the_oracles_tell_positions_and_isolators_apart(llava):
    """Four settings, four different sequences: agreement with an oracle above is no accident of small weights."""
    batch, hf = tiny.batch("llava"), tiny.twin(llava)
    isolator = wrap(llava).isolator.weight
    cases = itertools.product((isolator, isolator[:0]), ("compact", "original"))
    logits = [fast_by_hand(hf, batch, rows, positions)[0] for rows, positions in cases]
    for a, b in itertools.combinations(logits, 2):
        assert (a - b).abs().max() > 0.1


@pytest.mark.parametrize("plan", [FAST, SLOW, SKIPPING], ids=["fast", "slow", "skipping"])
@every_positions
def test_packed_and_padded_layouts_have_the_same_loss_and_gradients(family, plan, positions):
    net, batch = tiny.model(family), tiny.batch(family)
    padded, packed = (
        backward(wrap(copy.deepcopy(net), layout=layout, positions=positions), batch, plan=plan)
        for layout in ("padded", "packed")
    )
    assert not tiny.difference(packed[0], padded[0])
    assert not tiny.difference(packed[1], padded[1])


def test_layers_outside_the_plan_are_left_out(llava):
    batch, hf = tiny.batch("llava"), tiny.twin(llava)
    model = wrap(llava)
    del hf.model.language_model.layers[1]
    hf.config.text_config.num_hidden_layers = 2
    out = model(**batch, plan=Plan("full", layers=(0, 2)), return_logits=True)
    assert not tiny.difference(out.logits, answers_of(hf(**batch, use_cache=False).logits, batch["labels"])[0])
    layers = model.vlm.language_model.layers
    assert len(layers) == 3  # and back afterwards
    layers[1].register_forward_pre_hook(lambda *_: pytest.fail("the layer ran"))
    model(**batch, plan=Plan("slow", keep=KEEP, distill=1.0, layers=(0, 2)))  # nor does the teacher run it


@every_plan
def test_an_attention_mask_of_ones_may_be_left_out(family, plan):
    model, batch = wrap(tiny.model(family)), tiny.batch(family, outlines=[(2, tiny.IMG, 4)])
    bare = {name: value for name, value in batch.items() if name != "attention_mask"}
    assert torch.equal(model(**bare, plan=plan).loss, model(**batch, plan=plan).loss)


def test_an_isolator_begins_like_a_linear_layer_drawn_from_its_own_seed():
    before = torch.random.get_rng_state()
    first, again, other = (PromptIsolator(64, 100, seed=seed).weight for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)  # nobody else's random numbers have moved
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Uniform in +-1/sqrt(100), whose standard deviation is 0.1/sqrt(3); 6,400 draws give it to 3 %.
    assert first.abs().max() <= 0.1
    assert first.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.03)
    assert abs(first.mean().item()) < 0.005


# Slow plans: the teacher


@pytest.mark.parametrize(("temperature", "distill"), [(1.0, 1.0), (2.0, 0.5)])
@every_positions
def test_a_slow_step_is_cross_entropy_plus_divergence_from_a_fixed_teacher(family, temperature, distill, positions):
    """Loss and every gradient, against teacher logits computed apart and held fixed: so the teacher leaves none."""
    net, batch = tiny.model(family), tiny.batch(family)
    hf = tiny.twin(net)
    model = wrap(net, temperature=temperature, positions=positions)
    got, got_gradients = backward(model, batch, plan=Plan("slow", keep=KEEP, distill=distill))
    with torch.no_grad():
        teacher = fast_by_hand(hf, batch, model.isolator.weight, positions)[0]
    logits, targets = answers_of(hf(**batch).logits, batch["labels"])
    q, p = (F.log_softmax(z / temperature, -1) for z in (teacher, logits))
    divergence = (q.exp() * (q - p)).sum() / len(targets)
    loss = F.cross_entropy(logits, targets) + distill * temperature**2 * divergence
    loss.backward()
    assert not tiny.difference(got, loss.detach())
    assert not tiny.difference(of_net(got_gradients), tiny.gradients(hf))


def test_a_teacher_that_sees_what_the_student_sees_teaches_nothing(family):
    """Keep all rows and no isolator, and both halves of a slow step are one and the same. (Not LLaVA-NeXT: there the
    fast mode drops newline rows.)"""
    model, batch = wrap(tiny.model(family), isolator=0), tiny.batch(family)
    divergence = model(**batch, plan=Plan("slow", keep=1.0, distill=1.0)).metrics["kl"].item()
    assert (abs(divergence) < 1e-6) == (family == "llava")


def test_the_teacher_runs_without_dropout_and_flags_are_restored():
    model, batch = wrap(tiny.model(dropout=0.5)), tiny.batch("llava")
    llm = model.vlm.language_model
    llm.layers[1].eval()  # a part that somebody froze in eval mode stays there
    flags = {name: module.training for name, module in model.named_modules()}
    seen = []
    llm.register_forward_hook(
        lambda module, args, out: seen.append((any(m.training for m in llm.modules()), out.last_hidden_state.detach()))
    )
    for seed in (0, 1):
        torch.manual_seed(seed)
        model(**batch, plan=SLOW)
    teachers, students = seen[0::2], seen[1::2]
    assert [training for training, _ in teachers] == [False, False]
    assert torch.equal(teachers[0][1], teachers[1][1])
    assert [training for training, _ in students] == [True, True]
    assert not torch.equal(students[0][1], students[1][1])
    assert {name: module.training for name, module in model.named_modules()} == flags
    with pytest.raises(UserError):  # and restored when a step fails on its way
        model(**batch, plan=Plan("slow", keep=KEEP, distill=1.0, layers=(0, 9)))
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert len(llm.layers) == 3


def test_the_tower_runs_once_for_both_halves_of_a_slow_step(llava):
    model, runs = wrap(llava), []
    model.vlm.tower.register_forward_hook(lambda *_: runs.append(1))
    model(**tiny.batch("llava"), plan=SLOW)
    assert len(runs) == 1


# Which parameters a step touches


def test_a_slow_step_leaves_the_isolators_gradient_alone_and_a_fast_step_moves_it(family):
    model, batch = wrap(tiny.model(family)), tiny.batch(family)
    for plan in (SLOW, FULL):
        backward(model, batch, plan=plan)
        assert model.isolator.weight.grad is None
    backward(model, batch, plan=FAST)
    assert model.isolator.weight.grad.abs().min() > 0  # every row of it


@pytest.mark.parametrize(
    ("plan", "idle"),
    [
        (Plan("fast", keep=KEEP, layers=(0, 2)), r"language_model\.layers\.1\.|image_newline|vision_tower"),
        (Plan("slow", keep=KEEP, distill=1.0, layers=(1,)), r"language_model\.layers\.[02]\.|isolator|vision_tower"),
        (FAST, r"image_newline|vision_tower"),
        (SLOW, r"isolator|vision_tower"),
        (FULL, r"isolator|vision_tower"),
    ],
    ids=["fast without layer 1", "slow with layer 1 alone", "fast", "slow", "full"],
)
@pytest.mark.parametrize("outlines", [tiny.OUTLINES, [(4,), (6,)]], ids=["images", "text only"])
def test_a_parameter_outside_the_plan_is_bit_unchanged_by_the_optimizer(family, plan, idle, outlines):
    """Weight decay and old momentum move a parameter whose gradient is zero; only one without a gradient stays."""
    model = wrap(tiny.model(family))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for parameter in model.parameters():  # momentum for all, as after many steps of every kind
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    backward(model, tiny.batch(family, outlines=outlines), plan=plan)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not re.search(idle, name)}


@pytest.mark.parametrize("plan", [FULL, FAST, SLOW, SKIPPING], ids=["full", "fast", "slow", "skipping"])
def test_a_batch_without_images_touches_the_same_parameters_as_one_with(family, plan):
    """Which gradients exist depends on the plan and not on the data, or ranks would wait for each other forever."""
    model = wrap(tiny.model(family))
    with_images = backward(model, tiny.batch(family), plan=plan)[1]
    without = backward(model, tiny.batch(family, outlines=[(4,), (6,)]), plan=plan)[1]
    assert with_images.keys() == without.keys()
    for name, gradient in without.items():
        if "projector" in name or "newline" in name or "isolator" in name:
            assert not gradient.any(), name  # touched with a zero weight


def test_a_tower_with_several_feature_layers_can_sit_out_a_batch_without_images(llava):
    config = tiny.config("llava")
    config.vision_feature_layer = [-2, -1]
    model = wrap(type(llava)(config))
    model.vlm.tower.requires_grad_(False)
    sets = [backward(model, tiny.batch("llava", outlines=o), plan=FAST)[1].keys() for o in (tiny.OUTLINES, [(4,)])]
    assert sets[0] == sets[1]


def test_text_only_samples_cost_the_same_rows_in_fast_and_full_mode(family):
    model, batch = wrap(tiny.model(family)), tiny.batch(family, outlines=[(4,), (6,)])
    fast, full = model(**batch, plan=FAST), model(**batch, plan=FULL)
    assert fast.metrics["rows_kept"] == full.metrics["rows_kept"] == fast.metrics["rows_full"] == 12
    assert not tiny.difference(fast.loss, full.loss)


@pytest.mark.parametrize("stage", stages.STAGES)
def test_a_stage_trains_the_connector_and_the_llm_or_the_connector_alone(family, stage):
    model = wrap(tiny.model(family))
    stages.set_trainable(model.model, stage)
    full, fast = (backward(model, tiny.batch(family), plan=plan)[1].keys() for plan in (FULL, FAST))
    pattern = "multi_modal_projector|image_newline|isolator" + ("|language_model|lm_head" if stage == "train" else "")
    assert full | fast == {name for name, _ in model.named_parameters() if re.search(pattern, name)}


# LLaVA-NeXT


def test_newline_rows_are_never_kept_and_k_counts_the_others(llava_next):
    outlines, isolator = tiny.OUTLINES, 4
    data, seen = tiny.samples("llava_next", outlines=outlines), []
    model = wrap(llava_next, isolator=isolator)

    def count(module, args, kwargs):
        seen.append(int((kwargs["inputs_embeds"] == llava_next.model.image_newline).all(-1).sum()))

    model.vlm.language_model.register_forward_pre_hook(count, with_kwargs=True)
    batch = tiny.collate(data)
    fast, full = model(**batch, plan=FAST), model(**batch, plan=FULL)
    images = [tiny.image_rows("llava_next", size) for s in data for size in s["sizes"]]
    text = sum(token != tiny.IMAGE for s in data for token in s["ids"])
    assert seen == [0, sum(newlines for _, newlines in images)]
    assert fast.metrics["rows_kept"] == text + sum(int(KEEP * pictures + 1e-6) + isolator for pictures, _ in images)
    assert full.metrics["rows_kept"] == full.metrics["rows_full"] == text + sum(map(sum, images))


# Micro-batches


@every_plan
@every_layout
def test_cutting_a_batch_into_micro_batches_changes_nothing(family, plan, layout):
    data, model = tiny.samples(family), wrap(tiny.model(family), layout=layout)
    answers = int((tiny.collate(data)["labels"][:, 1:] != tiny.IGNORE).sum())
    whole, gradients = backward(model, tiny.collate(data), plan=plan)
    model.zero_grad(set_to_none=True)
    total = 0.0
    for part in (data[:1], data[1:3], data[3:]):  # of different widths, one text-only sample among them
        loss = model(**tiny.collate(part), plan=plan, num_items_in_batch=torch.tensor(answers)).loss
        loss.backward()
        total += loss.detach()
    assert not tiny.difference(total, whole)
    assert not tiny.difference(tiny.gradients(model), gradients)


# The plan of a step


def test_without_a_plan_a_step_follows_the_schedule_at_its_number(llava):
    model, batch = wrap(llava, slow=0.5, seed=3), tiny.batch("llava")
    modes = []
    for step in range(8):
        model.step = step
        modes.append(model(**batch).metrics["mode"])
    assert modes == [model.schedule.plan(step).mode for step in range(8)]
    assert set(modes) == {"fast", "slow"}
    assert model.forwards == 8


def test_a_plugin_that_draws_draws_anew_each_step_and_the_same_again(llava):
    model, batch = wrap(llava, plugin="random"), tiny.batch("llava")
    losses = []
    for step in (0, 1, 0):
        model.step = step
        losses.append(model(**batch, plan=FAST).loss.item())
    assert losses[0] == losses[2] != losses[1]


@pytest.mark.parametrize("plugin", pruning.names())
def test_a_plugin_that_draws_asks_which_step_it_is_and_no_other_does(llava, plugin):
    """`step` reaches a plugin as its seed: one that draws must not draw the same in each step of a loop with plans."""
    model, batch = wrap(llava, plugin=plugin), tiny.batch("llava")
    if plugin in ("random", "dynamicvit"):
        with pytest.raises(UserError, match=f"'{plugin}' draws anew in each step.*model.step"):
            model(**batch, plan=FAST)
        model.eval()(**batch, plan=FAST)  # one draw for all: who measures wants to measure the same
    else:
        model(**batch, plan=FAST)


# Activation checkpointing


@pytest.mark.parametrize("plan", [FAST, SLOW, SKIPPING], ids=["fast", "slow", "skipping"])
@every_layout
def test_activation_checkpointing_changes_no_gradient(plan, layout):
    # Dropout makes it harder: what is recomputed must drop the same entries.
    model, batch = wrap(tiny.model(dropout=0.2), layout=layout), tiny.batch("llava")
    model.vlm.language_model.requires_grad_(True)
    runs = []
    model.vlm.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    outcomes, counts = [], []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        runs.clear()
        torch.manual_seed(0)
        outcomes.append(backward(model, batch, plan=plan))
        counts.append(len(runs))
    assert counts[1] == counts[0] + 1  # it was on: the student's forward ran twice, the teacher's once
    assert not tiny.difference(outcomes[1][0], outcomes[0][0])
    assert not tiny.difference(outcomes[1][1], outcomes[0][1])


# LoRA


@every_plan
@every_layout
def test_with_lora_only_adapters_and_the_isolator_get_gradients(family, plan, layout):
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    net = tiny.model(family)
    plain = tiny.twin(net)
    adapted = get_peft_model(net, LoraConfig(r=2, target_modules=targets, lora_dropout=0.1))
    model, batch = wrap(adapted, layout=layout), tiny.batch(family)
    gradients = backward(model, batch, plan=plan)[1]
    trainable = {name for name, p in model.named_parameters() if "lora_" in name}
    assert len(trainable) == 3 * 7 * 2
    assert gradients.keys() == trainable | ({"isolator.weight"} if plan.mode == "fast" else set())
    with torch.no_grad():  # lora_B begins at zero, so the adapted model still is the plain one
        assert torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)


# Precision and devices


@every_plan
def test_a_bf16_model_trains_in_its_own_precision_and_its_isolator_in_fp32(family, plan):
    model = wrap(tiny.model(family).bfloat16())
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny.batch(family).items()}
    loss, gradients = backward(model, batch, plan=plan)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    for name, gradient in gradients.items():  # the isolator's small updates would round away in bf16
        assert gradient.dtype == (torch.float32 if name == "isolator.weight" else torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the varlen attention kernel of packed rows needs CUDA")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)  # the kernel itself takes no fp32
@every_plan
@every_positions
def test_on_cuda_packed_attention_equals_padded_attention(family, plan, positions, dtype):
    net = tiny.model(family).to("cuda", dtype)
    batch = {k: v.to("cuda", dtype if v.is_floating_point() else None) for k, v in tiny.batch(family).items()}
    packed, padded = (
        wrap(copy.deepcopy(net), layout=layout, positions=positions)(**batch, plan=plan, return_logits=True)
        for layout in ("packed", "padded")
    )
    assert torch.equal(packed.targets, padded.targets)
    # bf16 keeps 8 bits: on a CPU these logits differ from fp32 by up to 3 % of the largest. A leak between samples
    # would differ by as much as the logits themselves.
    assert not tiny.difference(
        packed.logits.float(), padded.logits.float(), rel=0.1 if dtype == torch.bfloat16 else 1e-4
    )
    assert not tiny.difference(packed.loss, padded.loss, rel=0.01 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the varlen attention kernel of packed rows needs CUDA")
@every_plan
def test_on_cuda_fp32_weights_under_autocast_use_the_packed_kernel(family, plan, monkeypatch):
    net = tiny.model(family).to("cuda")
    batch = {k: v.to("cuda") for k, v in tiny.batch(family).items()}
    kernel, calls = attention.varlen_attn, []
    monkeypatch.setattr(attention, "varlen_attn", lambda *given, **how: calls.append(1) or kernel(*given, **how))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        packed, padded = (
            backward(wrap(copy.deepcopy(net), layout=layout), batch, plan=plan) for layout in ("auto", "padded")
        )
    assert len(calls) == 3 * (2 if plan.mode == "slow" else 1)  # three layers, with the teacher's twice
    assert not tiny.difference(packed[0], padded[0], rel=0.01)
    assert not tiny.difference(packed[1], padded[1], rel=0.1)


@contextmanager
def cuda_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """torch.autocast("cuda", dtype) as code sees it, where there is no CUDA and torch.autocast would switch it off."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or torch.float16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [(7, 5), (8, 0)])
def test_rows_are_packed_where_products_run_in_half_precision(dtype, autocast, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode(), cuda_autocast(autocast):
        packs = attention.has_packed_kernel(torch.empty(2, 4, dtype=dtype, device="cuda"))
        assert not attention.has_packed_kernel(torch.empty(2, 4, dtype=dtype))  # on a CPU, never
    assert packs == (capability >= (8, 0) and (autocast or dtype) != torch.float32)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_the_packed_kernel_gets_queries_keys_and_values_in_autocasts_precision(autocast, monkeypatch):
    """With fp32 weights, rotary embeddings leave queries and keys in fp32, and values are in half precision."""
    seen = []

    def kernel(q, k, v, cu, *given, **how):
        seen.extend(x.dtype for x in (q, k, v))
        parts = [[x[a:b].transpose(0, 1) for x in (q, k, v)] for a, b in itertools.pairwise(cu.tolist())]
        return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True).transpose(0, 1) for part in parts])

    shape = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32}
    query, key, value = (torch.randn(1, heads, 5, 8, **shape) for heads in (4, 2, 2))
    borders = torch.tensor([0, 3, 5], dtype=torch.int32)
    layout = rows.Layout(torch.arange(5), torch.arange(5)[None], torch.arange(5), borders, 3, borders.tolist())
    module = nn.Module()
    module.num_key_value_groups = 2
    want, _ = attention.rows_attention(module, query, key, value, None, rows=layout)
    monkeypatch.setattr(attention, "has_packed_kernel", lambda x: True)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    with cuda_autocast(autocast):
        got, _ = attention.rows_attention(module, query, key, value.to(autocast), None, rows=layout)
    assert seen == [autocast] * 3
    assert got.dtype == autocast
    assert not tiny.difference(got.float(), want, rel=0.02)


# From disk


def test_a_checkpoint_in_the_real_format_trains_evaluates_and_generates(family, checkpoint):
    folder = checkpoint(family)
    net, processor = loading.load_model(str(folder)), AutoProcessor.from_pretrained(folder)
    for name, parameter in tiny.model(family).named_parameters():
        assert torch.equal(net.get_parameter(name), parameter), name
    image = Image.linear_gradient("L").resize((70, 50)).convert("RGB")
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(question, add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhat is it? ASSISTANT:"
    asked = processor(images=image, text=prompt, return_tensors="pt")
    batch = processor(images=image, text=f"{prompt} a gradient", return_tensors="pt")
    labels = batch["input_ids"].clone()
    labels[:, : asked["input_ids"].shape[1]] = tiny.IGNORE
    model = wrap(net)
    for plan in (FAST, SLOW, FULL):
        out = model(**batch, labels=labels, plan=plan)
        assert out.metrics["answers"] == len(" a gradient")
        assert out.loss.isfinite()
    fewer = model(**batch, labels=labels, plan=FAST).metrics
    assert fewer["rows_kept"] < fewer["rows_full"] == batch["input_ids"].shape[1]
    model.eval()
    assert torch.equal(model(**batch, labels=labels).loss, tiny.twin(net).eval()(**batch, labels=labels).loss)
    said = model.model.generate(**asked, max_new_tokens=4, do_sample=False)
    assert torch.equal(said, tiny.twin(net).eval().generate(**asked, max_new_tokens=4, do_sample=False))


def test_a_trained_model_saves_back_as_a_plain_checkpoint(family, checkpoint, tmp_path):
    """No trace of us: same keys, and a config that transformers loads without tinyspeed's attention function."""
    net = loading.load_model(str(checkpoint(family)))
    model, batch = wrap(net), tiny.batch(family)
    backward(model, batch, plan=FAST)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.model.save_pretrained(tmp_path / "saved")
    assert "tinyspeed" not in (tmp_path / "saved" / "config.json").read_text()
    again = loading.load_model(str(tmp_path / "saved"))
    assert again.config.text_config._attn_implementation != "tinyspeed"
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_state_dict_has_every_parameter_once_also_without_storage(llava, tied, device):
    """The addresses of tensors on the meta device and of sharded ones are all 0, so names say what is tied."""
    net = tiny.twin(llava).to(device)
    if tied:
        net.lm_head.weight = net.get_input_embeddings().weight
    model = DualSpeed(net)
    assert model.state_dict().keys() >= {name for name, _ in model.named_parameters()}
    assert tied is not ("model.lm_head.weight" in model.state_dict())


@pytest.mark.parametrize(("make", "said"), [
    (lambda folder: None, "no model folder"),
    (lambda folder: folder.mkdir(), "config.json"),
    (lambda folder: (folder.mkdir(), (folder / "config.json").write_text('{"model_type": "bert"}')), "bert"),
    (lambda folder: (folder.mkdir(), (folder / "config.json").write_text('{"model_type": "llava"}')), "cannot load"),
    (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{")), "config.json"),
], ids=["no folder", "no config", "another model", "no weights", "broken config"])  # fmt: skip
def test_a_folder_that_holds_no_llava_is_refused(tmp_path, make, said):
    make(tmp_path / "model")
    with pytest.raises(UserError, match=said):
        loading.load_model(str(tmp_path / "model"))


# What is refused


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"plugin": "divprun"}, "did you mean 'divprune'"),
        ({"positions": "orginal"}, "did you mean 'original'"),
        ({"layout": "packd"}, "did you mean 'packed'"),
        ({"keep": 0.0}, "keep = 0"),
        ({"keep": 1.5}, "keep = 1.5"),
        ({"slow": 1.5}, "slow = 1.5"),
        ({"temperature": 0.0}, "temperature = 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"distill": -1.0}, "distill = -1"),
        ({"isolator": -1}, "isolator = -1"),
        ({"chunk": 0}, "chunk = 0"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_before_the_first_step(llava, how, said):
    with pytest.raises(UserError, match=said):
        wrap(llava, **how)


@pytest.mark.parametrize("net", [nn.Linear(2, 2), LlamaForCausalLM(LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
))], ids=["no transformers model", "no vision model"])  # fmt: skip
def test_a_model_of_another_kind_is_refused_with_the_known_ones(net):
    with pytest.raises(UserError, match="llava, llava_next"):
        DualSpeed(net)


@every_plan
def test_a_batch_with_nothing_to_learn_from_is_refused(family, plan):
    model, batch = wrap(tiny.model(family)), tiny.batch(family)
    labels = batch.pop("labels")
    with pytest.raises(UserError, match="no labels"):
        model(**batch, plan=plan)
    with pytest.raises(UserError, match="no answer tokens"):
        model(**batch, labels=torch.full_like(labels, tiny.IGNORE), plan=plan)


@every_plan
def test_truncated_placeholders_are_refused_with_both_counts(family, plan):
    model, batch = wrap(tiny.model(family)), tiny.batch(family, outlines=[(2, tiny.IMG, 4)])
    rows = int((batch["input_ids"] == tiny.IMAGE).sum())
    batch["input_ids"][0, 4] = tiny.TEXT  # within the image
    with pytest.raises(UserError, match=rf"{rows - 1} image placeholder.* {rows} feature rows"):
        model(**batch, plan=plan)


@pytest.mark.parametrize("plan", [FAST, SLOW], ids=lambda plan: plan.mode)
def test_nan_pixels_are_refused_before_they_reach_the_llm(family, plan):
    model, batch = wrap(tiny.model(family)), tiny.batch(family)
    batch["pixel_values"][0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        model(**batch, plan=plan)


@every_plan
def test_llava_next_without_image_sizes_is_refused(llava_next, plan):
    batch = tiny.batch("llava_next")
    del batch["image_sizes"]
    with pytest.raises(UserError, match="image_sizes"):
        wrap(llava_next)(**batch, plan=plan)


@every_plan
def test_layers_that_the_llm_has_not_are_refused(llava, plan):
    with pytest.raises(UserError, match="layer 3"):
        wrap(llava)(**tiny.batch("llava"), plan=Plan(plan.mode, keep=KEEP, layers=(0, 3)))


def test_labels_on_placeholders_are_ignored_or_refused_in_every_mode_alike(family):
    """`labels = input_ids.clone()` is what many collators do. Placeholders are no answers: a fast step has not even the
    rows to predict them with, and a teacher without them would be matched to the wrong rows of its student."""
    model, batch = wrap(tiny.model(family)), tiny.batch(family)
    said = set()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, tiny.IGNORE)
    for plan in (FULL, FAST, SLOW):
        try:
            said.add(model(**batch, plan=plan).metrics["answers"])
        except UserError as error:
            said.add(str(error))
    assert len(said) == 1
