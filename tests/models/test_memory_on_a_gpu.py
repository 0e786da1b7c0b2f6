"""What a step keeps for its backward on a pretend GPU, at LLaVA-1.5-7B's true width, against the formulas."""

import pytest
import torch
from support import pretend_cuda
from transformers import AutoModelForImageTextToText

from tinyspeed import DualSpeed
from tinyspeed.models import lean, lora, memory, precision, published, stages
from tinyspeed.models.lean import Source
from tinyspeed.models.memory import MicroBatch, Settings, Shape, Step
from tinyspeed.scheduler import Plan

pytestmark = pytest.mark.skipif(bool(pretend_cuda.unavailable()), reason=pretend_cuda.unavailable() or "available")
SAMPLES, TEXT, ANSWERS, CELLS = 2, 100, 50, 576
LORA = Settings("bf16", rank=64, dropout=0.05)


def kept(s: Settings, mode: str, layers: int) -> tuple[int, int]:
    """Bytes of the weights, and of what the forward of two samples leaves for the backward."""
    config = published.KNOWN["llava-hf/llava-1.5-7b-hf"]()
    config.text_config.num_hidden_layers = layers
    with torch.device("meta"):
        net = AutoModelForImageTextToText.from_config(config, dtype=precision.DTYPES[s.precision])
    ids = torch.full((SAMPLES, TEXT + CELLS), 7)
    ids[:, 5 : 5 + CELLS] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWERS:] = 7
    with pretend_cuda.device(data=False) as gpu:
        net = lora.add_lora(net, rank=s.rank, dropout=s.dropout) if s.rank else net
        stages.set_trainable(net, s.stage)
        model = DualSpeed(net.to("cuda"), keep=s.keep, plugin=s.plugin).train()
        model.step, weights = 0, gpu.alive
        pixels = torch.empty(SAMPLES, 3, 336, 336, device="cuda")
        before = gpu.alive
        gpu.waits.clear()
        with precision.autocast(s.precision, torch.device("cuda")):
            plan = Plan(mode, keep=s.keep, distill=float(mode == "slow"))
            out = model(input_ids=ids, labels=labels, pixel_values=pixels, plan=plan)
        found = gpu.alive - before
        assert not gpu.waits
        out.loss.backward()
    return weights, found


def formula(s: Settings, mode: str, layers: int) -> tuple[int, int]:
    config = published.KNOWN["llava-hf/llava-1.5-7b-hf"]()
    config.text_config.num_hidden_layers = layers
    shape = Shape(config)
    batch = MicroBatch.of(mode, TEXT, [CELLS], ANSWERS, s, SAMPLES)
    return memory.fixed(shape, s).weights, Step(shape, s, batch, recompute=False).kept


@pytest.mark.parametrize("mode", ["fast", "full"])
def test_the_formulas_know_what_a_step_keeps(mode):
    assert kept(LORA, mode, 1) == pytest.approx(formula(LORA, mode, 1), rel=0.01)


def test_a_mask_kept_in_fp32_is_found(monkeypatch):
    def careless(x):
        return Source(lambda x, mask: x, (x, torch.ones_like(x, dtype=torch.float32)))

    monkeypatch.setattr(lean, "source", careless)
    assert kept(LORA, "full", 1)[1] > 1.05 * formula(LORA, "full", 1)[1]
