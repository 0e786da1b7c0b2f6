"""Contestants take turns, and the machine is written down beside what they took.

The contestants of one round run in shuffled order, so that a drifting clock or a busy neighbour hits all alike. The
median of the rounds is reported; of how much faster one is than another, the median of what each round says.
"""

import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..util import files, plots, provenance
from ..util.errors import UserError
from ..util.files import write_atomically

MACHINE = "{device}; {cores} cores, {threads} threads, load {load}\n"  # of what is `described`


def timed(contestants: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, dict]:
    """Milliseconds of each contestant in each round, after two that are not counted; their median and minimum."""
    if repeats < 1:
        raise UserError(f"repeats = {repeats}: measure at least once")
    turns = random.Random(0)
    milliseconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(-2, repeats):
        for name in turns.sample(list(contestants), len(contestants)):
            wait(device)
            start = time.perf_counter()
            contestants[name]()
            wait(device)
            if repeat >= 0:
                milliseconds[name].append(1000 * (time.perf_counter() - start))
    return {name: summed_up(ms) for name, ms in milliseconds.items()}


def summed_up(ms: list[float]) -> dict:
    return {"median_ms": statistics.median(ms), "min_ms": min(ms), "ms": ms}


def faster(slow: dict, fast: dict) -> float:
    """How many times, round by round."""
    return statistics.median(a / b for a, b in zip(slow["ms"], fast["ms"], strict=True))


def product(device: torch.device, dtype: torch.dtype) -> tuple[Callable, int]:
    """Products of matrices as large as an LLM's, and their FLOPs: how fast this machine computes. A GPU gets enough of
    them at once that starting them is nothing beside."""
    rows, width, times = (256, 4096, 1) if device.type == "cpu" else (8192, 4096, 100)
    left, right = (torch.randn(n, width, device=device, dtype=dtype) for n in (rows, width))

    def multiply() -> None:
        for _ in range(times):
            left @ right

    return multiply, times * 2 * rows * width**2


def wait(device: torch.device) -> None:
    """A GPU only queues its work: a clock has to wait for the end of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def described(device: torch.device, **found) -> dict:
    """What was found, and the machine beside it."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None  # far above the threads: disturbed
    return provenance.describe(device=device, processor=provenance.cpu_name(), load=load, **found)


def write(result: dict, out: Path) -> None:
    try:
        with files.errors_about(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the results to {out}: {error.strerror}") from error


def leave(result: dict, out: Path | str | None, png: Path | str | None, draw: Callable) -> None:
    """The numbers as JSON and as a picture, where they are wanted."""
    if out is not None:
        write(result, Path(out))
    if png is not None:
        print(plots.save(draw(result), png))


def finish(
    said: str, result: dict, describe: Callable, draw: Callable, out: Path | str | None, png: Path | str | None
) -> dict:
    """What a benchmark does at its end: says what it found, on which machine, and leaves it where it is wanted."""
    print(said)
    print(MACHINE.format(**result))
    print(describe(result))
    leave(result, out, png, draw)
    return result
