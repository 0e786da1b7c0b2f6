"""Are times proportional to the planner's FLOPs? Steps of models with random weights, timed on this machine.

    python -m scale.measure

The planner multiplies: if a slow step has 2.6 times the FLOPs of a fast one, it shall take 2.6 times as long. Here
that is tried, on one machine, for the modes of models of two depths: forward and backward of a micro-batch (without
the optimizer, which the planner leaves out too), the shortest of several times, beside `tinyspeed.estimate.flops` of
the same samples. On a CPU it is the process's own time that counts, of one thread, in fp32 and 512 wide; on a GPU
models are as wide as LLaVA-1.5-7B and run in bf16. What it cannot check is the network.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tinyspeed import DualSpeed
from tinyspeed.bench.estimate import flops
from tinyspeed.models import precision, trainable
from tinyspeed.models.memory import Settings, Shape
from tinyspeed.scheduler import Plan
from tinyspeed.util.tables import table

TEXT, ANSWERS, IMAGE, KEEP = 100, 60, 3, 0.1
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
    """The modes of a model with so many layers."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.inner, num_hidden_layers=layers,
        num_attention_heads=size.hidden // 64, pad_token_id=2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=size.tower, intermediate_size=4 * size.tower, num_hidden_layers=layers,
        num_attention_heads=size.tower // 64, image_size=size.pixels, patch_size=14,
    )  # fmt: skip
    visual = (size.pixels // 14) ** 2
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=visual)
    net = LlavaForConditionalGeneration(config)
    model = DualSpeed(net).to(device)
    trainable.set_trainable(model.model, "train")
    model.train()

    ids = torch.randint(4, size.vocab, (size.samples, visual + TEXT))
    ids[:, 1 : visual + 1] = IMAGE
    labels = ids.clone()
    labels[:, :-ANSWERS] = -100
    pixels = torch.randn(size.samples, 3, size.pixels, size.pixels)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, "labels": labels}
    batch = {name: value.to(device) for name, value in batch.items()}
    name = "bf16" if device.type == "cuda" else "fp32"
    s, shape, found = Settings(precision=name), Shape(config), []
    for mode in MODES:
        plan = Plan(mode, keep=KEEP, distill=float(mode == "slow"))

        def step(plan: Plan = plan) -> None:
            with precision.autocast(name, device):
                loss = model(**batch, plan=plan).loss
            loss.backward()
            model.zero_grad(set_to_none=True)

        work = size.samples * flops(shape, s, mode, (TEXT, [visual], ANSWERS), recompute=False)
        found.append(Timed(layers, mode, work, _shortest(step, size.repeats, device)))
    return found


def _shortest(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    cuda = device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    seconds = []
    for _ in range(repeats + 1):  # the first one pays for memory that later ones use again
        began = clock()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(clock() - began)
    return min(seconds[1:])


def measure(device: torch.device, size: Size | None = None, layers: tuple[int, ...] = (2, 6)) -> list[Timed]:
    size = size or (GPU if device.type == "cuda" else Size())
    return [timed for n in layers for timed in steps(n, size, device)]


def describe(found: list[Timed]) -> str:
    """Against the fast step of the same model, and the smaller model's step of the same mode."""
    of = {(timed.layers, timed.mode): timed for timed in found}
    first = min(timed.layers for timed in found)
    rows = []
    for timed in found:
        fast, small = of[timed.layers, "fast"], of[first, timed.mode]
        row = [timed.layers, timed.mode, f"{timed.flops / 1e9:.3g}", f"{1e3 * timed.seconds:.3g}"]
        row += [f"{timed.flops / fast.flops:.2f}x", f"{timed.seconds / fast.seconds:.2f}x"]
        row += [f"{timed.flops / small.flops:.2f}x", f"{timed.seconds / small.seconds:.2f}x"]
        rows.append([*row, f"{timed.flops / timed.seconds / 1e9:,.3g}"])
    beside = [f"{kind}, {word}" for kind in ("to fast", f"to {first} layers") for word in ("FLOPs", "time")]
    return table(["layers", "mode", "GFLOP", "ms", *beside, "GFLOP/s"], rows)


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    print(describe(measure(device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
