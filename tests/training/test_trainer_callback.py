"""Drop-in: `transformers.Trainer` trains a DualSpeed, and a trainer that goes around it is found out."""

import pytest
import torch
from support.trainers import Pictures, adapting, arguments, gather, wrapped
from transformers import Trainer

from tinyspeed import DualSpeed, UserError
from tinyspeed.data import digits_model
from tinyspeed.scheduler import FastSchedule, PeriodicSchedule
from tinyspeed.training.trainer_callback import SetStep


def test_trainer_trains_it_and_every_step_has_its_own_plan(tmp_path):
    model, asked = wrapped(schedule=PeriodicSchedule(slow=0.5, keep=0.1)), []
    model.schedule.plan, plan = lambda step: asked.append(step) or plan(step), model.schedule.plan
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = Trainer(
        model, arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=Pictures(100), data_collator=gather,
        callbacks=[SetStep(model)],
    )  # fmt: skip
    trainer.train()
    assert asked == [step for step in range(6) for _ in range(2)], "both micro-batches of a step share its plan"
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"model", "isolator"}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_the_loss_is_token_weighted_over_accumulated_batches(tmp_path):
    """Accumulating 4 x 2 equals one batch of 8: the Trainer passes the number of answers of the whole step."""
    ends = []
    for size, accumulate in ((8, 1), (2, 4)):
        model = wrapped(schedule=FastSchedule(0.1))
        run = arguments(
            tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
            optim="sgd", learning_rate=0.1, seed=1,
        )  # fmt: skip
        Trainer(model, run, train_dataset=Pictures(64), data_collator=gather, callbacks=[SetStep(model)]).train()
        ends.append({name: p.detach() for name, p in model.named_parameters()})
    for name in ends[0]:
        assert torch.allclose(ends[0][name], ends[1][name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora_on_a_bf16_model_as_the_readme_has_it(tmp_path, checkpointing):
    from peft import LoraConfig, get_peft_model

    base = digits_model.build_model(0, width=32, layers=2, tower_width=16, tower_layers=1).bfloat16()
    before = {name: p.clone() for name, p in base.named_parameters()}
    lora = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*_proj"))
    base.model.multi_modal_projector.float().requires_grad_(True)
    model = DualSpeed(lora, schedule=PeriodicSchedule(slow=0.5, keep=0.1))
    run = arguments(tmp_path, max_steps=4, bf16=True, label_names=["labels"], gradient_checkpointing=checkpointing)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "projector" in name or name == "isolator.weight" for name in trained)
    Trainer(model, run, train_dataset=Pictures(40), data_collator=gather, callbacks=[SetStep(model)]).train()
    for name, p in model.named_parameters():
        if name in trained:
            assert p.dtype == torch.float32
            assert p.isfinite().all()
            assert "lora_A" in name or not torch.equal(p, trained[name]), name  # A moves once B is no longer zero
    lora.merge_and_unload().to("cpu").bfloat16().save_pretrained(tmp_path / "final")
    plain = type(base).from_pretrained(tmp_path / "final", dtype=torch.bfloat16)
    changed = {name for name, p in plain.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[1] for name in changed} == {"language_model", "multi_modal_projector"}


def test_evaluation_under_the_trainer_is_the_plain_model(tmp_path):
    model = wrapped()
    trainer = Trainer(model, arguments(tmp_path), eval_dataset=Pictures(4), data_collator=gather)
    plain = model.model.eval()(**gather([Pictures(4)[i] for i in range(4)])).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain.item(), rel=1e-5)


def test_a_forgotten_callback_is_an_error_and_not_one_mode_for_ever(tmp_path):
    trainer = Trainer(wrapped(), arguments(tmp_path), train_dataset=Pictures(40), data_collator=gather)
    with pytest.raises(UserError, match="which step is it"):
        trainer.train()


class Around(Trainer):
    """What SFTTrainer can do: it calls the wrapped model itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model.model(**inputs).loss


def test_a_trainer_that_goes_around_us_is_stopped_at_its_first_step(tmp_path):
    model = wrapped()
    trainer = Around(
        model, arguments(tmp_path), train_dataset=Pictures(40), data_collator=gather, callbacks=[SetStep(model)]
    )
    with pytest.raises(UserError, match="without DualSpeed's forward"):
        trainer.train()


def sft(tmp_path, model: DualSpeed, *, own_loss: bool, **more) -> Trainer:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    kind = type("Sft", (trl.SFTTrainer,), {} if own_loss else {"compute_loss": Trainer.compute_loss})
    run = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True,
        remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True,
    )  # fmt: skip
    from datasets import Dataset

    numbers = Dataset.from_dict({"i": list(range(16)), "images": [None] * 16, "messages": [[]] * 16})
    pictures = Pictures(16)
    return kind(
        model, run, train_dataset=numbers, data_collator=lambda items: gather([pictures[x["i"]] for x in items]),
        processing_class=digits_model.build_processor(), callbacks=[SetStep(model)], **more,
    )  # fmt: skip


def test_trl_with_compute_loss_given_back(tmp_path):
    model = wrapped()
    sft(tmp_path, model, own_loss=False).train()
    assert model.forwards >= 2


def test_trl_as_it_is_says_what_it_needs(tmp_path):
    from peft import LoraConfig

    with pytest.raises(AttributeError, match=r"no base_model: give .*`compute_loss = Trainer\.compute_loss`"):
        sft(tmp_path, wrapped(), own_loss=True).train()
    with pytest.raises(AttributeError, match=r"no base_model_prefix: .*call add_lora before DualSpeed"):
        sft(tmp_path, wrapped(), own_loss=False, peft_config=LoraConfig(target_modules="all-linear"))
    assert not hasattr(wrapped(), "base_model"), "whoever asks whether there is one is told that there is none"


def test_the_schedule_hears_what_all_micro_batches_of_a_step_saw(tmp_path):
    """As if each step had been one batch, which a loop of our own observes."""
    pictures, model, other = Pictures(64), adapting(), adapting()
    given = arguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.1,
        max_grad_norm=0.0, max_steps=8,
    )  # fmt: skip
    trainer = Trainer(model, given, train_dataset=pictures, data_collator=gather, callbacks=[SetStep(model)])
    chosen = [i for part in trainer.get_train_dataloader().batch_sampler for i in part]
    trainer.train()
    for step in range(8):
        batch = gather([pictures[i] for i in chosen[4 * step : 4 * step + 4]])
        plan = other.schedule.plan(step)
        out = other(**batch, plan=plan)
        out.loss.backward()
        other.schedule.observe(plan, {"step": step, **out.metrics})
        for p in other.parameters():
            if p.grad is not None:
                p.data -= 0.1 * p.grad
                p.grad = None
    (adaptive, skipper), (same, also) = ((s.schedule, s.parts[0]) for s in (model.schedule, other.schedule))
    assert adaptive.shares == pytest.approx(same.shares, rel=0.02)
    assert len(set(adaptive.shares)) > 1
    assert skipper.sums == pytest.approx(also.sums, rel=1e-3)
    assert skipper.answers == pytest.approx(also.answers)
    assert skipper.answers > 0
