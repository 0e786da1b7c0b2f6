"""What a training step leaves out, as one value; and the schedules that choose it.

A step is a rectangle, rows (tokens) x columns (LLM layers), and its area is its cost. A `Plan` names the sub-rectangle
that a step trains on. A schedule maps a step number to a `Plan`, and nothing else decides:

    plan = schedule.plan(step)          # a pure function of (seed, step, observed state)

so every rank draws the same mode without talking, a resumed run repeats itself, and `plan(7)` means the same whether
or not `plan(6)` was ever asked. The draw is a hash of (seed, step), not a random generator that somebody else could
advance: the official code calls Python's `random.random()` in each process and agrees across ranks only by luck.

This file knows nothing of tensors or models.
"""

import hashlib
import math
from dataclasses import dataclass

from .util.errors import UserError, unknown

MODES = ("full", "fast", "slow")


@dataclass(frozen=True)
class Plan:
    """One step's sub-rectangle.

    full: every row, no isolator, plain cross-entropy.
    fast: `keep` of each image's visual rows, isolator rows in front of them.
    slow: every row, no isolator, taught by a fast forward of the same batch (`keep` is what that teacher sees).
    """

    mode: str
    keep: float = 1.0  # share of an image's visual rows
    distill: float = 0.0  # weight of KL(teacher || student); slow plans only
    layers: tuple[int, ...] | None = None  # the LLM layers that run; None = all
    answer_keep: float = 1.0  # share of answer rows
    measure: bool = False  # whether the step says how much each layer changes the answer rows

    def __post_init__(self):
        if self.mode not in MODES:
            raise unknown("mode", self.mode, MODES)
        for name in ("keep", "answer_keep"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} = {getattr(self, name)}: a share must be above 0 and at most 1")
        if not 0 <= self.distill < float("inf"):
            raise UserError(f"distill = {self.distill}: a loss weight cannot be negative or infinite")
        if self.layers is not None:
            ascending = list(self.layers) == sorted(set(self.layers))
            if not self.layers or self.layers[0] < 0 or not ascending:
                raise UserError(
                    f"layers = {self.layers}: give at least one layer, counted from 0, ascending, each once"
                )
            if self.measure:
                raise UserError("a step that skips layers cannot measure them")

    @property
    def taught(self) -> bool:
        """Whether the fast mode teaches this step."""
        return self.mode == "slow" and self.distill > 0


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on (seed, step) only: same on every machine, rank and Python version."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


class Schedule:
    """The schedules below carry no state: `state_dict` is their settings, and loading other settings is an error."""

    ahead = math.inf  # a step's mode and rows are settled so many steps before it: batches may be made from then on

    def plan(self, step: int) -> Plan:
        raise NotImplementedError

    def observe(self, plan: Plan, seen: dict) -> None:
        """What a step of this plan saw, the same numbers on all ranks: all that a schedule may depend on beside its
        settings. `seen` is which "step" it was, and the metrics of its forward, of all its answers."""

    def state_dict(self) -> dict:
        return {"kind": type(self).__name__, **vars(self)}

    def load_state_dict(self, state: dict) -> None:
        if state != self.state_dict():
            raise UserError(f"the checkpoint was made with schedule {state}, this run asks for {self.state_dict()}")


class FullSchedule(Schedule):
    """Every step sees everything: ordinary training, the baseline."""

    def plan(self, step: int) -> Plan:
        return Plan("full")


class FastSchedule(Schedule):
    """Every step is pruned: DualSpeed's alignment stage, and the pruned-only baseline of its tuning stage."""

    def __init__(self, keep: float = 0.1):
        Plan("fast", keep=keep)  # refuses a bad share now, not at the first step that needs it
        self.keep = keep

    def plan(self, step: int) -> Plan:
        return Plan("fast", keep=self.keep)


class DualSpeedSchedule(Schedule):
    """Each step is slow with probability `slow`, independently: the official schedule (`bernoulli`)."""

    def __init__(self, slow: float = 0.1, keep: float = 0.1, distill: float = 1.0, seed: int = 0):
        if not 0 <= slow <= 1:
            raise UserError(f"slow = {slow}: the share of slow steps must be between 0 and 1")
        Plan("slow", keep=keep, distill=distill)
        self.slow, self.keep, self.distill, self.seed = slow, keep, distill, seed

    def plan(self, step: int) -> Plan:
        if uniform(self.seed, step) < self.slow:
            return Plan("slow", keep=self.keep, distill=self.distill)
        return Plan("fast", keep=self.keep)


class PeriodicSchedule(DualSpeedSchedule):
    """The same share of slow steps, spread evenly: step s is slow when s * slow passes a whole number.

    With slow = 1/N that is the last of every N steps. No luck in how many slow steps a short run gets.
    """

    def plan(self, step: int) -> Plan:
        # The +1e-9 keeps slow = 0.1 from slipping a step: (step + 1) * 0.1 falls a hair short of some whole numbers.
        if int((step + 1) * self.slow + 1e-9) > int(step * self.slow + 1e-9):
            return Plan("slow", keep=self.keep, distill=self.distill)
        return Plan("fast", keep=self.keep)


class Combined(Schedule):
    """A schedule, and what else its steps leave out.

    Each part is asked in turn for the plan it makes of the one before, `part.change(plan, step)`, and is as pure as a
    schedule. It also has `observe`, `state_dict` and `load_state_dict`.
    """

    def __init__(self, schedule: Schedule, *parts):
        self.schedule, self.parts, self.ahead = schedule, parts, schedule.ahead

    def plan(self, step: int) -> Plan:
        plan = self.schedule.plan(step)
        for part in self.parts:
            plan = part.change(plan, step)
        return plan

    def observe(self, plan: Plan, seen: dict) -> None:
        for part in (self.schedule, *self.parts):
            part.observe(plan, seen)

    def state_dict(self) -> dict:
        return {"schedule": self.schedule.state_dict(), "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        if state.keys() != {"schedule", "parts"} or len(state["parts"]) != len(self.parts):
            raise UserError(f"the checkpoint was made with schedule {state}, this run asks for {self.state_dict()}")
        self.schedule.load_state_dict(state["schedule"])
        for part, of in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(of)


KINDS = ("full", "fast", "bernoulli", "periodic", "adaptive")  # that a recipe can name; `schedules.build` makes them
