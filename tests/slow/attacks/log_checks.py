"""Checks the log of a finished run: by formulas that are written down here once more, and by its checkpoints.

Nothing here asks the code that trained: schedules, the order of samples and learning rates are computed again from the
recipe. Only the losses of fast steps need the package's own forward, with a model that is built again for each.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from scipy.stats import binom
from support.runs import log_of
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from tinyspeed.data import digits, loader
from tinyspeed.data.examples import collate
from tinyspeed.recipe import Recipe
from tinyspeed.training import build, checkpoint
from tinyspeed.training.loop import StageRun, Totals

UNLIKELY = 1e-9  # a number of slow steps that is less likely than this is called wrong
NEAR = 2e-5  # relative: a loss whose sum is taken in another order


def wrong_lines(made: Recipe) -> list[str]:
    """Returns what is not as its formula says, at any step. The recipe has one stage, `train`."""
    logged = log_of(made)
    found = [] if [e["step"] for e in logged] == [*range(1, made.train.steps + 1)] else ["steps are not 1, 2, 3 ..."]
    for check in (_rates, _modes, _answers, _layers, _shares, _seconds):
        found += [f"{check.__name__[1:]}: {line}" for line in [*check(made, logged)][:3]]
    return found


def _rates(made: Recipe, logged: list[dict]) -> Iterator[str]:
    steps = made.train.steps
    warm = math.ceil(made.train.warmup * steps)
    for step, entry in enumerate(logged):
        share = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
        if not math.isclose(entry["lr"], made.train.lr * share, rel_tol=1e-12, abs_tol=1e-18):
            yield f"step {step + 1} has {entry['lr']}, not {made.train.lr * share}"


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1): the upper 53 bits of a hash."""
    return (int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest(), "big") >> 11) / 2**53


def _modes(made: Recipe, logged: list[dict]) -> Iterator[str]:
    d = made.dualspeed
    shares = [d.slow, d.slow]  # adaptive: of each block of 64 steps
    for step, entry in enumerate(logged):
        if d.schedule == "periodic":
            slow = math.floor((step + 1) * d.slow + 1e-9) > math.floor(step * d.slow + 1e-9)
        elif d.schedule == "adaptive":
            block = step // 64
            if block == len(shares):  # computed from the block before the last one
                before = [e for e in logged[64 * (block - 2) : 64 * (block - 1)] if e["mode"] == "slow"]
                gap = sum((e["ce"] - e["ce_teacher"]) * e["answers"] for e in before)
                answers, share = sum(e["answers"] for e in before), shares[-1]
                if answers:
                    x = min(2.0, max(0.0, gap / answers / d.gap))
                    share = min(max(share * max(x, (1 + x) / 2), d.slow / 4), min(1.0, 4 * d.slow))
                shares.append(share)
            slow = uniform(made.run.seed, step) < shares[block]
        else:
            slow = uniform(made.run.seed, step) < d.slow
        if (entry["mode"] == "slow") != slow:
            yield f"step {step + 1} is {entry['mode']}"


def _shares(made: Recipe, logged: list[dict]) -> Iterator[str]:
    """The number of slow steps in all."""
    d, steps = made.dualspeed, len(logged)
    slow = sum(e["mode"] == "slow" for e in logged)
    low, high = (d.slow / 4, min(1.0, 4 * d.slow)) if d.schedule == "adaptive" else (d.slow, d.slow)
    least, most = binom.ppf(UNLIKELY, steps, low), binom.isf(UNLIKELY, steps, high)
    if d.schedule == "periodic":
        least = most = math.floor(steps * d.slow + 1e-9)
    if not least <= slow <= most:
        yield f"{slow} slow steps of {steps}, expected {least:.0f} to {most:.0f}"


def samples_of(made: Recipe, step: int) -> list[int]:
    """The samples of a step: every epoch has its own permutation."""
    n, batch = made.digits.pictures, made.train.batch
    found = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, place = divmod(position, n)
        found.append(int(np.random.default_rng([made.run.seed, epoch]).permutation(n)[place]))
    return found


def _answers(made: Recipe, logged: list[dict]) -> Iterator[str]:
    """A step learns every answer token of its samples, or the share of each sample's that ReGATE keeps."""
    source, r = digits.from_recipe(made), made.regate
    counted = [source.lengths(i)[2] for i in range(made.digits.pictures)]
    for step, entry in enumerate(logged):
        each = [counted[i] for i in samples_of(made, step)]
        skips = r.keep < 1 and entry["mode"] != "slow" and step >= r.warmup and step % r.cycle >= r.refresh
        # A sample that was not seen before keeps all of them, but each was seen during the warm-up.
        want = sum(max(1, math.ceil(r.keep * n - 1e-9)) for n in each) if skips else sum(each)
        if entry["answers"] != want:
            yield f"step {step + 1} has {entry['answers']}, not {want}"


def _layers(made: Recipe, logged: list[dict]) -> Iterator[str]:
    s, depth = made.sts, made.digits.layers
    measured = s.layers == "random"
    for step, entry in enumerate(logged):
        whole = not s.skip or entry["mode"] == "slow" or step % s.every == s.every - 1 or not measured
        want = None if whole else depth - int(s.skip * depth + 1e-6)
        measured = measured or whole
        if entry["layers"] != want:
            yield f"step {step + 1} runs {entry['layers']}, not {want}"


def _seconds(made: Recipe, logged: list[dict]) -> Iterator[str]:
    times = [entry["seconds"] for entry in logged]
    if not all(a < b for a, b in pairwise(times)):
        yield "they do not grow at every step"


def wrong_losses(made: Recipe) -> tuple[Counter, list[str]]:
    """Computes the loss of the step after every checkpoint again. Returns how many there were, and those that differ
    from the log."""
    logged, checked, found = log_of(made), Counter(), []
    torch.set_num_threads(1)
    for folder in sorted((made.folder / "checkpoints").glob("step-*")):
        saved, state = checkpoint.read(folder)
        step = state["stage_step"]
        if step == made.train.steps:
            continue
        entry = logged[step]
        for how, value, logs in _losses(made, saved, state, entry):
            checked[how] += 1
            if not math.isclose(value, logs, rel_tol=NEAR):
                found.append(f"step {step + 1} ({entry['mode']}): {value:.8g} {how}, but {logs:.8g} was logged")
    return checked, found


def _losses(made: Recipe, saved: checkpoint.Saved, state: dict, entry: dict) -> Iterator[tuple[str, float, float]]:
    """Yields (how it was computed, the loss, the loss in the log)."""
    step = state["stage_step"]
    model, source = build.build(made)
    run = StageRun(made, model, source, "train", 0, made.train, Totals(**state["totals"]))
    run.restore(saved, state)
    plan = model.schedule.plan(step)
    parts = (part for part, _ in run._parts(step, plan))
    done = run._forward_backward(step, plan, loader.batches(source, parts, run.pad))
    yield "computed again", float(done["loss"]), entry["loss"]
    if entry["mode"] == "slow" and not made.lora.rank:
        yield "by transformers", _plain_loss(made, saved, step), entry["ce"]


@torch.no_grad()
def _plain_loss(made: Recipe, saved: checkpoint.Saved, step: int) -> float:
    """The loss of a plain LLaVA with the checkpoint's weights, on all tokens."""

    plain = LlavaForConditionalGeneration.from_pretrained(made.model.path, dtype=torch.float32).eval()
    weights = {name.removeprefix("model/model."): saved[name] for name in saved if name.startswith("model/model.")}
    assert not plain.load_state_dict(weights, strict=False).unexpected_keys
    assert len(weights) > 20
    batch = collate([digits.from_recipe(made).example(i) for i in samples_of(made, step)], 0)
    logits = plain(batch["input_ids"], batch["pixel_values"], attention_mask=batch["attention_mask"]).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()))
