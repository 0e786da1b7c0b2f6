"""What each lever of a step is worth: the step as it is, and the step without that lever.

    tinyspeed bench levers                     a small model, on a CPU
    tinyspeed bench levers --size 7b --device cuda

None of these levers changes what is learned (the tests compare loss and gradients of each with the step as it is). So
each can be taken out of the running code by itself and timed in turns with the others, on the same samples, whose texts
are as long as in LLaVA's mix. Fast and slow steps are timed apart, since most levers help only one of them. Beside the
time of each change stands what arithmetic promises: the FLOPs with it (`estimate.py`) over those of the step as it is.

Two changes are levers that are off by default: features from disk need space there, and compiled layers have to be
compiled, and compiled again for other shapes.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import torch

from .. import rows
from ..data import llava_mix
from ..data.examples import Example
from ..models import precision
from ..models.memory import GIB, Settings, Shape
from ..rows import plan_rows
from ..training import loop
from ..training.loop import StageRun, Totals
from ..util import malloc, tables
from . import estimate
from .harness import Bar, Results, bar_chart, speedup
from .random_examples import RandomExamples
from .step import PLANS, our_step, random_model, time_and_memory

MODES = ("fast", "slow")
Change = Callable[[StageRun], AbstractContextManager]


def _every_id_embedded(run: StageRun) -> AbstractContextManager:
    def all_of_them(selected: rows.Rows, words: int):
        return torch.arange(words, device=selected.source.device), selected

    return patch.object(rows, "used_words", all_of_them)


def _cut_by_samples(run: StageRun) -> AbstractContextManager:
    """Micro-batches in the order of the data, of so many samples that the longest could be in all their places."""
    longest = max(plan_rows(*run.source.lengths(i)[:2], PLANS["full"], 0) for i in range(len(run.source)))

    def cut(of: list[int], budget: int) -> Iterator[list[int]]:
        size = max(1, budget // longest) if budget else len(of)
        yield from (list(range(first, min(first + size, len(of)))) for first in range(0, len(of), size))

    return patch.object(loop, "cut", cut)


@contextmanager
def _adamw_in_pieces(run: StageRun) -> Iterator[None]:
    """One operation per tensor on a CPU and per list of tensors elsewhere, which are torch's defaults."""
    foreach = run.model.device.type != "cpu"
    with ExitStack() as stack:
        for group in run.optimizer.param_groups:
            stack.enter_context(patch.dict(group, fused=False, foreach=foreach))
        yield


@contextmanager
def _memory_given_back(run: StageRun) -> Iterator[None]:
    malloc.keep_freed_memory(False)
    try:
        yield
    finally:
        malloc.keep_freed_memory()


def _features_from_disk(run: StageRun) -> AbstractContextManager:
    """As `feature_cache.py` keeps them. Reading them is not timed, and neither is decoding a picture."""
    original, vlm = run.source.example, run.model.vlm

    def example(i: int) -> Example:
        made = original(i)
        if not made.visual:
            return made
        visual = dict(made.visual)
        pixels = visual.pop("pixel_values").to(run.model.device)
        with torch.no_grad(), precision.autocast(run.precision, run.model.device):
            features = vlm.tower_features(pixels, visual.get("image_sizes")).cpu()
        return replace(made, visual={"tower_features": features, **visual})

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
GIVEN_BACK = "memory given back"  # for CPUs only
CHANGES: dict[str, Change] = {
    AS_IS: lambda run: nullcontext(),
    RECOMPUTED: lambda run: patch.object(run, "rows_that_fit", 0),
    "micro-batches by samples, not rows": _cut_by_samples,
    PADDED: lambda run: patch.object(run.model, "layout", "padded"),
    WITH_GRAPH: lambda run: patch.object(run.model.vlm, "rowwise", False),
    "every id embedded": _every_id_embedded,
    "AdamW in pieces": _adamw_in_pieces,
    GIVEN_BACK: _memory_given_back,
    FROM_DISK: _features_from_disk,
}
COMPILED: dict[str, Change] = {"layers compiled": _compiled}


def measure(
    device: torch.device, size: str = "tiny", family: str = "1.5", tune: str = "lora", batch: int = 8,
    budget: int = 4096, compiled: bool = False, repeats: int = 5,
) -> Results:  # fmt: skip
    """Times fast and slow steps with each change."""
    recipe, model = random_model(size, family, tune, batch, budget, device)
    source = RandomExamples(model.config, llava_mix.mix(batch, 0, family))
    run = StageRun(recipe, model, source, "train", 0, recipe.train, Totals())
    told = f"{batch} samples as in LLaVA's mix, {budget:,} tokens at a time"
    print(f"{size}, LLaVA-{family}, {tune}, {run.precision}; {told}")
    changes = CHANGES | (COMPILED if compiled else {})
    if device.type != "cpu":
        del changes[GIVEN_BACK]
    results = {
        "size": size, "family": family, "tune": tune, "batch": batch, "budget": budget, "repeats": repeats,
        "precision": run.precision, "samples": source.samples,
        "steps": {mode: compare_changes(run, mode, changes, repeats) for mode in MODES},
    }  # fmt: skip
    yield describe(results), results


def compare_changes(run: StageRun, mode: str, changes: dict[str, Change], repeats: int) -> dict:
    """Returns time, memory, loss and FLOPs of a step of this mode with each change."""

    def changed(change: Change) -> Callable[[], float]:
        with change(run):
            made = our_step(run, mode)

        def step() -> float:
            with change(run):
                return made()

        return step

    found = time_and_memory(run, {name: changed(change) for name, change in changes.items()}, repeats)
    base = flops(run, mode, AS_IS)
    return {name: {**f, "promised": flops(run, mode, name) / base} for name, f in found.items()}


def flops(run: StageRun, mode: str, change: str) -> float:
    """Returns the FLOPs of the step with this change."""
    shape, s = Shape(run.model.config), Settings.of(run.recipe, "train", run.precision)
    shape.rowwise &= change != WITH_GRAPH
    shape.tower_layers *= change != FROM_DISK
    total = 0.0
    for part, of in run._parts(0, PLANS[mode]):
        recompute = change == RECOMPUTED or run.laid_out(of) > run.rows_that_fit
        for i, own in zip(part, of, strict=True):
            text, images, answers = run.source.lengths(i)
            padding = (max(of) - own) * (change == PADDED)
            total += estimate.flops(shape, s, mode, (text + padding, images, answers), recompute)
    return total


def describe(results: dict) -> str:
    headers, lines = ["", *(f"{mode}, {unit}" for mode in MODES for unit in ("ms", "ratio", "promised", "GiB"))], []
    steps = results["steps"]
    for name in dict.fromkeys(name for mode in MODES for name in steps[mode]):
        line = [name]
        for mode in MODES:
            f, base = steps[mode].get(name), steps[mode][AS_IS]
            if f is None:  # it did not fit the device
                line += ["-"] * 4
                continue
            line += [f"{f['median_ms']:,.0f}", f"{speedup(f, base):.2f}x"]
            line += [f"{f['promised']:.2f}x", f"{f['peak_bytes'] / GIB:.2f}"]
        lines.append(line)
    return tables.table(headers, lines)


def draw(results: dict):
    panels = {}
    for mode, found in results["steps"].items():
        panels[f"a {mode} step"] = [
            Bar(name, f["median_ms"], f"{speedup(f, found[AS_IS]):.2f}x", ours=name == AS_IS)
            for name, f in found.items()
        ]
    return bar_chart(panels, "ms")
