"""Runs a benchmark: times contestants in turns, and prints, draws and writes the results with the machine they are of.

The contestants of a round run in a shuffled order, so that a drifting clock or a busy neighbour slows all of them
alike. A time is the median over the rounds, and a speed-up is the median of the ratios within each round.
"""

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from ..models.precision import device_of
from ..util import UserError, files, plots, provenance, require

Results = Iterator[tuple[str, dict]]  # what a benchmark yields


def run(
    benchmark: ModuleType, device: str = "cpu", out: Path | str | None = None, png: Path | str | None = None, **settings
) -> dict:
    """Runs a module of this package and returns its results, which also go to the JSON file `out`.

    Its `measure(device, **settings)` yields a text to print and all results so far, whenever there are new ones; its
    `draw(results)` makes the picture that is saved as `png`."""
    where = device_of(device)
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None  # far above the threads: others disturb
    machine = provenance.describe(where, processor=provenance.cpu_name(), load=load)
    print("{device}; {cores} cores, {threads} threads, load {load}".format(**machine))
    for text, results in benchmark.measure(where, **settings):
        print(f"\n{text}")
        results = {**machine, "bench": benchmark.__name__.split(".")[-1], **results}
        if out is not None:
            write(results, Path(out))
    if png is not None:
        print(plots.save(benchmark.draw(results), png))
    return results


def write(results: dict, out: Path) -> None:
    try:
        files.write_atomically(out, json.dumps(results, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the results to {out}: {error.strerror}") from error


def time_in_turns(contestants: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, dict]:
    """Returns each contestant's milliseconds in each round, after two to warm up, with their median and minimum."""
    require(repeats >= 1, f"repeats = {repeats}: measure at least once")
    order = random.Random(0)
    milliseconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(-2, repeats):
        for name in order.sample(list(contestants), len(contestants)):
            synchronize(device)
            start = time.perf_counter()
            contestants[name]()
            synchronize(device)
            if repeat >= 0:
                milliseconds[name].append(1000 * (time.perf_counter() - start))
    return {name: summary(ms) for name, ms in milliseconds.items()}


def summary(ms: list[float]) -> dict:
    return {"median_ms": statistics.median(ms), "min_ms": min(ms), "ms": ms}


def speedup(slow: dict, fast: dict) -> float:
    """Returns how many times faster `fast` is: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(slow["ms"], fast["ms"], strict=True))


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable, int]:
    """Returns a product of matrices as large as an LLM's, and its FLOPs: how fast this machine computes at best. On a
    GPU many products are queued at once, so that launching them does not count."""
    rows, width, times = (256, 4096, 1) if device.type == "cpu" else (8192, 4096, 100)
    left, right = (torch.randn(n, width, device=device, dtype=dtype) for n in (rows, width))

    def multiply() -> None:
        for _ in range(times):
            left @ right

    return multiply, times * 2 * rows * width**2


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work: a GPU only queues it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Bar:
    """A contestant in the picture of a benchmark."""

    name: str
    length: float
    note: str = ""  # written after the bar
    dark: float = 0.0  # how much of the bar is dark: its floor, where one is known
    ours: bool = True  # blue; the others are black, so that the two can be told apart without colours too


def bar_chart(panels: dict[str, list[Bar]], unit: str):
    """Draws a panel for each case, with the contestants from top to bottom. One that a panel lacks leaves a gap."""
    names = list(dict.fromkeys(bar.name for bars in panels.values() for bar in bars))
    left, right = 0.3 + 0.075 * max(map(len, names)), 0.3  # inches
    width, height = left + 3.2 * len(panels) + right, 1.1 + 0.3 * len(names)
    fig = plots.figure(width, height)
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    fig.subplots_adjust(
        left=left / width, right=1 - right / width, top=1 - 0.45 / height, bottom=0.6 / height, wspace=0.12
    )
    for ax, (title, bars) in zip(axes, panels.items(), strict=True):
        for bar in bars:
            at, colour = names.index(bar.name), plots.COLOURS[bar.ours]
            ax.barh(at, bar.length, color=colour, alpha=0.35)
            ax.barh(at, bar.dark, color=colour)
            ax.text(bar.length, at, f" {bar.note}", va="center", color=colour)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.margins(x=0.2)
        ax.set_xlim(left=0)
        ax.set_title(title, loc="left")
        ax.set_xlabel(unit)
        ax.spines[["top", "right"]].set_visible(False)
    return fig
