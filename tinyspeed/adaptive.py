"""DualSpeed's schedule with a share of slow steps that follows the gap between the two modes.

Slow steps cost the most. They are needed because a model trained on pruned images does poorly on whole ones. How poorly
can be measured on the slow steps themselves: each also runs the fast mode, as its teacher, on the same answers. After
each block of B = 64 steps, from the slow steps among them,

    G = (sum CE_full - sum CE_fast) / answers        student minus teacher, on the same answer tokens
    x = clip(G / gap, 0, 2)
    share <- clip(share * max(x, (1 + x) / 2), slow / 4, min(1, 4 slow))

So the share is halved if there is no gap, stays as it is at a gap of `gap`, and doubles at twice that. Both losses are
of the same answers, so a batch that is hard is hard for both, and a few slow steps are enough to see a gap. The gap is
in nats per token and not relative to the loss: when little is left to learn, a large part of it is still nothing. The
share begins at `slow` and stays within a factor of 4 of it: a run costs at most as much as with four times as many slow
steps, and it never stops measuring. A block without a slow step changes nothing.

The papers leave such a schedule open; all of this is ours. It uses sums, products and quotients, which round the same
on every machine, and no logarithms or powers. So all ranks get the same modes.

Micro-batches are prepared before their step, so a share must be known early. The share of block b follows from blocks 0
to b - 2: all plans of block b are final when block b - 1 begins, and batches may be prepared at most B steps ahead
(`ahead`). A plan that is asked for earlier uses the newest share: a guess, good enough for the checks before a run.

The trade-off: a share lags up to two blocks behind, so a run of at most 128 steps is not adapted at all, and the share
oscillates. The student trains with dropout and the teacher runs without, which looks like a gap. Samples without an
image have no gap and make it look smaller.
"""

import math

from .scheduler import DualSpeedSchedule, Plan, uniform
from .util import NotFinite, require

BLOCK = 64  # steps
FACTOR = 4  # how far the share may move from where it began


class AdaptiveSchedule(DualSpeedSchedule):
    """`slow` is the share of slow steps to begin with, `gap` the tolerated gap in nats per token. It must be told about
    each step: `observe(plan, {"step": step, **out.metrics})`, with the same numbers on all ranks."""

    learned = ("sums",)
    derived = ("shares",)

    def __init__(self, slow: float = 0.1, keep: float = 0.1, distill: float = 1.0, seed: int = 0, gap: float = 0.05):
        super().__init__(slow, keep, distill, seed)
        require(slow > 0, "slow = 0: an adaptive share begins there and would stay there; give a share above 0")
        alone = "an adaptive share follows the gap between student and teacher, and there is no teacher"
        require(distill > 0, f"distill = 0: {alone}; give a weight above 0, or another schedule")
        require(0 < gap < math.inf, f"gap = {gap}: the tolerated gap, in nats per token, must be above 0")
        self.gap, self.block = gap, BLOCK
        self.sums: list[list[float]] = []  # per block, over its slow steps: CE_full - CE_fast, and the answers
        self.shares = [slow, slow]  # of each block whose share is known

    @property
    def ahead(self) -> float:
        return self.block

    def is_slow(self, step: int) -> bool:
        share = self.shares[min(step // self.block, len(self.shares) - 1)]
        if not math.isfinite(share):  # no number is below NaN: without this check no step would be slow again
            raise NotFinite(f"the adaptive share of slow steps is {share}")
        return uniform(self.seed, step) < share

    def observe(self, plan: Plan, metrics: dict) -> None:
        if plan.mode != "slow":
            return
        block = metrics["step"] // self.block
        self.sums += [[0.0, 0.0] for _ in range(block + 1 - len(self.sums))]
        self.sums[block][0] += (float(metrics["ce"]) - float(metrics["ce_teacher"])) * metrics["answers"]
        self.sums[block][1] += metrics["answers"]
        self._update_shares(block)

    def _update_shares(self, block: int) -> None:
        """Computes the shares that follow from this block and later ones."""
        del self.shares[block + 2 :]
        for difference, answers in self.sums[len(self.shares) - 2 :]:
            self.shares.append(self._next_share(self.shares[-1], difference, answers))

    def _next_share(self, share: float, difference: float, answers: float) -> float:
        if not answers:  # no slow step
            return share
        x = min(2.0, max(0.0, difference / answers / self.gap))
        return min(max(share * max(x, (1 + x) / 2), self.slow / FACTOR), min(1.0, self.slow * FACTOR))

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._update_shares(0)
