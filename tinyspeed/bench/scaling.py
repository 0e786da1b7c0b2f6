"""How a step grows with the picture: from a small one to a video of 11,520 tokens.

    tinyspeed bench scaling

A frame of LLaVA-NeXT-Video is 576 patches, pooled to 144 tokens; 80 frames are 11,520, in one list of which fast steps
keep a tenth. The tower and what the LLM does with each row grow with the frames; attention, and the plugin's comparison
of all tokens with each other, with their square. How far that is felt is the slope of log time over log tokens: 1 where
time is proportional, 2 where the square has taken over.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from ..dualspeed import DualSpeed
from ..models import published
from ..models.precision import device_of
from ..rows import IGNORE
from ..scheduler import Plan
from ..training import report
from ..util import plots, tables
from ..util.errors import UserError
from .timing import described, finish, timed

FRAMES = (1, 4, 8, 20, 40, 80)
WORDS, ANSWERS, PATCHES = 64, 32, 144
PLANS = {"fast": Plan("fast", keep=0.1), "full": Plan("full")}


def bench_scaling(
    size: str = "tiny",
    frames: tuple[int, ...] = FRAMES,
    repeats: int = 5,
    device: str = "cpu",
    out: Path | str | None = None,
    png: Path | str | None = None,
) -> dict:
    """Time forward and backward of one sample with one video of so many frames. Prints a table, returns everything, and
    writes it as JSON to `out` and as a picture to `png`."""
    if len(frames) < 2 or min(frames) < 1:
        raise UserError(f"frames = {frames}: at least two numbers, each at least 1")
    where = device_of(device)
    config = published.config_of(size, "video")
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with where:
        net = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=False)
    net.model.vision_tower.requires_grad_(False)
    model = DualSpeed(net, positions="original").train()

    def step(batch: dict[str, torch.Tensor], plan: Plan) -> None:
        model.step = 0
        model(**batch, plan=plan).loss.backward()
        model.zero_grad(set_to_none=True)

    found = []
    for count in frames:
        batch = _batch(config, count, where, dtype)
        times = timed({name: lambda plan=plan, b=batch: step(b, plan) for name, plan in PLANS.items()}, repeats, where)
        found.append({"frames": count, "tokens": count * PATCHES, **times})
    slopes = {name: _slope(found, name) for name in PLANS}
    last = {name: _slope(found[-2:], name) for name in PLANS}
    result = described(where, bench="scaling", size=size, repeats=repeats, slopes=slopes, last=last, steps=found)
    said = f"{size}, one video and {WORDS} words; median of {repeats}"
    return finish(said, result, describe, draw, out, png)


def describe(result: dict) -> str:
    lines = []
    for f in result["steps"]:
        fast, full = f["fast"]["median_ms"], f["full"]["median_ms"]
        lines.append([f"{f['tokens']:,}", f"{fast:,.0f} ms", f"{full:,.0f} ms", f"{full / fast:.2f}x"])
    slopes = [f"{name} {result['slopes'][name]:.2f}, at the end {result['last'][name]:.2f}" for name in PLANS]
    return tables.table(["visual tokens", "fast", "full", "speed-up"], lines) + "\n\nslope: " + "; ".join(slopes)


def _slope(found: list[dict], name: str) -> float:
    """Of the line through log time over log tokens."""
    tokens, times = ([f["tokens"] for f in found], [f[name]["median_ms"] for f in found])
    return float(np.polyfit(np.log(tokens), np.log(times), 1)[0])


def _batch(config, frames: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    draw, side = torch.Generator().manual_seed(0), config.vision_config.image_size
    words = torch.randint(config.image_token_id, (1, WORDS), generator=draw)
    ids = torch.cat([torch.full((1, frames * PATCHES), config.video_token_id), words], 1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - ANSWERS, IGNORE)
    video = torch.randn(1, frames, 3, side, side, generator=draw)
    return {"input_ids": ids.to(device), "labels": labels.to(device), "pixel_values_videos": video.to(device, dtype)}


def draw(result: dict):
    """Milliseconds over visual tokens, both logarithmic."""
    fig = plots.figure(6.4, 4.2)
    ax = fig.subplots()
    fig.subplots_adjust(left=0.13, right=0.8, top=0.92, bottom=0.13)
    tokens, ends = [f["tokens"] for f in result["steps"]], []
    for at, name in enumerate(PLANS):
        times = [f[name]["median_ms"] for f in result["steps"]]
        look = {"color": plots.COLOURS[at + 1], "marker": plots.MARKERS[at], "linestyle": plots.DASHES[at]}
        ax.plot(tokens, times, clip_on=False, **look)
        ends.append((tokens[-1], times[-1], f"{name}: slope {result['slopes'][name]:.2f}", plots.COLOURS[at + 1]))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(right=tokens[-1])
    ax.set_xlabel("visual tokens")
    ax.set_title("ms a step", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    report.label_ends(ax, ends)
    return fig
