"""Two views, a LoRA for each mode: against peft models that have only one of them, which is the oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from support import tiny
from support.forwards import FAST, FULL, SLOW, backward, wrap
from support.trainers import Pictures, arguments, gather
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, Trainer

from tinyspeed import DualSpeed, UserError
from tinyspeed.data import digits_model
from tinyspeed.models import export, loading, lora, stages
from tinyspeed.recipe import StageSection
from tinyspeed.scheduler import PeriodicSchedule, Plan
from tinyspeed.training import checkpoint, optimizer
from tinyspeed.training.trainer_callback import SetStep

# The view that a step learns in.
VIEW = {"fast": "fast", "slow": "slow", "full": "slow"}
TARGETS = r".*language_model.*_proj"


def view_of(name: str) -> str:
    """Whose parameter this is; "" if it is neither's."""
    return next((view for view in ("fast", "slow") if f".{view}." in name), "")


def grown(net: torch.nn.Module) -> torch.nn.Module:
    """Adapters, both A and B, far from where they begin, and from each other."""
    stages.set_trainable(net, "train")
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def pair(family: str = "llava", **how) -> DualSpeed:
    return wrap(grown(lora.add_lora(tiny.model(family), rank=2, views=True)), views=True, **how)


def single(of: DualSpeed, view: str, family: str = "llava", **how) -> DualSpeed:
    """A model that peft gave one adapter, with the weights of this view."""
    net = get_peft_model(tiny.model(family), LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS))
    weights = {name.replace(f".{view}.", ".default."): p for name, p in of.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(weights[name])
    stages.set_trainable(net, "train")
    return wrap(net, **how)


modes = st.sampled_from([FAST, SLOW, FULL])


@settings(max_examples=8)  # two models each
@given(
    steps=st.lists(modes, min_size=1, max_size=3), recomputed=st.booleans(), rows=st.sampled_from([0, 4]),
    positions=st.sampled_from(["compact", "original"]), layout=st.sampled_from(["padded", "packed"]),
    family=st.sampled_from(tiny.FAMILIES),
)  # fmt: skip
def test_a_step_is_one_of_a_model_that_has_this_view_alone(steps, recomputed, rows, positions, layout, family):
    """Whatever steps and evaluations came before, and whether the backward runs the layers again."""
    how = {"isolator": rows, "positions": positions, "layout": layout}
    model, batch = pair(family, **how), tiny.batch(family)
    if recomputed:
        model.activation_checkpointing_enable()
    for step in steps:
        view, plan = VIEW[step.mode], Plan(step.mode, keep=step.keep)  # what a teacher adds has a test of its own
        with torch.no_grad():
            model.eval()(**batch)
        loss, found = backward(model.train(), batch, plan=plan)
        assert {view_of(name) for name in found} == {view, ""}, "the other view has no gradients"
        want_loss, want = backward(single(model, view, family, **how), batch, plan=plan)
        assert torch.equal(loss, want_loss)
        found = {name.replace(f".{view}.", ".default."): g for name, g in found.items()}
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], want[name]) for name in want)
        assert ("isolator.weight" in found) == (step.mode == "fast"), "as ever"
        assert any("projector" in name for name in found), "which both modes share"


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("rows", [0, 4])
def test_a_slow_step_learns_in_its_own_view_from_a_teacher_in_the_other(family, rows, recomputed):
    how, batch = {"isolator": rows}, tiny.batch(family)
    model = pair(family, **how)
    if recomputed:
        model.activation_checkpointing_enable()
    fast, slow = (single(model, view, family, **how) for view in ("fast", "slow"))
    with torch.no_grad():
        taught = fast(**batch, plan=FAST, return_logits=True).logits
    out = slow(**batch, plan=FULL, return_logits=True)
    teaching = F.kl_div(out.logits.log_softmax(-1), taught.log_softmax(-1), reduction="sum", log_target=True)
    want_loss = F.cross_entropy(out.logits, out.targets) + teaching / len(out.targets)
    want_loss.backward()

    loss, found = backward(model, batch, plan=SLOW)
    assert not tiny.difference(loss, want_loss)
    assert not tiny.difference({n.replace(".slow.", ".default."): g for n, g in found.items()}, tiny.gradients(slow))


@given(before=modes)
def test_evaluation_is_the_slow_view_and_pruned_evaluation_the_fast_one(before):
    model, batch = pair(), tiny.batch("llava")
    fast, slow = (single(model, view).eval() for view in ("fast", "slow"))
    prompt = {name: value for name, value in tiny.batch("llava", padding="left").items() if name != "labels"}
    with torch.no_grad():
        model(**batch, plan=before)
        model.eval()
        one, other = (m.model.generate(**prompt, max_new_tokens=6, do_sample=False) for m in (model, slow))
        assert torch.equal(one, other), "also of the wrapped model, without our forward"
        for plan, oracle in ((FAST, fast), (FULL, slow), (FAST, fast)):
            got, want = (m(**batch, plan=plan, return_logits=True) for m in (model, oracle))
            assert torch.equal(got.logits, want.logits)
        assert torch.equal(model(**batch).logits, slow.model(**batch).logits)


def test_both_views_begin_as_the_base_and_alike():
    net, batch = tiny.model(), tiny.batch("llava")
    base = tiny.twin(net).eval()
    one, other = (lora.add_lora(tiny.model(), rank=2, seed=seed, views=True) for seed in (1, 2))
    parameters = dict(one.named_parameters())
    for name, p in parameters.items():
        if view_of(name) == "slow":
            assert torch.equal(p, parameters[name.replace(".slow.", ".fast.")])
    assert any(not torch.equal(p, parameters[name]) for name, p in other.named_parameters() if "lora_A" in name)
    model = DualSpeed(one, views=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {view_of(name) for name in trained if "lora_" in name} == {"fast", "slow"}
    with torch.no_grad():
        want = base(**batch).logits
        for view in ("fast", "slow"):
            model.eval().views.use(view)
            assert torch.equal(model.model(**batch).logits, want)


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_the_optimizer_leaves_the_idle_view_alone_and_knows_both_from_the_start(kind):
    model, batch = pair(), tiny.batch("llava")
    trained = {p: name for name, p in model.named_parameters() if p.requires_grad}
    made = optimizer.make_optimizer(StageSection(lr=0.1, weight_decay=0.1, optimizer=kind), [], list(trained))
    assert set(made.state) == set(trained), "before the first step"
    for plan in (FAST, SLOW, FAST, FULL):  # with momentum in both views as from the third
        before = {name: p.detach().clone() for p, name in trained.items()}
        moments = {n: t.clone() for n, t in checkpoint.optimizer_tensors(made, trained).items()}
        backward(model, batch, plan=plan)
        made.step()
        moved = {name for p, name in trained.items() if not torch.equal(p, before[name])}
        assert {view_of(name) for name in moved} == {VIEW[plan.mode], ""}
        assert moved >= {name for name in before if view_of(name) == VIEW[plan.mode]}
        for name, tensor in checkpoint.optimizer_tensors(made, trained).items():
            if view_of(name) not in ("", VIEW[plan.mode]):
                assert torch.equal(tensor, moments[name]), name


def test_what_is_exported_is_the_slow_view(family, tmp_path):
    base = str(tiny.checkpoint(family, tmp_path / "base"))
    model = DualSpeed(grown(lora.add_lora(loading.load_model(base), rank=4, views=True)), views=True)
    saved = {f"model/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    export.merge(saved, 2.0, base, tmp_path / "merged")
    export.save_adapter(saved, lora.lora_config(4), base, tmp_path / "adapter")
    batch = tiny.batch(family)
    model(**batch, plan=FAST)
    want = model.eval()(**batch).logits
    load = AutoModelForImageTextToText.from_pretrained
    assert not tiny.difference(load(tmp_path / "merged").eval()(**batch).logits, want)
    again = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    assert list(again.peft_config) == ["default"]
    assert torch.equal(again(**batch).logits, want)
    assert not tiny.difference(model.model.merge_and_unload(adapter_names=["slow"])(**batch).logits, want)


def test_the_trainer_trains_both_views(tmp_path):
    base = digits_model.build_model(0, width=32, layers=2, tower_width=16, tower_layers=1)
    lora = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS), adapter_name="slow")
    lora.add_adapter("fast", LoraConfig(r=4, target_modules=TARGETS))  # peft leaves it frozen

    model = DualSpeed(lora, schedule=PeriodicSchedule(slow=0.5, keep=0.1), views=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = arguments(tmp_path, max_steps=4, gradient_checkpointing=True)
    trainer = Trainer(
        model, run, train_dataset=Pictures(40), eval_dataset=Pictures(4), data_collator=gather,
        callbacks=[SetStep(model)],
    )  # fmt: skip
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= {name for name in before if "lora_B" in name}
    model.views.use("fast")
    lost = trainer.evaluate()["eval_loss"]
    plain = lora.merge_and_unload(adapter_names=["slow"]).eval()
    assert lost == pytest.approx(plain(**gather([Pictures(4)[i] for i in range(4)])).loss.item(), rel=1e-5)


def two(net: torch.nn.Module, targets: str, other: str = "fast") -> torch.nn.Module:
    adapted = get_peft_model(net, LoraConfig(r=2, target_modules=targets), adapter_name="slow")
    adapted.add_adapter(other, LoraConfig(r=2, target_modules=targets))
    return adapted


@pytest.mark.parametrize(
    "adapted",
    [
        lambda net: net,
        lambda net: lora.add_lora(net, rank=2),
        lambda net: two(net, TARGETS, other="quick"),
        lambda net: two(net, rf"{TARGETS}|lm_head"),
        lambda net: two(net, r".*\.q_proj"),  # the tower's too
    ],
    ids=["no LoRA", "one LoRA", "another name", "on lm_head", "on the tower"],
)
def test_a_model_without_two_views_is_refused(llava, adapted):
    with pytest.raises(UserError, match='two LoRA adapters, "fast" and "slow"'):
        DualSpeed(adapted(llava), views=True)
