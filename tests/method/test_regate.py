"""ReGATE's laws: which answer tokens stay, what becomes of the others, and that a run of it can be killed."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import tiny
from torch.nn import functional as F

from tinyspeed import DualSpeed, UserError, regate, rows
from tinyspeed.scheduler import Combined, DualSpeedSchedule, FastSchedule, FullSchedule, Plan
from tinyspeed.util.errors import NotFinite

shares = st.integers(1, 100).map(lambda percent: percent / 100)
losses = st.floats(0, 20, width=32)
weights = st.floats(0, 1)
fusions = st.sampled_from(regate.FUSIONS)


# Which tokens stay


@given(st.lists(losses, min_size=1, max_size=40), shares, fusions, weights, st.integers(0, 2**31))
def test_the_hardest_stay_exactly_as_many_as_asked(reference, share, fusion, weight, seed):
    n = len(reference)
    m = np.random.default_rng(seed).exponential(size=n).round(1).astype(np.float32)  # some are equal
    settings = regate.Settings(keep=0.5, reference="llm", fusion=fusion, weight=weight)
    memory = regate.Memory(settings, [7], [n], np.array(reference, np.float32))
    memory.update(7, np.ones(n, bool), m)
    stays = memory.keep(7, share)
    assert stays.sum() == math.ceil(Fraction(str(share)) * n)
    own = 1.0 if fusion == "sum" else 1 - weight
    d = [own * float(a) + weight * float(b) for a, b in zip(m, reference, strict=True)]
    assert min(x for x, kept in zip(d, stays, strict=True) if kept) >= max(
        (x for x, kept in zip(d, stays, strict=True) if not kept), default=-1
    ) - 1e-5 * max(d)  # fp32
    assert np.array_equal(stays, memory.keep(7, share))


def test_how_many_stay_is_exact():
    for percent in range(1, 101):
        for n in range(1, 151):
            assert regate.kept(percent / 100, n) == -(-percent * n // 100)
    assert regate.kept(0.5, 0) == 0


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), shares)
def test_of_equals_the_earlier_stay(m, share):
    memory = regate.Memory(regate.Settings(), [0], [len(m)])
    memory.update(0, np.ones(len(m), bool), np.array(m))
    hardest = sorted(range(len(m)), key=lambda i: (-m[i], i))[: math.ceil(Fraction(str(share)) * len(m))]
    assert np.flatnonzero(memory.keep(0, share)).tolist() == sorted(hardest)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_difficulty_that_is_not_finite_decides_nothing(poison):
    memory = regate.Memory(regate.Settings(), [0, 7], [2, 3], np.zeros(5, np.float32))
    memory.difficulty[3] = poison
    assert memory.keep(0, 0.5).sum() == 1
    with pytest.raises(NotFinite, match="remembers of sample 7"):
        memory.keep(7, 0.5)


def test_a_sample_that_nothing_is_known_of_keeps_all_or_what_the_reference_finds_hard():
    alone = regate.Memory(regate.Settings(), [0], [3])
    assert alone.keep(0, 0.3).tolist() == [True, True, True]
    for fusion in regate.FUSIONS:
        fused = regate.Settings(keep=0.5, reference="llm", fusion=fusion)
        beside = regate.Memory(fused, [0], [3], np.array([1.0, 3.0, 2.0], np.float32))
        assert beside.keep(0, 0.3).tolist() == [False, True, False]


# What is remembered


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**31)), max_size=20),
    st.sampled_from([0.0, 0.5, 0.9, 0.99]),
)
def test_difficulty_is_the_average_of_what_ran_and_of_nothing_else(answers, visits, beta):
    samples = [10 * i + 3 for i in range(len(answers))]
    memory = regate.Memory(regate.Settings(beta=beta), samples, answers)
    want = {(s, i): None for s, n in zip(samples, answers, strict=True) for i in range(n)}
    for which, seed in visits:
        sample, n = samples[which % len(samples)], answers[which % len(samples)]
        rng = np.random.default_rng(seed)
        ran, loss = rng.random(n) < 0.6, rng.exponential(size=n).astype(np.float32)
        before = memory.difficulty.copy()
        memory.update(sample, ran, loss[ran])
        for i in np.flatnonzero(ran):
            m, x = want[sample, i], float(loss[i])
            want[sample, i] = x if m is None else beta * m + (1 - beta) * x
        start = sum(answers[: samples.index(sample)])
        idle = np.ones(sum(answers), bool)
        idle[start : start + n] = ~ran
        assert np.array_equal(memory.difficulty[idle], before[idle])
    got = memory.difficulty.tolist()
    for m, w in zip(got, want.values(), strict=True):
        assert m == regate.NEVER if w is None else m == pytest.approx(w, rel=1e-5, abs=1e-6)


def test_a_sample_of_another_run_and_losses_of_another_are_refused():
    memory = regate.Memory(regate.Settings(), [3, 9], [2, 2])
    with pytest.raises(KeyError):
        memory.keep(4, 0.5)
    with pytest.raises(UserError, match="3 reference losses for 4"):
        regate.Memory(regate.Settings(), [3, 9], [2, 2], np.ones(3, np.float32))


@pytest.mark.parametrize(
    "change",
    [{"keep": 0.0}, {"keep": 1.5}, {"weight": -1.0}, {"weight": 1.5, "fusion": "mix"}, {"beta": 1.0}, {"warmup": -1},
     {"refresh": 0}, {"refresh": 129}, {"fusion": "product"}],
)  # fmt: skip
def test_bad_settings_are_refused(change):
    with pytest.raises(UserError, match=f"regate.{next(iter(change))}"):
        regate.Settings(**change)


# When


@given(st.integers(0, 5000), st.integers(2, 40), st.data(), st.integers(0, 300), st.integers(0, 99))
def test_the_cycle_refreshes_first_and_warms_up_and_leaves_slow_steps_whole(step, cycle, data, warmup, seed):
    refresh = data.draw(st.integers(1, cycle - 1))
    part = regate.Cycle(regate.Settings(keep=0.5, cycle=cycle, refresh=refresh, warmup=warmup))
    for schedule in (FullSchedule(), FastSchedule(0.2), DualSpeedSchedule(slow=0.5, seed=seed)):
        plan, plain = Combined(schedule, part).plan(step), schedule.plan(step)
        skips = step >= warmup and step % cycle >= refresh and plain.mode != "slow"
        assert plan == (replace(plain, answer_keep=0.5) if skips else plain)


def test_the_papers_cycle_keeps_the_share_that_the_paper_reports():
    part = regate.Cycle(regate.Settings(keep=0.5))
    shares = [part.change(Plan("full"), step).answer_keep for step in range(128, 256)]
    assert sum(shares) / 128 == 0.5625


def test_the_cycle_of_another_run_is_refused():
    part = regate.Cycle(regate.Settings(keep=0.5))
    part.load_state_dict(part.state_dict())
    with pytest.raises(UserError, match="checkpoint"):
        regate.Cycle(regate.Settings(keep=0.4)).load_state_dict(part.state_dict())


# What becomes of a token that is skipped


TEXT = [[9], [14], [5]]
MIXED = [[4, tiny.IMG, 8], [7], [tiny.IMG, 5], [3, tiny.IMG, 4, tiny.IMG, 6]]
FULL, FAST, SLOW = Plan("full"), Plan("fast", keep=0.3), Plan("slow", keep=0.3, distill=1.0)


def asked(batch: dict, seed: int) -> dict:
    """The batch with the first of every three tokens a question: several turns."""
    labels = batch["labels"].clone()
    labels[:, ::3] = rows.IGNORE
    return {**batch, "labels": labels}


def some(batch: dict, seed: int) -> torch.Tensor:
    """At random, which answer tokens stay; of every sample at least one."""
    generator = torch.Generator().manual_seed(seed)
    answer = batch["labels"] != rows.IGNORE
    answer[:, 0] = False
    stays = (torch.rand(answer.shape, generator=generator) < 0.5) | ~answer
    last = answer.shape[1] - 1 - answer.flip(1).int().argmax(1)
    stays[torch.arange(len(last)), last] = True
    return stays


@pytest.mark.parametrize("plan", [FULL, FAST, SLOW], ids=lambda plan: plan.mode)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_to_keep_all_is_the_identity_bit_for_bit(llava, plan, layout):
    model, batch = DualSpeed(llava, keep=0.3, layout=layout).train(), tiny.batch("llava", outlines=MIXED)
    found = []
    everything = torch.ones_like(batch["labels"], dtype=torch.bool)
    for how in ({"plan": plan}, {"plan": replace(plan, answer_keep=0.5), "answers": everything}):
        model.zero_grad(set_to_none=True)
        out = model(**batch, **how)
        out.loss.backward()
        found.append((out.loss.detach(), out.metrics["losses"], tiny.gradients(model)))
    (loss, each, gradients), (loss_, each_, gradients_) = found
    assert torch.equal(loss, loss_)
    assert torch.equal(each, each_)
    assert gradients.keys() == gradients_.keys()
    assert all(torch.equal(gradients[name], gradients_[name]) for name in gradients)


def by_hand(hf, batch: dict, b: int, stays: torch.Tensor, positions: str) -> list[float]:
    """A sample's losses by transformers' own forward: of the features and embeddings of its rows without those of
    skipped answers."""
    real = batch["attention_mask"][b].nonzero()[:, 0]
    ids, labels, stays = batch["input_ids"][b, real], batch["labels"][b, real], stays[b, real]
    embeddings = hf.get_input_embeddings()(ids)
    visual = ids == tiny.IMAGE
    if visual.any():
        before = int((batch["input_ids"][:b] == tiny.IMAGE).sum()) // 9
        pictures = batch["pixel_values"][before : before + int(visual.sum()) // 9]
        embeddings = embeddings.clone()
        embeddings[visual] = torch.cat(list(hf.get_image_features(pixel_values=pictures).pooler_output))
    here, target = [], []
    for i in range(len(ids)):
        learned = i + 1 < len(ids) and labels[i + 1] != rows.IGNORE
        easy = learned and not stays[i + 1]
        if easy and labels[i] != rows.IGNORE:
            continue
        here.append(i)
        target.append(int(labels[i + 1]) if learned and not easy else rows.IGNORE)
    position = torch.tensor(here)[None] if positions == "original" else torch.arange(len(here))[None]
    out = hf.model.language_model(inputs_embeds=embeddings[here][None], position_ids=position).last_hidden_state
    logits = hf.lm_head(out[0]).double()
    return [float(F.cross_entropy(logits[r], torch.tensor(t))) for r, t in enumerate(target) if t != rows.IGNORE]


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("outlines", [TEXT, MIXED], ids=["text", "mixed"])
def test_skipped_answers_leave_the_sequence(llava, positions, layout, padding, outlines):
    hf = tiny.twin(llava).eval()
    model = DualSpeed(llava, keep=0.3, layout=layout, positions=positions).train()
    for seed in range(3):
        batch = asked(tiny.batch("llava", seed=seed, padding=padding, outlines=outlines), seed)
        stays = some(batch, seed)
        out = model(**batch, plan=Plan("full", answer_keep=0.5), answers=stays)
        with torch.no_grad():
            want = [loss for b in range(len(stays)) for loss in by_hand(hf, batch, b, stays, positions)]
        assert not tiny.difference(out.metrics["losses"], torch.tensor(want))
        assert out.loss.item() == pytest.approx(sum(want) / len(want), rel=1e-5)
        assert out.metrics["answers"] == len(want)
        assert out.metrics["rows_kept"] < out.metrics["rows_full"] == int(batch["attention_mask"].sum())


@pytest.mark.parametrize("plan", [FULL, FAST, SLOW], ids=lambda plan: plan.mode)
def test_what_comes_before_a_skipped_answer_does_not_change(llava, plan):
    model = DualSpeed(llava, keep=0.3, positions="original").train()
    batch = tiny.batch("llava", outlines=[[4, tiny.IMG, 12]])
    stays = torch.ones_like(batch["labels"], dtype=torch.bool)
    stays[0, -4] = False  # the last four answers: one is skipped, and its two before must not notice
    whole, less = model(**batch, plan=plan), model(**batch, plan=replace(plan, answer_keep=0.5), answers=stays)
    before, after = whole.metrics["losses"], less.metrics["losses"]
    assert len(after) == len(before) - 1
    torch.testing.assert_close(after[:-3], before[:-4], rtol=0, atol=1e-6 * float(before.max()))
    assert not torch.allclose(after[-3:], before[-3:], rtol=1e-3)  # these no longer see it


def test_fast_rows_lose_what_full_rows_lose(llava):
    model = DualSpeed(llava, keep=0.3).train()
    batch = tiny.batch("llava", outlines=MIXED)
    stays = some(batch, 0)
    gone = {
        plan.mode: model(**batch, plan=plan).metrics["rows_kept"]
        - model(**batch, plan=replace(plan, answer_keep=0.5), answers=stays).metrics["rows_kept"]
        for plan in (FULL, FAST)
    }
    assert gone["fast"] == gone["full"] > 0


def test_a_step_can_prune_and_skip_answers_and_layers(llava):
    model = DualSpeed(llava, keep=0.3).train()
    batch = tiny.batch("llava", outlines=MIXED)
    stays = some(batch, 0)
    plan = Plan("fast", keep=0.3, answer_keep=0.5, layers=(0, 2))
    out = model(**batch, plan=plan, answers=stays)
    out.loss.backward()
    pruned = model(**batch, plan=Plan("fast", keep=0.3)).metrics
    assert out.metrics["rows_kept"] < pruned["rows_kept"] < pruned["rows_full"]
    assert out.metrics["answers"] == len(out.metrics["losses"]) < pruned["answers"]
    idle = llava.model.language_model.layers[1].parameters()
    assert all(p.grad is None for p in idle)
    assert model.isolator.weight.grad.abs().sum() > 0


def test_questions_and_pictures_stay_whole(llava):
    batch = asked(tiny.batch("llava", outlines=MIXED), 0)
    stays = some(batch, 1)
    learned = batch["labels"].masked_fill(~stays, rows.IGNORE)
    lengths = {"image": [9] * int((batch["input_ids"] == tiny.IMAGE).sum() // 9)}
    full = rows.full(batch["input_ids"], batch["attention_mask"], learned, {"image": tiny.IMAGE}, lengths)
    less = rows.skip_answers(full, batch["labels"], stays, "original")
    left = set(less.source.tolist())
    gone = [s for s in full.source.tolist() if s not in left]
    assert gone
    assert all(s < batch["labels"].numel() and batch["labels"].flatten()[s] != rows.IGNORE for s in gone)


def test_the_plan_and_the_choice_of_answers_come_together(llava):
    model, batch = DualSpeed(llava).train(), tiny.batch("llava")
    skipping, stays = Plan("full", answer_keep=0.5), torch.ones_like(batch["labels"], dtype=torch.bool)
    for how in ({"plan": skipping}, {"plan": FULL, "answers": stays}):
        with pytest.raises(UserError, match="answer_keep below 1 and `answers=`"):
            model(**batch, **how)
    with pytest.raises(UserError, match="has shape"):
        model(**batch, plan=skipping, answers=stays[:1])
