"""How a step grows with the picture: from a small one to a video of 11,520 tokens.

    tinyspeed bench scaling

A frame of LLaVA-NeXT-Video is 576 patches, pooled to 144 tokens. 80 frames are 11,520 tokens in one list, of which fast
steps keep a tenth. The tower's time and what the LLM does with each token are proportional to the frames. Attention,
and the plugin's comparison of all tokens with each other, grow with their square. The slope of log time over log tokens
says which of the two dominates: 1 where time is proportional, 2 where the square has taken over.
"""

import numpy as np
import torch

from ..dualspeed import DualSpeed
from ..models import published
from ..rows import IGNORE
from ..scheduler import Plan
from ..util import plots, require, tables
from .harness import Results, time_in_turns
from .random_examples import random_weights

FRAMES = (1, 4, 8, 20, 40, 80)
WORDS, ANSWERS, TOKENS = 64, 32, 144  # of a sample, of a sample, of a frame
PLANS = {"fast": Plan("fast", keep=0.1), "full": Plan("full")}


def measure(device: torch.device, size: str = "tiny", frames: tuple[int, ...] = FRAMES, repeats: int = 5) -> Results:
    """Times forward and backward of one sample with one video of so many frames."""
    require(len(frames) > 1 and min(frames) > 0, f"frames = {frames}: at least two numbers, each at least 1")
    config = published.config_of(size, "video")
    print(f"{size}, one video and {WORDS} words; median of {repeats}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    net = random_weights(config, dtype, device)
    net.model.vision_tower.requires_grad_(False)
    model = DualSpeed(net, positions="original").train()

    def step(batch: dict[str, torch.Tensor], plan: Plan) -> None:
        model.step = 0
        model(**batch, plan=plan).loss.backward()
        model.zero_grad(set_to_none=True)

    found = []
    for count in frames:
        batch = _batch(config, count, device, dtype)
        steps = {name: lambda plan=plan, batch=batch: step(batch, plan) for name, plan in PLANS.items()}
        found.append({"frames": count, "tokens": count * TOKENS, **time_in_turns(steps, repeats, device)})
    slopes, last = ({name: _slope(some, name) for name in PLANS} for some in (found, found[-2:]))
    results = {"size": size, "repeats": repeats, "slopes": slopes, "last": last, "steps": found}
    yield describe(results), results


def _batch(config, frames: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    random, side = torch.Generator().manual_seed(0), config.vision_config.image_size
    words = torch.randint(config.image_token_id, (1, WORDS), generator=random)
    ids = torch.cat([torch.full((1, frames * TOKENS), config.video_token_id), words], 1)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - ANSWERS, IGNORE)
    video = torch.randn(1, frames, 3, side, side, generator=random)
    return {"input_ids": ids.to(device), "labels": labels.to(device), "pixel_values_videos": video.to(device, dtype)}


def _slope(steps: list[dict], name: str) -> float:
    """Returns the slope of the line through log time over log tokens."""
    tokens, times = [f["tokens"] for f in steps], [f[name]["median_ms"] for f in steps]
    return float(np.polyfit(np.log(tokens), np.log(times), 1)[0])


def describe(results: dict) -> str:
    lines = []
    for f in results["steps"]:
        fast, full = f["fast"]["median_ms"], f["full"]["median_ms"]
        lines.append([f"{f['tokens']:,}", f"{fast:,.0f} ms", f"{full:,.0f} ms", f"{full / fast:.2f}x"])
    slopes = [f"{name} {results['slopes'][name]:.2f}, at the end {results['last'][name]:.2f}" for name in PLANS]
    return tables.table(["image tokens", "fast", "full", "speed-up"], lines) + "\n\nslope: " + "; ".join(slopes)


def draw(results: dict):
    """Draws milliseconds over image tokens, both logarithmic."""
    fig = plots.figure(6.4, 4.2)
    ax = fig.subplots()
    fig.subplots_adjust(left=0.13, right=0.8, top=0.92, bottom=0.13)
    tokens, ends = [f["tokens"] for f in results["steps"]], []
    for at, name in enumerate(PLANS):
        times = [f[name]["median_ms"] for f in results["steps"]]
        style = {"color": plots.COLOURS[at + 1], "marker": plots.MARKERS[at], "linestyle": plots.DASHES[at]}
        ax.plot(tokens, times, clip_on=False, **style)
        ends.append((tokens[-1], times[-1], f"{name}: slope {results['slopes'][name]:.2f}", plots.COLOURS[at + 1]))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(right=tokens[-1])
    ax.set_xlabel("image tokens")
    ax.set_title("ms per step", loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    plots.label_ends(ax, ends)
    return fig
