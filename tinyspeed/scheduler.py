"""What a training step leaves out, as one value; and the schedules that choose it.

A step is a rectangle, tokens x LLM layers, and its area is its cost. A `Plan` names the part of the rectangle that one
step computes. A schedule gives each step number its `Plan`:

    plan = schedule.plan(step)          # a pure function of the seed, the step and what earlier steps observed

So every rank gets the same plan without talking to the others, a resumed run repeats itself, and `plan(7)` is the same
whether or not anybody asked for `plan(6)`. A random schedule hashes (seed, step) instead of using a random generator,
because other code could advance a generator. The official code calls Python's `random.random()` in each process, so its
ranks agree only by luck.

This file knows nothing of tensors or models.
"""

import copy
import hashlib
import math
from dataclasses import dataclass, replace

from .util import require, require_known

MODES = ("full", "fast", "slow")
KINDS = ("full", "fast", "bernoulli", "periodic", "adaptive")  # the schedules that a recipe can name


@dataclass(frozen=True)
class Plan:
    """The part of the rectangle that one step computes.

    full: all tokens, no isolator, plain cross-entropy.
    fast: a share `keep` of each image's tokens, with the isolator in front of them.
    slow: all tokens, no isolator. A fast forward of the same batch is the teacher, and `keep` is the share it sees.
    """

    mode: str
    keep: float = 1.0  # share of each image's tokens
    distill: float = 0.0  # weight of KL(teacher || student), in slow plans only
    layers: tuple[int, ...] | None = None  # the LLM layers that run; None means all
    answer_keep: float = 1.0  # share of the answer tokens
    weigh: bool = True  # whether kept tokens may weigh as many as they stand for
    measure: bool = False  # whether the step measures how much each layer changes the answer tokens

    def __post_init__(self):
        require_known("mode", self.mode, MODES)
        for name in ("keep", "answer_keep"):
            share = getattr(self, name)
            require(0 < share <= 1, f"{name} = {share}: a share must be above 0 and at most 1")
        require(0 <= self.distill < math.inf, f"distill = {self.distill}: a loss weight cannot be negative or infinite")
        if self.layers is not None:
            good = bool(self.layers) and self.layers[0] >= 0 and list(self.layers) == sorted(set(self.layers))
            require(good, f"layers = {self.layers}: give at least one layer, counted from 0, ascending, each once")
            require(not self.measure, "a step that skips layers cannot measure them")

    @property
    def taught(self) -> bool:
        """Whether the fast mode is the teacher in this step."""
        return self.mode == "slow" and self.distill > 0


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends only on (seed, step): the same on every machine, rank and Python version."""
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


class Stateful:
    """What schedules and their parts share: they may learn from steps, and a checkpoint holds their state.

    An instance's attributes are its settings, except for those named here. A checkpoint with other settings is refused.
    """

    learned: tuple[str, ...] = ()  # attributes that `observe` changes
    derived: tuple[str, ...] = ()  # attributes that follow from the others, and that a checkpoint leaves out

    def observe(self, plan: Plan, metrics: dict) -> None:
        """Learns from a step with this plan: from its number, "step", and from the metrics of its forward over the
        answers of all ranks. Plans depend only on these and on the settings."""

    def state_dict(self) -> dict:
        state = {name: value for name, value in vars(self).items() if name not in self.derived}
        return {"kind": type(self).__name__, **copy.deepcopy(state)}

    def load_state_dict(self, state: dict) -> None:
        theirs, ours = self._settings(state), self._settings(self.state_dict())
        require(theirs == ours, f"the checkpoint was made with schedule {theirs}, this run asks for {ours}")
        vars(self).update({name: copy.deepcopy(state[name]) for name in self.learned})

    def _settings(self, state: dict) -> dict:
        return {name: value for name, value in state.items() if name not in self.learned}


class Schedule(Stateful):
    """The base of all schedules."""

    @property
    def ahead(self) -> float:
        """How many steps ahead a plan is final: batches may be prepared so early."""
        return math.inf

    def plan(self, step: int) -> Plan:
        raise NotImplementedError


class FullSchedule(Schedule):
    """Every step sees all tokens: ordinary training, the baseline."""

    def plan(self, step: int) -> Plan:
        return Plan("full")


class FastSchedule(Schedule):
    """Every step is pruned: DualSpeed's alignment stage, and the pruned-only baseline of its tuning stage."""

    def __init__(self, keep: float = 0.1):
        Plan("fast", keep=keep)  # refuses a bad share now and not at the first step
        self.keep = keep

    def plan(self, step: int) -> Plan:
        return Plan("fast", keep=self.keep)


class DualSpeedSchedule(Schedule):
    """Each step is slow with probability `slow`, independently of the others: the official schedule (`bernoulli`)."""

    def __init__(self, slow: float = 0.1, keep: float = 0.1, distill: float = 1.0, seed: int = 0):
        require(0 <= slow <= 1, f"slow = {slow}: the share of slow steps must be between 0 and 1")
        Plan("slow", keep=keep, distill=distill)
        self.slow, self.keep, self.distill, self.seed = slow, keep, distill, seed

    def plan(self, step: int) -> Plan:
        if self.is_slow(step):
            return Plan("slow", keep=self.keep, distill=self.distill)
        return Plan("fast", keep=self.keep)

    def is_slow(self, step: int) -> bool:
        return uniform(self.seed, step) < self.slow


class PeriodicSchedule(DualSpeedSchedule):
    """The same share of slow steps, evenly spaced: a step is slow when step * slow passes a whole number.

    With slow = 1/N that is the last of every N steps. So a short run does not get more or fewer slow steps by chance.
    """

    def is_slow(self, step: int) -> bool:
        # 1e-9 is for rounding: (step + 1) * 0.1 is slightly below some whole numbers, and the slow step would be late.
        return int((step + 1) * self.slow + 1e-9) > int(step * self.slow + 1e-9)


class LateWeights(Stateful):
    """A part of `Combined`: before step `after`, kept tokens have no weights."""

    def __init__(self, after: int):
        self.after = after

    def change(self, plan: Plan, step: int) -> Plan:
        return replace(plan, weigh=step >= self.after)


class Combined(Schedule):
    """A schedule with parts that let its steps leave out more, such as layers (`sts.py`) or answers (`regate.py`),
    or that change them in other ways.

    Each part in turn changes the plan, `part.change(plan, step)`, and is as pure as a schedule. It has `observe`,
    `state_dict` and `load_state_dict` as well.
    """

    def __init__(self, schedule: Schedule, *parts):
        self.schedule, self.parts = schedule, parts

    @property
    def ahead(self) -> float:
        return self.schedule.ahead

    def plan(self, step: int) -> Plan:
        plan = self.schedule.plan(step)
        for part in self.parts:
            plan = part.change(plan, step)
        return plan

    def observe(self, plan: Plan, metrics: dict) -> None:
        for part in (self.schedule, *self.parts):
            part.observe(plan, metrics)

    def state_dict(self) -> dict:
        return {"schedule": self.schedule.state_dict(), "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        alike = state.keys() == {"schedule", "parts"} and len(state["parts"]) == len(self.parts)
        require(alike, f"the checkpoint was made with schedule {state}, this run asks for {self.state_dict()}")
        self.schedule.load_state_dict(state["schedule"])
        for part, of in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(of)
