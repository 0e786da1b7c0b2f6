"""What each lever of a step is worth: the step as it is, and as it would be without.

    tinyspeed bench levers                     a small model, on a CPU
    tinyspeed bench levers --size 7b --device cuda

None of these levers changes what is learned (the tests hold loss and gradients of each against the step as it is), so
each can be taken out of the running code by itself, in turn with the others, on the same samples: texts as long as in
LLaVA's mix, and fast and slow steps apart, since most levers are for one of them. Beside the time of each change stands
what arithmetic promises: the FLOPs of the step with it (`estimate.py`), over those of the step as it is.

Two rows are levers that are not pulled by default: features from disk need space there, and compiled layers have to be
compiled, and again for other shapes.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from .. import rows
from ..data import llava_mix
from ..data.examples import Example
from ..models import precision, published
from ..models.memory import GIB, Settings, Shape
from ..models.precision import device_of
from ..rows import plan_rows
from ..scheduler import Plan
from ..training import build, loop
from ..training.loop import StageRun, Totals
from ..util import malloc, tables
from . import bars, estimate
from .bars import Bar
from .live import peak, storages
from .noise import Noise
from .step import PLANS, fitting, ours, random, recipe_of
from .timing import described, faster, finish, timed

STEPS = ("fast", "slow")


def _everything_recomputed(run: StageRun) -> AbstractContextManager:
    return patch.object(run, "rows_that_fit", 0)


def _padded(run: StageRun) -> AbstractContextManager:
    return patch.object(run.model, "layout", "padded")


def _projected_once(run: StageRun) -> AbstractContextManager:
    return patch.object(run.model.vlm, "rowwise", False)


def _every_id_embedded(run: StageRun) -> AbstractContextManager:
    def all_of_them(selected: rows.Rows, words: int):
        return torch.arange(words, device=selected.source.device), selected

    return patch.object(rows, "used_words", all_of_them)


def _cut_by_samples(run: StageRun) -> AbstractContextManager:
    """In the order of the data, as many at a time as the longest of them leaves room for, were it whole."""
    longest = max(plan_rows(*run.source.lengths(i)[:2], PLANS["full"], 0) for i in range(len(run.source)))

    def cut(of: list[int], budget: int) -> Iterator[list[int]]:
        size = max(1, budget // longest) if budget else len(of)
        yield from (list(range(first, min(first + size, len(of)))) for first in range(0, len(of), size))

    return patch.object(loop, "cut", cut)


@contextmanager
def _adamw_in_pieces(run: StageRun) -> Iterator[None]:
    groups = run.optimizer.param_groups
    was = [(group["fused"], group["foreach"]) for group in groups]
    for group in groups:
        group["fused"], group["foreach"] = False, run.model.device.type != "cpu"  # which is torch's default
    try:
        yield
    finally:
        for group, (fused, foreach) in zip(groups, was, strict=True):
            group["fused"], group["foreach"] = fused, foreach


@contextmanager
def _memory_given_back(run: StageRun) -> Iterator[None]:
    malloc.keep_freed_memory(False)
    try:
        yield
    finally:
        malloc.keep_freed_memory()


def _features_from_disk(run: StageRun) -> AbstractContextManager:
    """As `features.py` keeps them. Reading them does not count, as decoding a picture does not."""
    original, vlm = run.source.example, run.model.vlm

    def example(i: int) -> Example:
        made = original(i)
        if made.pixel_values is None:
            return made
        sizes, pixels = made.image_sizes, made.pixel_values.to(run.model.device)
        with torch.no_grad(), precision.autocast(run.precision, run.model.device):
            looked = vlm.tower_features(pixels, sizes).cpu()
        return replace(made, pixel_values=None, tower_features=looked)

    return patch.object(run.source, "example", example)


@contextmanager
def _compiled(run: StageRun) -> Iterator[None]:
    layers = run.model.vlm.language_model.layers
    for layer in layers:
        if not hasattr(layer, "compiled"):
            layer.compile(dynamic=True)
            layer.compiled = layer._compiled_call_impl
        layer._compiled_call_impl = layer.compiled
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


AS_IS, RECOMPUTED, PADDED = "as it is", "every activation recomputed", "padded, not packed"
WITH_GRAPH, FROM_DISK = "all features projected with a graph", "features from disk"  # these change a step's FLOPs
GIVEN_BACK = "memory given back"  # which is a CPU's
CHANGES: dict[str, Callable[[StageRun], AbstractContextManager]] = {
    AS_IS: lambda run: nullcontext(),
    RECOMPUTED: _everything_recomputed,
    "micro-batches by samples, not rows": _cut_by_samples,
    PADDED: _padded,
    WITH_GRAPH: _projected_once,
    "every id embedded": _every_id_embedded,
    "AdamW in pieces": _adamw_in_pieces,
    GIVEN_BACK: _memory_given_back,
    FROM_DISK: _features_from_disk,
}
COMPILED = {"layers compiled": _compiled}


def bench_levers(
    size: str = "tiny",
    family: str = "1.5",
    tune: str = "lora",
    batch: int = 8,
    budget: int = 4096,
    compiled: bool = False,
    repeats: int = 5,
    device: str = "cpu",
    out: Path | str | None = None,
    png: Path | str | None = None,
) -> dict:
    """Time fast and slow steps with each change. Prints a table, returns everything, and writes it as JSON to `out`
    and as a picture to `png`."""
    config, where = published.config_of(size, family), device_of(device)
    recipe = recipe_of(tune, min(64, config.text_config.hidden_size // 64), batch, budget, where)
    name = precision.resolve(recipe.model.precision, where)
    model = build.wrap(recipe, random(config, name, tune, where))
    source = Noise(config, llava_mix.mix(batch, 0, family))
    run = StageRun(recipe, model, source, "train", 0, recipe.train, Totals())
    changes = CHANGES | (COMPILED if compiled else {})
    if where.type != "cpu":
        del changes[GIVEN_BACK]
    result = described(
        where, bench="levers", size=size, family=family, tune=tune, batch=batch, budget=budget, repeats=repeats,
        precision=name, samples=source.samples, steps={},
    )  # fmt: skip
    for mode in STEPS:
        result["steps"][mode] = measured(run, PLANS[mode], changes, repeats)
    said = f"{size}, LLaVA-{family}, {tune}, {name}; {batch} samples as in LLaVA's mix, {budget:,} rows at a time"
    return finish(said, result, describe, draw, out, png)


def measured(run: StageRun, plan: Plan, changes: dict, repeats: int) -> dict:
    """Milliseconds, bytes and loss of this plan's step with each change."""
    moments = [value for state in run.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    fixed, losses, steps, peaks = storages(run.model, moments), {}, {}, {}

    def once(name: str, step: Callable[[], float]) -> None:
        with changes[name](run):
            losses[name] = step()

    for name, change in changes.items():
        with change(run):
            steps[name] = functools.partial(once, name, ours(run, plan))
        with fitting(run) as fits:
            peaks[name] = sum(fixed.values()) + peak(steps[name], run.model.device, fixed)
        if not fits:
            del steps[name]
    times, base = timed(steps, repeats, run.model.device), flops(run, plan, AS_IS)
    return {
        name: {**t, "peak_bytes": peaks[name], "loss": losses[name], "promised": flops(run, plan, name) / base}
        for name, t in times.items()
    }


def flops(run: StageRun, plan: Plan, change: str) -> float:
    """Of the step with this change."""
    shape, s = Shape(run.model.config), Settings.of(run.recipe, "train", run.precision)
    shape.rowwise &= change != WITH_GRAPH
    shape.tower_layers *= change != FROM_DISK
    total = 0.0
    for part, of in run._parts(0, plan):
        recompute = change == RECOMPUTED or run.laid_out(of) > run.rows_that_fit
        for i, own in zip(part, of, strict=True):
            text, images, answers = run.source.lengths(i)
            padding = (max(of) - own) * (change == PADDED)
            total += estimate.flops(shape, s, plan.mode, (text + padding, images, answers), recompute)
    return total


def describe(result: dict) -> str:
    found = result["steps"]
    headers, lines = ["", *(f"{mode}, {unit}" for mode in STEPS for unit in ("ms", "of it", "promised", "GiB"))], []
    for name in dict.fromkeys(name for mode in STEPS for name in found[mode]):
        line = [name]
        for mode in STEPS:
            f, base = found[mode].get(name), found[mode][AS_IS]
            if f is None:  # it did not fit
                line += ["-"] * 4
                continue
            line += [f"{f['median_ms']:,.0f}", f"{faster(f, base):.2f}x"]
            line += [f"{f['promised']:.2f}x", f"{f['peak_bytes'] / GIB:.2f}"]
        lines.append(line)
    return tables.table(headers, lines)


def draw(result: dict):
    panels = {}
    for mode, found in result["steps"].items():
        base = found[AS_IS]
        panels[f"a {mode} step"] = [
            Bar(name, f["median_ms"], f"{faster(f, base):.2f}x", ours=name == AS_IS) for name, f in found.items()
        ]
    return bars.draw(panels, "ms")
