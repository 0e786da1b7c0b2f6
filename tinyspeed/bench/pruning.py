"""What choosing the rows costs: beside the loop that people run today, and beside a step.

Floor: the batched product x @ x.mT, which every similarity plugin has to make; no speed-up over the loop can be above
the floor's own. Loop: DivPrune image by image, as its official codes run it; and the same loop mended, which tells how
much of our speed is arithmetic saved and how much is doing all images at once. Learned plugins are timed with their
sums and their backward, the others with the choice alone. What a plugin is of a fast step: its time beside that of a 7B
model's LoRA step on as many images of as many rows, whose arithmetic is counted, at the rate of an LLM-sized product
timed in the same run (bf16 on a GPU). Real steps are slower than that, so the true share is smaller.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import pruning
from ..models import published
from ..models.memory import Settings, Shape
from ..models.precision import device_of
from ..util.errors import UserError
from ..util.tables import table
from . import bars, estimate
from .bars import Bar
from .timing import described, finish, product, timed

PRODUCT, LOOP, MENDED, RATE = "product", "loop", "loop, mended", "LLM product"
MODEL, WIDTH = "llava-hf/llava-1.5-7b-hf", 4096  # and of its features


def bench_pruning(
    shape: tuple[int, int, int] = (16, 576, 1024),
    keep: float = 0.1,
    repeats: int = 20,
    device: str = "cpu",
    out: Path | str | None = None,
    png: Path | str | None = None,
) -> dict:
    """Time every plugin on `shape` = (images, rows, width) random float32 features.

    Whether DivPrune's picks are the loop's is checked in the same run: "same_rows" is the share of its rows that the
    loop kept too (1.0, but for float ties). Prints a table, returns everything, and writes it as JSON to `out` and as a
    picture to `png`.
    """
    if len(shape) != 3 or min(shape) < 1 or shape[1] < 2:
        raise UserError(f"shape = {tuple(shape)}: give images, rows (at least 2) and width")
    where = device_of(device)
    images, n, width = shape
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(where)
    count = pruning.select("divprune", x, keep=keep).shape[1]
    contestants: dict[str, Callable[[], Tensor]] = {
        PRODUCT: lambda: x @ x.mT,
        LOOP: lambda: divprune_loop(x, count),
        MENDED: lambda: divprune_loop(x, count, mended=True),
    }
    contestants[RATE], flops = product(where, torch.float32 if where.type == "cpu" else torch.bfloat16)
    signals = {"cls_attention": x[:, :, 0].abs(), "keys": x[:, :, :64], "tower": x}
    for name in pruning.works_with(signals):
        if module := pruning.make(name, width, count):
            module.to(where)
            contestants[name] = lambda name=name, module=module: learn(name, x, keep, module)
        else:
            contestants[name] = lambda name=name: pruning.select(name, x, keep=keep, signals=signals)
    times = timed(contestants, repeats, where)
    step_ms = fast_step(images, n, keep) / flops * times[RATE]["median_ms"]
    picks = contestants["divprune"]()
    result = described(
        where,
        bench="pruning",
        shape=list(shape),
        keep=keep,
        count=count,
        repeats=repeats,
        contestants={
            name: {
                **t,
                "over_product": t["median_ms"] / times[PRODUCT]["median_ms"],
                "speedup_over_loop": times[LOOP]["median_ms"] / t["median_ms"],
                "of_fast_step": t["median_ms"] / step_ms,
            }
            for name, t in times.items()
        },
        same_rows={name: shared(picks, contestants[name]()) for name in (LOOP, MENDED)},
        fast_step_ms=step_ms,
    )
    said = (
        f"{count} of {n} rows of {images} images, width {width}, float32, median of {repeats}; "
        f"divprune keeps {result['same_rows'][LOOP]:.2%} of the loop's rows"
    )
    return finish(said, result, describe, draw, out, png)


def describe(result: dict) -> str:
    headers = ["contestant", "median", "min", "x product", "speed-up over loop"]
    if result["shape"][-1] == WIDTH:
        headers.append("of a 7B fast step")
    return table(headers, [_line(name, t)[: len(headers)] for name, t in result["contestants"].items()])


def draw(result: dict):
    found = [
        Bar(name, t["median_ms"], f"{t['over_product']:.2f}x", ours=name not in (PRODUCT, LOOP, MENDED, RATE))
        for name, t in result["contestants"].items()
    ]
    return bars.draw({"choosing the rows": found}, "ms; beside it, over the product's")


def _line(name: str, t: dict) -> list[str]:
    return [
        name,
        f"{t['median_ms']:.2f} ms",
        f"{t['min_ms']:.2f} ms",
        f"{t['over_product']:.2f}x",
        f"{t['speedup_over_loop']:.2f}x",
        f"{t['of_fast_step']:.2%}",
    ]


def learn(name: str, x: Tensor, keep: float, module: nn.Module) -> None:
    """What a learned plugin takes of a training step."""
    found = pruning.choose(name, x, keep=keep, module=module)
    ((found.weight @ x).sum() + (0 if found.loss is None else found.loss.sum())).backward()


def fast_step(images: int, rows: int, keep: float) -> float:
    """FLOPs of a fast step of LLaVA-1.5-7B, forward and backward, LoRA without recompute, with an image a sample."""
    settings, sample = Settings("bf16", rank=64, keep=keep), (estimate.TEXT, [rows], estimate.ANSWERS)
    return images * estimate.flops(Shape(published.KNOWN[MODEL]()), settings, "fast", sample, False)


def divprune_loop(features: Tensor, count: int, mended: bool = False) -> Tensor:
    """DivPrune as it is run today, image by image: the first row by a top-2 over every column, then at every step the
    distances of all rows chosen so far gathered anew and their minimum taken, O(K^2 N).

    `mended` keeps the loop over images and does the rest well: the diagonal is masked, which needs no top-2, and the
    minimum is carried along, O(KN). Both are written from the description, with the operations that the official codes
    choose, among them a minimum that returns indices nobody reads.
    """
    kept = []
    for x in features:
        x = x / x.norm(dim=1, keepdim=True)
        distance = 1 - x @ x.T
        chosen = torch.zeros(count, dtype=torch.int64, device=x.device)
        if mended:
            chosen[0] = distance.fill_diagonal_(float("inf")).amin(0).argmax()
            nearest = distance.fill_diagonal_(-float("inf"))[chosen[0]]  # and no row is chosen twice
        else:
            chosen[0] = distance.topk(2, dim=0, largest=False).values[1].argmax()
        for k in range(1, count):
            if not mended:
                nearest = distance[chosen[:k]].min(dim=0).values
            elif k > 1:
                nearest = torch.minimum(nearest, distance[chosen[k - 1]])
            chosen[k] = nearest.argmax()
        kept.append(chosen.sort().values)
    return torch.stack(kept)


def shared(a: Tensor, b: Tensor) -> float:
    """The share of the rows in `a` (B, K) that `b` (B, K) keeps too."""
    return (a[:, :, None] == b[:, None, :]).any(2).double().mean().item()
