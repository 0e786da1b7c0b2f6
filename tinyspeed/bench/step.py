"""A training step beside what people run today: one optimizer batch, forward, backward and AdamW.

    tinyspeed bench step                                   a small model, on a CPU
    tinyspeed bench step --size 7b --device cuda           LLaVA-1.5-7B's shape, random weights
    tinyspeed bench step --size 7b --family next --device cuda

All contestants take turns on one model with the same trainable parameters, samples and optimizer, so a slow minute of
the machine hits all of them and no weights are there twice. Rivals are in `rivals.py`; ours are steps of the real loop
(`stage.py`), which cuts its own micro-batches and decides about recomputing. Pictures are decoded beforehand.

    mix        (1 - r) fast + r slow: r = 0.1 as published, r = 0.02 with original positions
    floor      the plan's FLOPs, counted as in `estimate.py` without recomputing, / the rate of a large product of
               matrices, which is timed in turn with the contestants
    MFU        floor / time

`--text 128` gives every sample 128 words, half of them answers; `mix` draws from LLaVA's instruction mix
(`lengths.py`), where one sample in fifteen has no picture. Memory is what a step takes, and what is there before it:
weights and moments. On a CPU it is counted operation by operation (`live.py`) in a step of its own.
"""

import functools
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from ..data import llava_mix
from ..data.examples import Sample
from ..models import loading, precision, published
from ..models.memory import GIB, Settings, Shape
from ..models.precision import device_of
from ..recipe import Recipe, from_tables
from ..rows import plan_rows
from ..scheduler import Plan, Schedule
from ..training import build
from ..training.loop import StageRun, Totals
from ..util import files, tables
from ..util.errors import UserError, unknown
from . import bars, estimate
from .bars import Bar
from .live import peak, storages
from .noise import Noise
from .rivals import loaded, rivals
from .timing import MACHINE, described, faster, leave, product, summed_up, timed, write

TUNE = ("lora", "qlora", "full")
MIXES = {"DualSpeed, r = 0.1": 0.1, "DualSpeed, r = 0.02": 0.02}
KEEP, RATE = 0.1, "a large product"
PLANS = {"full": Plan("full"), "fast": Plan("fast", keep=KEEP), "slow": Plan("slow", keep=KEEP, distill=1.0)}


class Always(Schedule):
    def __init__(self, plan: Plan):
        self.only = plan

    def plan(self, step: int) -> Plan:
        return self.only


def bench_step(
    size: str = "tiny",
    family: str = "1.5",
    tune: str = "lora",
    texts: tuple[str, ...] = ("64", "128", "256", "mix"),
    batch: int = 8,
    micro: int = 0,
    budget: int = 0,
    checkpointing: str = "auto",
    repeats: int = 5,
    device: str = "cpu",
    out: Path | str | None = None,
    png: Path | str | None = None,
) -> dict:
    """Time a step of each contestant. `micro`: samples that rivals take at a time (0: all); `budget` and
    `checkpointing`: rows that ours take, and whether they recompute activations. Prints tables, returns everything, and
    writes it as JSON to `out` and as a picture to `png`."""
    if tune not in TUNE:
        raise UserError(f"tune = {tune!r}: one of {', '.join(TUNE)}")
    if batch < 1 or micro < 0 or budget < 0:
        raise UserError(f"batch = {batch}, micro = {micro}, budget = {budget}: at least 1, 0 and 0")
    config, where = published.config_of(size, family), device_of(device)
    drawn = {text: samples(text, batch, family) for text in texts}
    recipe = recipe_of(tune, min(64, config.text_config.hidden_size // 64), batch, budget, where, checkpointing)
    name = precision.resolve(recipe.model.precision, where)
    model = build.wrap(recipe, random(config, name, tune, where))
    result = described(
        where, bench="step", size=size, family=family, tune=tune, rank=recipe.lora.rank, batch=batch,
        micro=micro or batch, budget=budget, checkpointing=checkpointing, repeats=repeats, precision=name, texts={},
    )  # fmt: skip
    print(f"{size}, LLaVA-{family}, {tune}, {name}; batches of {batch}, median of {repeats}")
    if checkpointing != "auto":
        print(f"checkpointing of ours: {checkpointing}")
    print(MACHINE.format(**result))
    for text, of_text in drawn.items():
        run = StageRun(recipe, model, Noise(config, of_text), "train", 0, recipe.train, Totals())
        found = result["texts"][text] = measured(run, micro or batch, repeats)
        print(describe(text, found) + "\n")
        if out is not None:
            write(result, Path(out))
        del run  # and its optimizer
    leave(result, None, png, draw)
    return result


def samples(text: str, batch: int, family: str) -> list[Sample]:
    """Text rows, visual rows and answers of each sample."""
    if family not in llava_mix.VISUAL:
        raise unknown("family", family, llava_mix.VISUAL)
    if text == "mix":
        return llava_mix.mix(batch, 0, family)
    if not text.isdigit() or int(text) < 2:
        raise UserError(f'text = {text!r}: a number of words, at least 2, or "mix"')
    rows = max(llava_mix.VISUAL[family])
    return [(int(text), [rows], int(text) // 2)] * batch


def recipe_of(
    tune: str, rank: int, batch: int, budget: int, device: torch.device, checkpointing: str = "auto"
) -> Recipe:
    lr = 1e-9  # so all have the same weights
    return from_tables(
        {
            "run": {"device": device.type},
            "model": {"path": "random weights", "quantise": "nf4" if tune == "qlora" else "none"},
            "data": {"kind": "chat", "file": "noise"},
            "lora": {"rank": 0 if tune == "full" else rank, "dropout": 0.0},
            "dualspeed": {"keep": KEEP, "positions": "original"},
            "train": {"steps": 1, "batch": batch, "row_budget": budget, "lr": lr, "checkpointing": checkpointing},
        },
        "the benchmark",
    )


def random(config, name: str, tune: str, device: torch.device) -> nn.Module:
    """A model that nobody has trained. One in 4 bits comes from disk, where every such model comes from."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForImageTextToText.from_config(config, dtype=precision.DTYPES[name], trust_remote_code=False)
    if tune != "qlora":
        return model
    with tempfile.TemporaryDirectory(prefix="tinyspeed-") as folder:
        with files.errors_about(folder):
            model.save_pretrained(folder)
        del model
        return loading.load_model(folder, name, quantise="nf4", device=device)


def measured(run: StageRun, micro: int, repeats: int) -> dict:
    """Every contestant on the run's samples."""
    device, source = run.model.device, run.source
    steps = {**rivals(run, micro), **{name: ours(run, plan) for name, plan in PLANS.items()}}
    modes = {name: name if name in PLANS else "full" for name in steps}
    moments = [value for state in run.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    fixed = storages(run.model, moments)
    peaks, losses = {}, {}

    def once(name: str) -> None:
        losses[name] = steps[name]()

    for name in list(steps):
        with fitting(run) as fits:
            peaks[name] = sum(fixed.values()) + peak(functools.partial(once, name), device, fixed)
        if not fits:
            del steps[name]
    multiply, work = product(device, precision.DTYPES[run.precision])
    times = timed({**steps, RATE: multiply}, repeats, device)
    rate = work / times.pop(RATE)["median_ms"]  # FLOPs a millisecond
    s, shape = Settings.of(run.recipe, "train", run.precision), Shape(run.model.config)
    rows = {
        mode: sum(plan_rows(*source.lengths(i)[:2], plan, s.isolator) for i in range(len(source)))
        for mode, plan in PLANS.items()
    }
    floors = {
        mode: sum(estimate.flops(shape, s, mode, source.lengths(i), False) for i in range(len(source))) / rate
        for mode in PLANS
    }
    found = {
        name: {
            **t, "rows": rows[modes[name]], "floor_ms": floors[modes[name]], "peak_bytes": peaks[name],
            "loss": losses[name],
        }
        for name, t in times.items()
    }  # fmt: skip
    for name, slow in MIXES.items() if {"fast", "slow"} <= found.keys() else ():
        fast, rare = found["fast"], found["slow"]
        ms = [(1 - slow) * a + slow * b for a, b in zip(fast["ms"], rare["ms"], strict=True)]
        mixed = {key: (1 - slow) * fast[key] + slow * rare[key] for key in ("rows", "floor_ms")}
        found[name] = {**summed_up(ms), **mixed, "peak_bytes": max(fast["peak_bytes"], rare["peak_bytes"])}
    for f in found.values():
        f["ms_a_sample"] = f["median_ms"] / len(source)
        f["rows_per_second"] = 1000 * f["rows"] / f["median_ms"]
        f["mfu"] = f["floor_ms"] / f["median_ms"]
        f["speedup"] = faster(found["hf"], f) if "hf" in found else None
    drawn = [[text, images, answers] for text, images, answers in source.samples]
    return {"samples": drawn, "tflops": rate / 1e9, "contestants": found}


@contextmanager
def fitting(run: StageRun) -> Iterator[list[bool]]:
    """A step that may not fit the device. What is yielded is true behind it if it did."""
    fits = []
    try:
        yield fits
        fits.append(True)
    except (torch.OutOfMemoryError, UserError) as error:  # the real loop makes advice of it
        if not any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__cause__)):
            raise
        run.optimizer.zero_grad(set_to_none=True)
    if not fits:  # the error and what its frames hold are gone by now
        gc.collect()
        if run.model.device.type == "cuda":
            torch.cuda.empty_cache()


def ours(run: StageRun, plan: Plan) -> Callable[[], float]:
    """A step of the real loop, on batches that are there."""
    batches = [loaded(run, part) for part, _ in run._parts(0, plan)]

    def step() -> float:
        run.model.schedule = Always(plan)
        return run._step(0, iter(batches), None)["loss"]

    return step


def describe(text: str, found: dict) -> str:
    headers = ["contestant", "ms a sample", "speed-up", "rows/s", "floor, ms", "MFU", "GiB"]
    rows = []
    for name, f in found["contestants"].items():
        of, speedup = len(found["samples"]), "-" if f["speedup"] is None else f"{f['speedup']:.2f}x"
        numbers = [f"{f['ms_a_sample']:.1f}", speedup, f"{f['rows_per_second']:,.0f}", f"{f['floor_ms'] / of:.1f}"]
        rows.append([name, *numbers, f"{f['mfu']:.0%}", f"{f['peak_bytes'] / GIB:.2f}"])
    words = "text as in LLaVA's mix" if text == "mix" else f"{text} words of text"
    return f"{words}; a large product of matrices: {found['tflops']:.3g} TFLOP/s\n\n{tables.table(headers, rows)}"


def draw(result: dict):
    panels = {}
    for text, found in result["texts"].items():
        panels["LLaVA's mix" if text == "mix" else f"{text} words"] = [
            Bar(
                name,
                f["ms_a_sample"],
                f"{f['speedup']:.1f}x" if f["speedup"] else "",
                f["floor_ms"] / len(found["samples"]),
                name in PLANS or name in MIXES,
            )
            for name, f in found["contestants"].items()
        ]
    return bars.draw(panels, "ms a sample; dark: its floor")
