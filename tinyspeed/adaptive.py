"""As many slow steps as the gap between the modes asks for: DualSpeed's schedule with a share that moves.

Slow steps are there because a model trained on pruned pictures is poor at whole ones, and they are most of the cost.
How poor can be measured on the slow steps themselves: each runs the fast mode too, as its teacher, on the same answers.
Of each block of B = 64 steps

    G = (sum CE_full - sum CE_fast) / answers        of its slow steps: student and teacher on the same answer tokens
    x = clip(G / gap, 0, 2)
    share <- clip(share * max(x, (1 + x) / 2), slow / 4, min(1, 4 slow))

so no gap halves the share, the tolerated one keeps it, and twice that doubles it. Both losses are of the same answers,
so what is hard or easy about a batch is in both, and a few slow steps are enough to see a gap. It is counted in nats a
token and not as a share of the loss: once little is left to learn, a large share of it is still nothing. The share
begins at `slow`, and stays within a factor of 4 of it: a run costs at most what four times as many slow steps cost, and
never stops measuring. A block that drew no slow step has seen nothing and changes nothing.

The papers leave a schedule like this open; all of it is ours. There are no logarithms and powers in it: sums, products
and quotients round the same on every machine, and so all ranks draw the same modes.

Known ahead. Micro-batches are made before their step, so a share must be known before what it answers to is over. The
share of block b follows from blocks 0 to b - 2: when any step of block b - 1 begins, all plans of block b are known.
So nothing may be made more than B steps ahead (`stage.py` sees to that). Asked for a plan that is not known yet, this
answers with the newest share: a forecast, good enough to announce or to rehearse a run.

The trade-off: a share answers to what was up to two blocks ago, so a run of at most 128 steps is not adapted at all,
and the share swings. The student trains with dropout and the teacher runs without, which looks like a gap; samples
without a picture have none, and thin it out.
"""

import math

from .scheduler import DualSpeedSchedule, Plan, uniform
from .util.errors import NotFinite, UserError

BLOCK = 64  # steps
FACTOR = 4  # how far the share may go from where it began


class AdaptiveSchedule(DualSpeedSchedule):
    """`slow` is the share of slow steps to begin with, `gap` the nats a token that are fine. Tell it what each step
    saw: `observe(plan, {"step": step, **out.metrics})`, the same numbers on all ranks."""

    def __init__(self, slow: float = 0.1, keep: float = 0.1, distill: float = 1.0, seed: int = 0, gap: float = 0.05):
        super().__init__(slow, keep, distill, seed)
        if slow == 0:
            raise UserError("slow = 0: an adaptive share begins there, and would stay; give a share above 0")
        if distill == 0:
            raise UserError(
                "distill = 0: an adaptive share follows the gap between student and teacher, and there is no teacher; "
                "give a weight above 0, or another schedule"
            )
        if not 0 < gap < math.inf:
            raise UserError(f"gap = {gap}: the nats a token that are fine must be above 0")
        self.gap, self.block = gap, BLOCK
        self.sums: list[list[float]] = []  # of each block's slow steps: CE_full - CE_fast of all answers, and how many
        self.shares = [slow, slow]  # of each block that is known

    @property
    def ahead(self) -> int:
        return self.block

    def plan(self, step: int) -> Plan:
        share = self.shares[min(step // self.block, len(self.shares) - 1)]
        if not math.isfinite(share):  # nothing is below it: no step would be slow again, in silence
            raise NotFinite(f"the adaptive share of slow steps is {share}")
        if uniform(self.seed, step) < share:
            return Plan("slow", keep=self.keep, distill=self.distill)
        return Plan("fast", keep=self.keep)

    def observe(self, plan: Plan, seen: dict) -> None:
        if plan.mode != "slow":
            return
        block = seen["step"] // self.block
        self.sums += [[0.0, 0.0] for _ in range(block + 1 - len(self.sums))]
        self.sums[block][0] += (float(seen["ce"]) - float(seen["ce_teacher"])) * seen["answers"]
        self.sums[block][1] += seen["answers"]
        self._follow(block)

    def _follow(self, block: int) -> None:
        """The shares, after what was seen in this block or a later one."""
        del self.shares[block + 2 :]
        for more, answers in self.sums[len(self.shares) - 2 :]:
            self.shares.append(self._moved(self.shares[-1], more, answers))

    def _moved(self, share: float, more: float, answers: float) -> float:
        if not answers:  # no slow step
            return share
        x = min(2.0, max(0.0, more / answers / self.gap))
        return min(max(share * max(x, (1 + x) / 2), self.slow / FACTOR), min(1.0, self.slow * FACTOR))

    def _settings(self) -> dict:
        return {name: value for name, value in super().state_dict().items() if name not in ("sums", "shares")}

    def state_dict(self) -> dict:
        return {**self._settings(), "sums": [[*block] for block in self.sums]}  # not what the next step adds to

    def load_state_dict(self, state: dict) -> None:
        settings = {name: value for name, value in state.items() if name != "sums"}
        if settings != self._settings():
            raise UserError(f"the checkpoint was made with schedule {settings}, this run asks for {self._settings()}")
        self.sums = [[*block] for block in state["sums"]]
        self._follow(0)
