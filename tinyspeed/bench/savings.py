"""What leaving out rows, layers and answers saves, measured beside what the arithmetic promises.

    tinyspeed bench savings

A plan that skips half of the layers promises nearly half of a step's time. Whether it keeps that promise depends on
what is not arithmetic: gathers, hooks, small products. So every plan's step, forward and backward, is timed beside the
full one, on a model whose depth and proportions are an LLM's and whose size is a CPU's, and its FLOPs are counted while
it runs (by torch, which knows nothing of plans; of attention it counts the half above the diagonal too):

    kept of the promise = (1 - seconds / full seconds) / (1 - FLOPs / full FLOPs)

Answers are long here, for ReGATE to have something to skip: 240 tokens behind a question of 16 and a picture of 144.
"""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..data import digits, digits_model
from ..dualspeed import DualSpeed
from ..models.precision import device_of
from ..rows import IGNORE
from ..scheduler import Plan
from ..util.errors import UserError
from ..util.tables import table
from . import bars
from .bars import Bar
from .timing import described, faster, finish, timed

ON_A_CPU = {  # which torch does not count by itself
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out, q, k, v)
    ),
}
SAMPLES, QUESTION, ANSWER = 4, 16, 240


def plans(layers: int) -> dict[str, Plan]:
    """The systems, alone and together; the layers that run are spread evenly."""
    three_of_four = tuple(i for i in range(layers) if i % 4 != 2)
    every_other = tuple(range(0, layers, 2))
    return {
        "full": Plan("full"),
        "fast: 10 % of the picture": Plan("fast", keep=0.1),
        "3/4 of the layers": Plan("full", layers=three_of_four),
        "1/2 of the layers": Plan("full", layers=every_other),
        "1/2 of the answers": Plan("full", answer_keep=0.5),
        "fast, 3/4 of the layers": Plan("fast", keep=0.1, layers=three_of_four),
        "fast, 1/2 of the answers": Plan("fast", keep=0.1, answer_keep=0.5),
        "fast, 3/4 of the layers, 1/2 of the answers": Plan("fast", keep=0.1, layers=three_of_four, answer_keep=0.5),
    }


def bench_savings(
    layers: int = 16,
    width: int = 256,
    repeats: int = 15,
    device: str = "cpu",
    out: Path | str | None = None,
    png: Path | str | None = None,
) -> dict:
    """Time a step of each plan. Prints a table, returns everything, and writes it as JSON to `out` and as a picture to
    `png`."""
    if layers < 4 or width < 8 or width % 8:
        raise UserError(f"layers = {layers}, width = {width}: give at least 4, and a multiple of 8")
    where = device_of(device)
    net = digits_model.build_model(0, width=width, layers=layers).to(where).train()
    net.model.vision_tower.requires_grad_(False)
    model, batch = DualSpeed(net).train(), _batch(net, where)
    answers = batch.pop("stays")

    def step(plan: Plan) -> None:
        model.step = 0
        more = {"answers": answers} if plan.answer_keep < 1 else {}
        model(**batch, plan=plan, **more).loss.backward()
        model.zero_grad(set_to_none=True)

    asked = plans(layers)
    flops = {}
    for name, plan in asked.items():
        with FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
            step(plan)
        flops[name] = counter.get_total_flops()
    times = timed({name: lambda plan=plan: step(plan) for name, plan in asked.items()}, repeats, where)
    found = {}
    for name, t in times.items():
        speedup = faster(times["full"], t)
        saved, promised = 1 - 1 / speedup, 1 - flops[name] / flops["full"]
        found[name] = {
            **t, "flops": flops[name], "speedup": speedup, "promised": flops["full"] / flops[name],
            "kept": saved / promised if promised else None,
        }  # fmt: skip
    result = described(where, bench="savings", layers=layers, width=width, repeats=repeats, plans=found)
    said = f"{layers} layers of width {width}, {SAMPLES} samples, median of {repeats}"
    return finish(said, result, describe, draw, out, png)


def describe(result: dict) -> str:
    headers = ["a step", "median", "speed-up", "promised", "kept of the promise"]
    return table(headers, [_line(name, f) for name, f in result["plans"].items()])


def draw(result: dict):
    """The dark part of a bar is what the FLOPs promise."""
    full = result["plans"]["full"]["median_ms"]
    found = [
        Bar(name, f["median_ms"], f"{f['speedup']:.2f}x", full / f["promised"], name != "full")
        for name, f in result["plans"].items()
    ]
    return bars.draw({"a step": found}, "ms; dark: as promised")


def _line(name: str, f: dict) -> list[str]:
    kept = "-" if f["kept"] is None else f"{f['kept']:.0%}"
    return [name, f"{f['median_ms']:.1f} ms", f"{f['speedup']:.2f}x", f"{f['promised']:.2f}x", kept]


def _batch(net: torch.nn.Module, where: torch.device) -> dict[str, torch.Tensor]:
    """Samples of one picture each, and `stays`, every other answer token."""
    c = net.config
    cells = (c.vision_config.image_size // c.vision_config.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(
        len(digits.SPECIAL), c.text_config.vocab_size, (SAMPLES, QUESTION + ANSWER), generator=generator
    )
    ids = torch.cat([torch.full((SAMPLES, cells), c.image_token_id), text], dim=1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < cells + QUESTION, IGNORE)
    stays = torch.ones_like(ids, dtype=torch.bool)
    stays[:, cells + QUESTION :: 2] = False
    size = c.vision_config.image_size
    made = {"input_ids": ids, "labels": labels, "stays": stays}
    made["pixel_values"] = torch.rand(SAMPLES, 3, size, size, generator=generator)
    return {name: tensor.to(where) for name, tensor in made.items()}
