"""Are times proportional to the planner's FLOPs? Times steps of models with random weights on this machine.

    python tutorials/flops_and_times.py

The planner multiplies: if a slow step has 2.6 times the FLOPs of a fast one, it should take 2.6 times as long. This is
tried here for the modes of models of two depths: forward and backward of a micro-batch (without the optimizer, which
the planner leaves out too), the shortest of several rounds, beside `bench.estimate.flops` of the same samples. On a CPU
that is one thread, fp32 and 512 wide; on a GPU the models are as wide as LLaVA-1.5-7B and run in bf16. The network is
not checked.
"""

import sys
from dataclasses import dataclass
from functools import partial

import torch
from transformers import AutoModelForImageTextToText

from tinyspeed import DualSpeed
from tinyspeed.bench.estimate import flops
from tinyspeed.bench.harness import time_in_turns
from tinyspeed.bench.random_examples import RandomExamples
from tinyspeed.data.examples import collate
from tinyspeed.models import precision, published, stages
from tinyspeed.models.memory import Settings, Shape
from tinyspeed.scheduler import Plan
from tinyspeed.util.tables import table

TEXT, ANSWERS, KEEP = 100, 60, 0.1
MODES = ("fast", "slow", "full")


@dataclass(frozen=True)
class Size:
    hidden: int = 512
    inner: int = 1376
    vocab: int = 2048
    tower: int = 128
    pixels: int = 336  # patches of 14: 576 visual rows
    samples: int = 2
    repeats: int = 5


GPU = Size(4096, 11008, 32064, 1024, samples=8, repeats=10)


@dataclass(frozen=True)
class Timed:
    layers: int
    mode: str
    flops: float
    seconds: float


def steps(layers: int, size: Size, device: torch.device) -> list[Timed]:
    """Times each mode of a model with this many layers."""
    torch.manual_seed(0)
    text = published.vicuna(size.hidden, size.inner, layers, size.hidden // 64, vocab_size=size.vocab)
    vision = published.clip(
        hidden_size=size.tower, intermediate_size=4 * size.tower, num_hidden_layers=layers,
        num_attention_heads=size.tower // 64, image_size=size.pixels,
    )  # fmt: skip
    config = published.llava("1.5", text, vision)
    model = DualSpeed(AutoModelForImageTextToText.from_config(config, trust_remote_code=False)).to(device)
    stages.set_trainable(model.model, "train")
    model.train().step = 0

    sample = (TEXT, [(size.pixels // 14) ** 2], ANSWERS)
    source = RandomExamples(config, [sample] * size.samples)
    batch = collate([source.example(i) for i in range(size.samples)], pad=0)
    batch = {name: value.to(device) for name, value in batch.items()}
    name = "bf16" if device.type == "cuda" else "fp32"

    def step(plan: Plan) -> None:
        with precision.autocast(name, device):
            loss = model(**batch, plan=plan).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    plans = [Plan(mode, keep=KEEP, distill=float(mode == "slow")) for mode in MODES]
    times = time_in_turns({plan.mode: partial(step, plan) for plan in plans}, size.repeats, device)
    work = partial(flops, Shape(config), Settings(precision=name), sample=sample, recompute=False)
    return [Timed(layers, mode, size.samples * work(mode=mode), times[mode]["min_ms"] / 1000) for mode in MODES]


def measure(device: torch.device, size: Size, layers: tuple[int, ...] = (2, 6)) -> list[Timed]:
    return [found for n in layers for found in steps(n, size, device)]


def describe(found: list[Timed]) -> str:
    """Compares with the fast step of the same model, and with the smaller model's step of the same mode."""
    by_name = {(a.layers, a.mode): a for a in found}
    first = min(a.layers for a in found)
    rows = []
    for a in found:
        row = [a.layers, a.mode, f"{a.flops / 1e9:.3g}", f"{1e3 * a.seconds:.3g}"]
        for b in (by_name[a.layers, "fast"], by_name[first, a.mode]):
            row += [f"{a.flops / b.flops:.2f}x", f"{a.seconds / b.seconds:.2f}x"]
        rows.append([*row, f"{a.flops / a.seconds / 1e9:,.3g}"])
    beside = [f"{kind}, {word}" for kind in ("to fast", f"to {first} layers") for word in ("FLOPs", "time")]
    return table(["layers", "mode", "GFLOP", "ms", *beside, "GFLOP/s"], rows)


def main() -> int:
    device, size = precision.device_of("auto"), GPU
    if device.type == "cpu":
        torch.set_num_threads(1)
        size = Size()
    print(describe(measure(device, size)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
