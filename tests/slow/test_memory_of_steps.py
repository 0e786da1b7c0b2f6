"""The memory formulas against real steps of small models: what autograd keeps for the backward pass, and the peak."""

import contextlib
import functools
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.memory_models import ANSWERS, LAYERS, SETTINGS, TEXT, batch_of, small
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from tinyspeed import DualSpeed
from tinyspeed.bench.peak_memory import LiveStorages, storages
from tinyspeed.models import loading, lora, memory, precision, stages
from tinyspeed.models.memory import MicroBatch, Settings, Shape, Step
from tinyspeed.scheduler import Plan


@functools.lru_cache(maxsize=1)  # the cases of one model follow each other
def built(s: Settings, folder, **shape) -> DualSpeed:
    torch.manual_seed(0)
    net = AutoModelForImageTextToText.from_config(small(**shape))
    if s.quantise == "none":
        net = net.to(precision.DTYPES[s.precision])
    else:
        net.save_pretrained(folder)
        net = loading.load_model(folder, s.precision, quantise=s.quantise)
    if s.rank:
        net = lora.add_lora(net, rank=s.rank, dropout=s.dropout, views=s.views == 2)
    model = DualSpeed(net, plugin=s.plugin, keep=s.keep, isolator=s.isolator, views=s.views == 2)
    stages.set_trainable(model.model, s.stage)
    return model.train()


@contextlib.contextmanager
def as_on_a_gpu(monkeypatch):
    """Dropout is one kernel that keeps a mask of bytes."""
    with monkeypatch.context() as patch:
        patch.setattr(F, "dropout", lambda x, p, training, inplace: torch.native_dropout(x, p, training)[0])
        yield


def counted(model, batch, plan, s: Settings) -> tuple[int, int]:
    """What autograd saved of a step, and the peak of the next one, which finds gradients there."""
    model.step, saved = 0, {}
    known = set(storages(model))

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def forward():
        with precision.autocast(s.precision, torch.device("cpu")):
            return model(**batch, plan=plan).loss

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    loss.backward()
    saved.clear()
    del loss
    pixels = batch["pixel_values"].nbytes
    with LiveStorages(set(storages(model)) | {value.untyped_storage().data_ptr() for value in batch.values()}) as live:
        forward().backward()
    return kept, live.peak + pixels


STEPS = [("full", False), ("fast", True), ("slow", True)], [("full", True), ("fast", False), ("slow", False)]


CASES = [(name, *step) for number, name in enumerate(SETTINGS) for step in STEPS[number % 2]]


def both(monkeypatch, folder, s, mode, recompute, samples=2, text=TEXT, answers=ANSWERS, **shape):
    """What the formula says of a step, and the bytes that were counted: kept for the backward pass, and at the peak."""
    model, config = built(s, folder, **shape), small(**shape)
    model.zero_grad()
    model.activation_checkpointing_enable()
    model.vlm.recompute(recompute)
    batch, visual = batch_of(config, samples, text, answers)
    plan = Plan(mode, keep=s.keep, distill=float(mode == "slow"))
    with as_on_a_gpu(monkeypatch):
        kept, peak = counted(model, batch, plan, s)
    step = Step(Shape(config), s, MicroBatch.of(mode, text, [visual], answers, s, samples), recompute)
    print(f"kept {kept:,}, formula {step.kept:,} ({step.kept / kept - 1:+.1%})", end="; ")
    print(
        f"peak {peak:,}, formula {step.peak:,} ({step.peak / peak - 1:+.1%}, {max(step.phases, key=step.phases.get)})"
    )
    return step, kept, peak


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.mark.parametrize(("name", "mode", "recompute"), CASES)
def test_a_step_of_llava(monkeypatch, folder, name, mode, recompute):
    step, kept, peak = both(monkeypatch, folder, SETTINGS[name], mode, recompute)
    assert step.kept == pytest.approx(kept, rel=0.05)
    assert step.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("name", "mode", "recompute"), [case for case in CASES if "bf16" in case or "4-bit" in case[0]]
)
def test_a_step_of_llava_next(monkeypatch, folder, name, mode, recompute):
    step, kept, peak = both(monkeypatch, folder, SETTINGS[name], mode, recompute, samples=1, family="llava_next")
    assert step.kept == pytest.approx(kept, rel=0.05)
    # So small a model may hold the most while it prunes, and what a plugin holds of a pair of rows is an upper bound.
    assert step.peak == pytest.approx(peak, rel=0.2 if step.peak == step.phases["pruning"] else 0.1)


@pytest.mark.parametrize("mode", ["full", "slow"])
def test_the_loss_of_many_answers_in_chunks(monkeypatch, folder, mode):
    how = {"samples": 4, "text": 320, "answers": 300, "hidden": 64, "layers": 1, "vocab": 4000}
    step, kept, peak = both(monkeypatch, folder, SETTINGS["bf16 LoRA"], mode, True, **how)
    assert step.kept == pytest.approx(kept, rel=0.05)
    assert step.peak == pytest.approx(peak, rel=0.1)


def test_a_large_tower(monkeypatch, folder):
    step, kept, peak = both(monkeypatch, folder, SETTINGS["fp32"], "fast", True, hidden=32, layers=1, tower=128)
    assert step.kept == pytest.approx(kept, rel=0.05)
    assert step.peak == pytest.approx(peak, rel=0.1)


def test_four_bit_weights_weigh_what_is_said(folder):
    s = SETTINGS["4-bit LoRA"]
    model = built(s, folder)
    found = {}
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            parts = (module.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            found[module.weight] = sum(part.nbytes for part in parts)  # once, though adapters show it again
    shape = Shape(small())
    assert sum(found.values()) == LAYERS * sum(memory.nf4(out * into) for out, into in shape.linears)
    others = sum(p.nbytes for name, p in model.named_parameters() if p.dtype != torch.uint8)
    assert memory.fixed(shape, s).weights == sum(found.values()) + others


ROOT = Path(__file__).parents[2]
FAULTS = """
import resource
import torch
from tinyspeed.util import malloc

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
kept = malloc.keep_freed_memory()
faults()
print(kept, given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_memory_that_is_kept_needs_no_new_pages():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT)
    kept, before, after = done.stdout.split()
    assert kept == "True"
    assert int(after) < int(before) / 10
