"""What choosing the rows costs: beside the loop that people run today, and as a share of a step.

    product        the floor: the batched product x @ x.mT, which every similarity plugin has to make. No plugin can be
                   faster than the loop by more than the product is
    loop           DivPrune image by image, as its official codes run it
    loop, mended   the same loop without its waste, which tells how much of our speed comes from less arithmetic, and
                   how much from doing all images at once
    LLM product    a product of LLM-sized matrices (in bf16 on a GPU)

Learned plugins are timed with their sums and their backward, the others with the choice alone. The share of a fast step
is a plugin's time over that of a 7B model's LoRA step on as many images of as many rows: its FLOPs at the rate of the
LLM product. Real steps are slower than that, so the true share is smaller.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import pruning
from ..models import published
from ..models.memory import Settings, Shape
from ..util import UserError, tables
from . import estimate
from .harness import Bar, Results, bar_chart, matrix_product, time_in_turns

PRODUCT, LOOP, MENDED, RATE = "product", "loop", "loop, mended", "LLM product"
MODEL, WIDTH = "llava-hf/llava-1.5-7b-hf", 4096  # and the width of its features


def measure(
    device: torch.device, images: int = 16, rows: int = 576, width: int = 1024, keep: float = 0.1, repeats: int = 20
) -> Results:
    """Times every plugin on random float32 features (images, rows, width).

    Whether DivPrune chooses as the loop does is checked in the same run: "same_rows" is the share of its rows that the
    loop keeps too (1.0, except for float ties)."""
    if min(images, rows - 1, width) < 1:
        raise UserError(f"images = {images}, rows = {rows}, width = {width}: must be at least 1, 2 and 1")
    x = torch.randn(images, rows, width, generator=torch.Generator().manual_seed(0)).to(device)
    count = pruning.select("divprune", x, keep=keep).shape[1]
    contestants: dict[str, Callable] = {
        PRODUCT: lambda: x @ x.mT,
        LOOP: lambda: divprune_loop(x, count),
        MENDED: lambda: divprune_loop(x, count, mended=True),
    }
    contestants[RATE], flops = matrix_product(device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    signals = {"cls_attention": x[:, :, 0].abs(), "keys": x[:, :, :64], "tower": x}
    for name in pruning.works_with(signals):
        if module := pruning.make(name, width, count):
            module.to(device)
            contestants[name] = lambda name=name, module=module: learn(name, x, keep, module)
        else:
            contestants[name] = lambda name=name: pruning.select(name, x, keep=keep, signals=signals)
    picks = contestants["divprune"]()
    same = {name: shared(picks, contestants[name]()) for name in (LOOP, MENDED)}
    told = f"{count} of {rows} tokens of {images} images, width {width}, float32, median of {repeats}"
    print(f"{told}; divprune keeps {same[LOOP]:.2%} of the loop's tokens")
    found = time_in_turns(contestants, repeats, device)
    step_ms = fast_step_flops(images, rows, keep) / flops * found[RATE]["median_ms"]
    for f in found.values():
        ms = f["median_ms"]
        f |= {"over_product": ms / found[PRODUCT]["median_ms"], "speedup_over_loop": found[LOOP]["median_ms"] / ms}
        f["of_fast_step"] = ms / step_ms
    results = {
        "shape": [images, rows, width], "keep": keep, "count": count, "repeats": repeats, "contestants": found,
        "same_rows": same, "fast_step_ms": step_ms,
    }  # fmt: skip
    yield describe(results), results


def describe(results: dict) -> str:
    headers = ["contestant", "median", "min", "x product", "speed-up over loop", "of a 7B fast step"]
    lines = []
    for name, f in results["contestants"].items():
        times = [f"{f[key]:.2f} ms" for key in ("median_ms", "min_ms")]
        ratios = [f"{f[key]:.2f}x" for key in ("over_product", "speedup_over_loop")]
        lines.append([name, *times, *ratios, f"{f['of_fast_step']:.2%}"])
    columns = len(headers) - (results["shape"][-1] != WIDTH)  # the last one is for the features of a 7B model
    return tables.table(headers[:columns], [line[:columns] for line in lines])


def draw(results: dict):
    found = [
        Bar(name, f["median_ms"], f"{f['over_product']:.2f}x", ours=name not in (PRODUCT, LOOP, MENDED, RATE))
        for name, f in results["contestants"].items()
    ]
    return bar_chart({"choosing the rows": found}, "ms; beside it, over the product's")


def learn(name: str, x: Tensor, keep: float, module: nn.Module) -> None:
    """Runs what a learned plugin adds to a training step."""
    found = pruning.choose(name, x, keep=keep, module=module)
    ((found.weight @ x).sum() + (0 if found.loss is None else found.loss.sum())).backward()


def fast_step_flops(images: int, rows: int, keep: float) -> float:
    """Returns the FLOPs of a fast LoRA step of LLaVA-1.5-7B, without recomputing, with one image per sample."""
    settings, sample = Settings("bf16", rank=64, keep=keep), (estimate.TEXT, [rows], estimate.ANSWERS)
    return images * estimate.flops(Shape(published.KNOWN[MODEL]()), settings, "fast", sample, False)


def divprune_loop(features: Tensor, count: int, mended: bool = False) -> Tensor:
    """DivPrune as it is run today, image by image: the first row by a top-2 over every column, then at every step the
    distances of all rows chosen so far are gathered anew and their minimum is taken, O(K^2 N).

    `mended` keeps the loop over images and does the rest well: the diagonal is masked, which needs no top-2, and the
    minimum is carried along, O(KN). Both are written from the description, with the operations that the official codes
    use, among them a minimum that returns indices which nobody reads.
    """
    kept = []
    for x in features:
        x = x / x.norm(dim=1, keepdim=True)
        distance = 1 - x @ x.T
        chosen = torch.zeros(count, dtype=torch.int64, device=x.device)
        if mended:
            chosen[0] = distance.fill_diagonal_(float("inf")).amin(0).argmax()
            nearest = distance.fill_diagonal_(-float("inf"))[chosen[0]]  # so that no row is chosen twice
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
    """Returns the share of the rows in `a` (B, K) that `b` (B, K) keeps too."""
    return (a[:, :, None] == b[:, None, :]).any(2).double().mean().item()
