"""Columns of the rectangle: layers of the LLM that a step skips, forward and backward.

    x_{l+1} = x_l + f_l(x_l)     a skipped layer leaves the residual stream as it is: x_{l+1} = x_l

That is STS's layer dynamic skipper for the tuning stage (arXiv 2509.18150). Public of it is that layers of the LLM are
skipped dynamically, "during both forward and backward passes". What follows is a reconstruction, and ours: that a step
skips the same layers for all samples and on all ranks, exactly int(skip * layers) of them; that nothing is rescaled;
that some layers are protected; when a step runs all of them; and both ways to choose.

random      without replacement, layer l (from 0) with weight l + 1: deeper ones more often, as in stochastic depth,
            since later layers of an LLM change the stream less. A function of (seed, step).
influence   the layers that change the answer rows least. Measured on steps that run every layer, as

                I_l = mean over answer rows of  1 - cos(x_l, x_{l+1})

            The angle and not the norm of the change, because every layer reads its input through an RMSNorm: what
            only scales the stream is invisible to all that follow. The mean is over answer tokens and forgets: both
            of its sums are multiplied with 0.9 before a measurement is added.

Slow steps run every layer, and so does their teacher. It is what the student is to become at inference, it costs a
few pruned rows, and a teacher without some layers would teach what is missing. Every `every`-th other step runs all
layers too, so that a run without slow steps measures and sees the whole depth now and then. Until something has been
measured, `influence` skips nothing.

The trade-off: `influence` settles on nearly the same layers and hardly trains them; `random` trains all of them, but
skips some that matter.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .scheduler import Plan
from .util.errors import UserError, counted, unknown

CHOICES = ("random", "influence")
MEMORY = 0.9  # what is left of earlier measurements when another one is added


class LayerSkipper:
    """A part of a schedule (`scheduler.Combined`) that chooses the layers of a step."""

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
        if choose not in CHOICES:
            raise unknown("way to choose layers", choose, CHOICES)
        free, count = layers - protect_first - protect_last, int(skip * layers + 1e-6)
        if not 0 < skip < 1 or not count:
            least = math.ceil(1000 / layers) / 1000  # as printed, it must be enough
            raise UserError(
                f"skip = {skip}: of {counted(layers, 'layer')} that is none or all; give at least {least:g} and less "
                f"than 1"
            )
        if min(protect_first, protect_last) < 0 or count > free or count == layers:
            raise UserError(
                f"skip = {skip}: {counted(count, 'layer')} of {layers}, but beside the first {protect_first} and the "
                f"last {protect_last}, which are protected, there are {max(free, 0)}"
            )
        if every < 0:
            raise UserError(f"every = {every}: a number of steps, or 0 for none")
        self.settings = {
            "layers": layers, "skip": skip, "choose": choose, "protect_first": protect_first,
            "protect_last": protect_last, "every": every, "seed": seed,
        }  # fmt: skip
        self.count, self.choose, self.every, self.seed = count, choose, every, seed
        self.layers, self.free = layers, range(protect_first, layers - protect_last)
        self.sums, self.answers = [0.0] * layers, 0.0  # of 1 - cos, and of the rows that they were taken of

    def change(self, plan: Plan, step: int) -> Plan:
        by_influence = self.choose == "influence"
        whole = plan.mode == "slow" or (self.every and step % self.every == self.every - 1)
        if whole or (by_influence and not self.answers):
            return replace(plan, measure=by_influence)
        skipped = self._least() if by_influence else self._drawn(step)
        return replace(plan, layers=tuple(layer for layer in range(self.layers) if layer not in skipped))

    def observe(self, plan: Plan, seen: dict) -> None:
        """What a step measured, summed over all ranks: for each layer the sum of 1 - cos over the answer rows. (In a
        loop of your own, with one forward a step: `observe(plan, {"step": step, **out.metrics})`.)"""
        if plan.measure and self.choose == "influence":
            self.sums = [MEMORY * old + float(new) for old, new in zip(self.sums, seen["influence"], strict=True)]
            self.answers = MEMORY * self.answers + seen["answers"]

    @property
    def on_average(self) -> float:
        """Layers that run on a step that is not slow."""
        return self.layers - self.count * (1 - 1 / self.every if self.every else 1)

    def _least(self) -> set[int]:
        return set(sorted(self.free, key=lambda layer: (self.sums[layer], layer))[: self.count])

    def _drawn(self, step: int) -> set[int]:
        """One after the other, in whole numbers: the same on every machine, with no rounding to disagree about."""
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

    def state_dict(self) -> dict:
        return {"kind": type(self).__name__, **self.settings, "sums": self.sums, "answers": self.answers}

    def load_state_dict(self, state: dict) -> None:
        settings = {name: value for name, value in state.items() if name not in ("sums", "answers")}
        if settings != {"kind": type(self).__name__, **self.settings}:
            raise UserError(f"the checkpoint's layers were skipped by {settings}, this run asks for {self.settings}")
        self.sums, self.answers = [*state["sums"]], state["answers"]


@contextmanager
def measuring_influence(layers: Sequence[nn.Module], slots: Tensor) -> Iterator[list[Tensor]]:
    """While they run once, a list that each layer appends its sum of 1 - cos(input, output) over these slots to.

    Nothing of a layer is kept and nothing waits for the device. The hooks are gone before the backward, so activations
    that are computed again are not measured again.
    """
    found: list[Tensor] = []

    @torch.no_grad()
    def look(layer: nn.Module, given: tuple, out: Tensor) -> None:
        before, after = (x.flatten(0, 1).index_select(0, slots).float() for x in (given[0], out))
        found.append((1 - F.cosine_similarity(before, after, dim=-1)).sum())

    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
