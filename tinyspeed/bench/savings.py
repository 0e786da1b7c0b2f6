"""What leaving out rows, layers and answers saves, measured beside what the arithmetic promises.

    tinyspeed bench savings

A plan that skips half of the layers promises nearly half of a step's time. Whether it keeps that promise depends on
what is not arithmetic: gathers, hooks, small products. So a step of every plan, forward and backward, is timed beside
the full one, on a model whose depth and proportions are an LLM's and whose size is a CPU's. torch counts the FLOPs
while the step runs; it knows nothing of plans, and of attention it counts the half above the diagonal too:

    kept of the promise = (1 - seconds / full seconds) / (1 - FLOPs / full FLOPs)

Answers are long here, so that ReGATE has something to skip: 240 tokens after a question of 16 and a picture of 144.
"""

import functools

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..data import digits_model
from ..data.examples import collate
from ..dualspeed import DualSpeed
from ..rows import IGNORE
from ..scheduler import Plan
from ..util import UserError, tables
from .harness import Bar, Results, bar_chart, speedup, time_in_turns
from .random_examples import RandomExamples

ON_A_CPU = {  # which torch does not count by itself
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)
    ),
}
SAMPLES, QUESTION, ANSWER = 4, 16, 240


def plans(layers: int) -> dict[str, Plan]:
    """Returns each way of leaving something out, alone and combined. The layers that run are spread evenly. In the last
    one, kept tokens weigh as many as they stand for: what that costs is its time beside that of the fast step."""
    fast = functools.partial(Plan, "fast", keep=0.1, weigh=False)
    three_of_four = tuple(i for i in range(layers) if i % 4 != 2)
    every_other = tuple(range(0, layers, 2))
    return {
        "full": Plan("full"),
        "fast: 10 % of the picture": fast(),
        "3/4 of the layers": Plan("full", layers=three_of_four),
        "1/2 of the layers": Plan("full", layers=every_other),
        "1/2 of the answers": Plan("full", answer_keep=0.5),
        "fast, 3/4 of the layers": fast(layers=three_of_four),
        "fast, 1/2 of the answers": fast(answer_keep=0.5),
        "fast, 3/4 of the layers, 1/2 of the answers": fast(layers=three_of_four, answer_keep=0.5),
        "fast, with weights": fast(weigh=True),
    }


def measure(device: torch.device, layers: int = 16, width: int = 256, repeats: int = 15) -> Results:
    """Times a step of each plan, and counts its FLOPs."""
    if layers < 4 or width < 8 or width % 8:
        raise UserError(f"layers = {layers}, width = {width}: give at least 4, and a multiple of 8")
    print(f"{layers} layers of width {width}, {SAMPLES} samples, median of {repeats}")
    net = digits_model.build_model(0, width=width, layers=layers).to(device).train()
    net.model.vision_tower.requires_grad_(False)
    model, (batch, stays) = DualSpeed(net, weights="cells").train(), _batch(net.config, device)

    def step(plan: Plan) -> None:
        model.step = 0
        more = {"answers": stays} if plan.answer_keep < 1 else {}
        model(**batch, plan=plan, **more).loss.backward()
        model.zero_grad(set_to_none=True)

    flops = {}
    for name, plan in plans(layers).items():
        with FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
            step(plan)
        flops[name] = counter.get_total_flops()
    steps = {name: lambda plan=plan: step(plan) for name, plan in plans(layers).items()}
    found = time_in_turns(steps, repeats, device)
    for name, f in found.items():
        faster, promised = speedup(found["full"], f), flops["full"] / flops[name]
        kept = (1 - 1 / faster) / (1 - 1 / promised) if promised > 1 else None
        f |= {"flops": flops[name], "speedup": faster, "promised": promised, "kept": kept}
    results = {"layers": layers, "width": width, "repeats": repeats, "plans": found}
    yield describe(results), results


def _batch(config, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Returns samples of one picture each, and which tokens stay where half of the answer's are skipped."""
    cells = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    source = RandomExamples(config, [(QUESTION + ANSWER, [cells], ANSWER)] * SAMPLES)
    batch = collate([source.example(i) for i in range(SAMPLES)], 0)
    answer = batch["labels"] != IGNORE
    stays = ~answer | (answer.cumsum(1) % 2 == 0)
    return {name: tensor.to(device) for name, tensor in batch.items()}, stays.to(device)


def describe(results: dict) -> str:
    lines = []
    for name, f in results["plans"].items():
        kept = "-" if f["kept"] is None else f"{f['kept']:.0%}"
        lines.append([name, f"{f['median_ms']:.1f} ms", f"{f['speedup']:.2f}x", f"{f['promised']:.2f}x", kept])
    return tables.table(["step", "median", "speed-up", "promised", "kept of the promise"], lines)


def draw(results: dict):
    """Draws what the FLOPs promise as the dark part of a bar."""
    full = results["plans"]["full"]["median_ms"]
    found = [
        Bar(name, f["median_ms"], f"{f['speedup']:.2f}x", full / f["promised"], name != "full")
        for name, f in results["plans"].items()
    ]
    return bar_chart({"a step": found}, "ms; dark: as promised")
