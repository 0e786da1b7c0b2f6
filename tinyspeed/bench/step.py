"""Times a training step beside what people run today: one optimizer batch, forward, backward and AdamW.

    tinyspeed bench step                                   a small model, on a CPU
    tinyspeed bench step --size 7b --device cuda           LLaVA-1.5-7B's shape, random weights
    tinyspeed bench step --size 7b --family next --device cuda

All contestants take turns on one model with the same trainable parameters, samples and optimizer, so a slow minute of
the machine hits all of them and no weights are held twice. The others are in `baselines.py`. Ours are steps of the real
loop (`training/loop.py`), which cuts its own micro-batches and decides about recomputing. Pictures are decoded before.

    DualSpeed  (1 - r) fast + r slow: r = 0.1 as published, r = 0.02 with original positions
    floor      the plan's FLOPs without recomputing (`estimate.py`) / the rate of a large product of matrices, which is
               timed in turns with the contestants
    MFU        floor / time

`--text 128` gives every sample 128 words, half of them answers; `mix` draws lengths from LLaVA's instruction mix
(`data/llava_mix.py`), where one sample in sixteen has no picture. Memory is what a step takes, and the weights and
moments that exist before it. On a CPU it is counted operation by operation (`peak_memory.py`) in a step of its own.
"""

import functools
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ..data import llava_mix
from ..data.examples import Sample
from ..dualspeed import DualSpeed
from ..models import loading, precision, published
from ..models.memory import GIB, Settings, Shape
from ..recipe import Recipe, from_tables
from ..rows import plan_rows
from ..scheduler import DualSpeedSchedule, FastSchedule, FullSchedule
from ..training import build
from ..training.loop import StageRun, Totals
from ..util import UserError, files, require, require_known, tables
from . import estimate
from .baselines import baselines, batch_of
from .harness import Bar, Results, bar_chart, matrix_product, speedup, summary, time_in_turns
from .peak_memory import peak_bytes, storages
from .random_examples import RandomExamples, random_weights

TUNE = ("lora", "qlora", "full")
MIXES = {"DualSpeed, r = 0.1": 0.1, "DualSpeed, r = 0.02": 0.02}
KEEP, PRODUCT = 0.1, "a large product"
SCHEDULES = {"full": FullSchedule(), "fast": FastSchedule(KEEP), "slow": DualSpeedSchedule(slow=1.0, keep=KEEP)}
PLANS = {mode: schedule.plan(0) for mode, schedule in SCHEDULES.items()}


def measure(
    device: torch.device, size: str = "tiny", family: str = "1.5", tune: str = "lora",
    texts: tuple[str, ...] = ("64", "128", "256", "mix"), batch: int = 8, micro: int = 0, budget: int = 0,
    checkpointing: str = "auto", repeats: int = 5,
) -> Results:  # fmt: skip
    """Times a step of each contestant, text by text. `micro`: samples that the others take at a time (0: all of them);
    `budget` and `checkpointing`: rows that ours take at a time, and whether they recompute activations."""
    if batch < 1 or micro < 0 or budget < 0:
        raise UserError(f"batch = {batch}, micro = {micro}, budget = {budget}: at least 1, 0 and 0")
    samples = {text: samples_of(text, batch, family) for text in texts}
    recipe, model = random_model(size, family, tune, batch, budget, device, checkpointing)
    name = precision.resolve(recipe.model.precision, device)
    print(f"{size}, LLaVA-{family}, {tune}, {name}; batches of {batch}, median of {repeats}")
    if checkpointing != "auto":
        print(f"checkpointing of ours: {checkpointing}")
    results = {
        "size": size, "family": family, "tune": tune, "rank": recipe.lora.rank, "batch": batch, "micro": micro or batch,
        "budget": budget, "checkpointing": checkpointing, "repeats": repeats, "precision": name, "texts": {},
    }  # fmt: skip
    for text, chosen in samples.items():
        run = StageRun(recipe, model, RandomExamples(model.config, chosen), "train", 0, recipe.train, Totals())
        found = results["texts"][text] = contestants_of(run, micro or batch, repeats)
        yield table_of(text, found), results
        del run  # and its optimizer


def samples_of(text: str, batch: int, family: str) -> list[Sample]:
    """Returns text rows, visual rows and answers of each sample."""
    require_known("family", family, llava_mix.VISUAL)
    if text == "mix":
        return llava_mix.mix(batch, 0, family)
    require(text.isdigit() and int(text) > 1, f'text = {text!r}: a number of words, at least 2, or "mix"')
    return [(int(text), [max(llava_mix.VISUAL[family])], int(text) // 2)] * batch


def random_model(
    size: str, family: str, tune: str, batch: int, budget: int, device: torch.device, checkpointing: str = "auto"
) -> tuple[Recipe, DualSpeed]:
    """Returns a recipe and its model, with random weights."""
    require_known("tune", tune, TUNE)
    config = published.config_of(size, family)
    lr = 1e-9  # so small that every contestant has the same weights
    sections = {
        "run": {"device": device.type},
        "model": {"path": "random weights", "quantise": "nf4" if tune == "qlora" else "none"},
        "data": {"kind": "chat", "file": "noise"},
        "lora": {"rank": 0 if tune == "full" else min(64, config.text_config.hidden_size // 64), "dropout": 0.0},
        "dualspeed": {"keep": KEEP, "positions": "original"},
        "train": {"steps": 1, "batch": batch, "row_budget": budget, "lr": lr, "checkpointing": checkpointing},
    }
    recipe = from_tables(sections, "the benchmark")
    name = precision.resolve(recipe.model.precision, device)
    model = random_weights(config, precision.DTYPES[name], device)
    if tune == "qlora":  # 4-bit models are always loaded from disk
        with tempfile.TemporaryDirectory(prefix="tinyspeed-") as folder:
            with files.errors_about(folder):
                model.save_pretrained(folder)
            del model
            model = loading.load_model(folder, name, quantise="nf4", device=device)
    return recipe, build.wrap(recipe, model)


def contestants_of(run: StageRun, micro: int, repeats: int) -> dict:
    """Returns the samples of the run, the rate of a large product, and the numbers of every contestant."""
    samples, every = run.source.samples, {**baselines(run, micro), **{mode: our_step(run, mode) for mode in PLANS}}
    multiply, work = matrix_product(run.model.device, precision.DTYPES[run.precision])
    found = time_and_memory(run, every, repeats, {PRODUCT: multiply})
    rate = work / found.pop(PRODUCT)["median_ms"]  # FLOPs per millisecond
    s, shape = Settings.of(run.recipe, "train", run.precision), Shape(run.model.config)
    for name, f in found.items():
        mode = name if name in PLANS else "full"
        f["rows"] = sum(plan_rows(text, images, PLANS[mode], s.isolator) for text, images, _ in samples)
        f["floor_ms"] = sum(estimate.flops(shape, s, mode, sample, False) for sample in samples) / rate
    for name, slow in MIXES.items() if {"fast", "slow"} <= found.keys() else ():
        fast, rare = found["fast"], found["slow"]
        ms = [(1 - slow) * a + slow * b for a, b in zip(fast["ms"], rare["ms"], strict=True)]
        mixed = {key: (1 - slow) * fast[key] + slow * rare[key] for key in ("rows", "floor_ms")}
        found[name] = {**summary(ms), **mixed, "peak_bytes": max(fast["peak_bytes"], rare["peak_bytes"])}
    for f in found.values():
        f["ms_a_sample"] = f["median_ms"] / len(samples)
        f["rows_per_second"] = 1000 * f["rows"] / f["median_ms"]
        f["mfu"] = f["floor_ms"] / f["median_ms"]
        f["speedup"] = speedup(found["hf"], f) if "hf" in found else None
    return {"samples": [list(sample) for sample in samples], "tflops": rate / 1e9, "contestants": found}


def time_and_memory(
    run: StageRun, steps: dict[str, Callable[[], float]], repeats: int, beside: dict[str, Callable] | None = None
) -> dict[str, dict]:
    """Returns time, peak memory and loss of each step that fits the device. `beside` is timed in turns with them."""
    device, state = run.model.device, run.optimizer.state.values()
    fixed = storages(run.model, [value for of in state for value in of.values() if torch.is_tensor(value)])
    peaks, losses = {}, {}

    def run_step(name: str) -> None:
        losses[name] = steps[name]()

    for name in steps:
        with dropping_out_of_memory(run):
            peaks[name] = sum(fixed.values()) + peak_bytes(functools.partial(run_step, name), device, fixed)
    times = time_in_turns({name: functools.partial(run_step, name) for name in peaks} | (beside or {}), repeats, device)
    for name, peak in peaks.items():
        times[name] |= {"peak_bytes": peak, "loss": losses[name]}
    return times


@contextmanager
def dropping_out_of_memory(run: StageRun) -> Iterator[None]:
    """Lets a step fail that does not fit the device, and frees what it held."""
    try:
        yield
        return
    except (torch.OutOfMemoryError, UserError) as error:  # the training loop turns the first into the second
        if not any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__cause__)):
            raise
        run.optimizer.zero_grad(set_to_none=True)
    gc.collect()  # by now the error is gone, and what its frames held
    if run.model.device.type == "cuda":
        torch.cuda.empty_cache()


def our_step(run: StageRun, mode: str) -> Callable[[], float]:
    """Returns a step of the real loop, on batches that are ready."""
    batches = [batch_of(run, samples) for samples, _ in run._parts(0, PLANS[mode])]

    def step() -> float:
        run.model.schedule = SCHEDULES[mode]
        return run._step(0, iter(batches), None)["loss"]

    return step


def describe(results: dict) -> str:
    return "\n\n".join(table_of(text, found) for text, found in results["texts"].items())


def table_of(text: str, found: dict) -> str:
    headers = ["contestant", "ms per sample", "speed-up", "tokens/s", "floor, ms", "MFU", "GiB"]
    rows, samples = [], len(found["samples"])
    for name, f in found["contestants"].items():
        faster = "-" if f["speedup"] is None else f"{f['speedup']:.2f}x"
        numbers = [f"{f['ms_a_sample']:.1f}", faster, f"{f['rows_per_second']:,.0f}", f"{f['floor_ms'] / samples:.1f}"]
        rows.append([name, *numbers, f"{f['mfu']:.0%}", f"{f['peak_bytes'] / GIB:.2f}"])
    words = "text as in LLaVA's mix" if text == "mix" else f"{text} words of text"
    return f"{words}; a large product of matrices: {found['tflops']:.3g} TFLOP/s\n\n{tables.table(headers, rows)}"


def draw(results: dict):
    panels = {}
    for text, found in results["texts"].items():
        samples, every = len(found["samples"]), found["contestants"].items()
        panels["LLaVA's mix" if text == "mix" else f"{text} words"] = [
            Bar(
                name, f["ms_a_sample"], f"{f['speedup']:.1f}x" if f["speedup"] else "", f["floor_ms"] / samples,
                ours=name in PLANS or name in MIXES,
            )
            for name, f in every
        ]  # fmt: skip
    return bar_chart(panels, "ms per sample; dark: its floor")
