"""STS (arXiv 2509.18150): fewer visual tokens while aligning, fewer LLM layers while tuning.

A step may skip layers of the LLM, forward and backward. A skipped layer leaves the residual stream as it is:

    x_{l+1} = x_l + f_l(x_l)     a layer that runs
    x_{l+1} = x_l                a layer that is skipped

What is public and what is ours: the paper has no public code. Of its visual token compressor it says only that it works
before the tokens enter the LLM. Every pruning plugin works there, so any of them can take its place: the recipe's
`sts.compress` is the share of tokens that the plugin keeps. Of its layer skipper it says that LLM layers are skipped
dynamically, "during both forward and backward passes". The rest is ours: a step skips the same layers for all samples
and on all ranks, exactly int(skip * layers) of them; nothing is rescaled; some layers are protected; some steps run
every layer; and both ways to choose.

random      without replacement, layer l (from 0) with weight l + 1. Deeper layers are skipped more often, as in
            stochastic depth, because the later layers of an LLM change the stream less. A function of (seed, step).
influence   the layers that change the answer rows least. Steps that run every layer measure

                I_l = mean over answer rows of  1 - cos(x_l, x_{l+1})

            It is the angle and not the size of the change, because every layer reads its input through an RMSNorm and
            does not notice the stream's scale. The mean forgets: its sums of changes and of answer rows are
            multiplied by 0.9 before a measurement is added.

Slow steps and their teachers run every layer. A slow step trains what is used at inference. A teacher costs only a few
pruned rows, and without some layers it would teach the student to do without them. Every `every`-th step runs all
layers too, so that a run without slow steps still measures and trains the whole depth. Until the first measurement,
`influence` skips nothing.

The trade-off: `influence` soon skips nearly the same layers in every step and hardly trains them. `random` trains all
layers but skips some that matter.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .scheduler import Plan, Stateful
from .util import counted, require, require_known

CHOICES = ("random", "influence")
MEMORY = 0.9  # the weight of earlier measurements when a new one is added


class LayerSkipper(Stateful):
    """Chooses the layers that a step runs. It is a part of `scheduler.Combined`."""

    learned, derived = ("sums", "answers"), ("count", "free")

    def __init__(
        self,
        layers: int,
        skip: float,
        choose: str = "random",
        protect_first: int = 1,
        protect_last: int = 1,
        every: int = 10,
        seed: int = 0,
    ):
        self.layers, self.skip, self.choose = layers, skip, choose
        self.protect_first, self.protect_last, self.every, self.seed = protect_first, protect_last, every, seed
        self.sums, self.answers = [0.0] * layers, 0.0  # of 1 - cos for each layer, and the number of answer rows
        self.count = int(skip * layers + 1e-6)  # how many layers a step skips
        self.free = range(protect_first, layers - protect_last)  # the layers that are not protected
        require_known("way to choose layers", choose, CHOICES)
        least = math.ceil(1000 / layers) / 1000  # rounded up, so that the value in the message is enough
        what = f"of {counted(layers, 'layer')} that is none or all; give at least {least:g}, and below 1"
        require(0 < skip < 1 and self.count > 0, f"skip = {skip}: {what}")
        fits = min(protect_first, protect_last) >= 0 and self.count <= len(self.free) and self.count < layers
        protected = f"the first {protect_first} and the last {protect_last}, which are protected"
        what = f"{counted(self.count, 'layer')} of {layers}, but beside {protected}, there are {len(self.free)}"
        require(fits, f"skip = {skip}: {what}")
        require(every >= 0, f"every = {every}: a number of steps, or 0 for none")

    def change(self, plan: Plan, step: int) -> Plan:
        by_influence = self.choose == "influence"
        runs_all = plan.mode == "slow" or (self.every and step % self.every == self.every - 1)
        if runs_all or (by_influence and not self.answers):
            return replace(plan, measure=by_influence)
        skipped = self._least_influential() if by_influence else self._drawn(step)
        return replace(plan, layers=tuple(layer for layer in range(self.layers) if layer not in skipped))

    def observe(self, plan: Plan, metrics: dict) -> None:
        """Adds what a step measured: for each layer the sum of 1 - cos over the answer rows of all ranks. (In a loop of
        your own, with one forward per step: `observe(plan, {"step": step, **out.metrics})`.)"""
        if plan.measure and self.choose == "influence":
            self.sums = [MEMORY * old + float(new) for old, new in zip(self.sums, metrics["influence"], strict=True)]
            self.answers = MEMORY * self.answers + metrics["answers"]

    @property
    def on_average(self) -> float:
        """The number of layers that run, averaged over the steps that are not slow."""
        return self.layers - self.count * (1 - 1 / self.every if self.every else 1)

    def _least_influential(self) -> set[int]:
        return set(sorted(self.free, key=lambda layer: (self.sums[layer], layer))[: self.count])

    def _drawn(self, step: int) -> set[int]:
        """Draws one layer after the other, with whole numbers only: no rounding, so all machines draw the same."""
        digest = hashlib.shake_128(f"layers/{self.seed}/{step}".encode()).digest(8 * self.count)
        left = list(self.free)
        for draw in range(self.count):
            number = int.from_bytes(digest[8 * draw : 8 * draw + 8], "big")
            mark = number * sum(layer + 1 for layer in left) >> 64  # below the sum of the weights
            for layer in left:
                mark -= layer + 1
                if mark < 0:
                    break
            left.remove(layer)
        return set(self.free) - set(left)


@contextmanager
def measuring_influence(layers: Sequence[nn.Module], slots: Tensor) -> Iterator[list[Tensor]]:
    """Yields a list to which each layer, when it runs, adds the sum of 1 - cos(input, output) over these slots.

    It stores no activations and does not wait for the device. The hooks are removed before the backward, so layers that
    are computed again are not measured again.
    """
    found: list[Tensor] = []

    @torch.no_grad()
    def measure(layer: nn.Module, given: tuple, out: Tensor) -> None:
        before, after = (x.flatten(0, 1).index_select(0, slots).float() for x in (given[0], out))
        found.append((1 - F.cosine_similarity(before, after, dim=-1)).sum())

    hooks = [layer.register_forward_hook(measure) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
