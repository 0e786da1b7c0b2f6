"""ReGATE (arXiv 2507.21420): skip the answer tokens that are already easy.

    m <- beta m + (1 - beta) l                  difficulty of one answer token of one sample: what its loss has been
    d  = m + lambda l_ref             "sum"     with what a text-only LLM thinks of the same token
    d  = (1 - lambda) m + lambda l_ref   "mix"
    of a sample's n answer tokens the k = ceil(share n) with the largest d stay, of equals the earlier

A token that a language model predicts without the picture, and that the student predicts too, teaches little. What
becomes of it is in `rows.elide`: the row that predicts it leaves the computation.

`Memory` remembers m, a float a token, in one flat array; it knows no model. `Cycle` says which steps skip: after a
warm-up of the whole run, `refresh` steps of every `cycle` see all answers and bring every m up to date. Slow steps see
all answers too. They keep the model good at whole sequences, their teacher and student must have the same answers, and
they are the steps that cost what they cost: a refresh more comes for nothing.

The paper is known from its site and from notes, and no code is public. "sum" is the formula of the notes; their
ablation (lambda = 1 is "reference only") fits "mix", so both are here. (A figure of the site draws a product sign
between the losses, to which no weight lambda and no "reference only" would fit: that reading is not.) Ours, where
nothing is known: the cycle counts from step 0, warm-up included; a token's first loss is its m; until then l_ref stands
for m, so that both kinds can be compared. Without a reference (lambda = 0) a sample that was never seen keeps all its
answers: nothing is known of it, so in a single epoch nothing is skipped. Tokens that are skipped keep their m, and come
back only with a refresh.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .scheduler import Plan
from .util.errors import NotFinite, UserError, unknown

FUSIONS = ("sum", "mix")
NEVER = -1.0  # in place of the m of a token that was not visited yet; no loss is below 0


@dataclass(frozen=True)
class Settings:
    keep: float = 1.0  # Share of a sample's answer tokens that a step learns when it skips; 1 = ReGATE is off.
    reference: str = ""  # A text-only LLM with the same tokenizer, folder or hub id; empty = none.
    fusion: str = "sum"  # How reference losses join the student's: "sum" or "mix".
    weight: float = 0.5  # Weight of the reference losses (lambda).
    beta: float = 0.9  # How slowly earlier losses of a token are forgotten.
    cycle: int = 128  # Steps from one refresh to the next.
    refresh: int = 16  # Steps at the start of each cycle that see all answers.
    warmup: int = 100  # First steps of the run that see all answers; in a short run take a tenth of it.

    def __post_init__(self):
        for good, what in (
            (0 < self.keep <= 1, f"regate.keep = {self.keep}: a share must be above 0 and at most 1"),
            (self.keep < 1 or not self.reference, "regate.reference is given: set regate.keep below 1 too"),
            (0 <= self.weight <= 1000, f"regate.weight = {self.weight}: must be between 0 and 1,000"),
            (self.fusion != "mix" or self.weight <= 1, f'regate.weight = {self.weight}: at most 1 with fusion = "mix"'),
            (0 <= self.beta < 1, f"regate.beta = {self.beta}: must be at least 0 and below 1"),
            (self.warmup >= 0, f"regate.warmup = {self.warmup}: must not be negative"),
            (0 < self.refresh <= self.cycle, f"regate.refresh = {self.refresh}: between 1 and regate.cycle"),
            (
                self.keep == 1 or self.refresh < self.cycle,
                f"regate.refresh = {self.refresh}: of regate.cycle as many, none would skip anything",
            ),
        ):
            if not good:
                raise UserError(what)
        if self.fusion not in FUSIONS:
            raise unknown("regate.fusion", self.fusion, FUSIONS)
        if not self.reference and (self.fusion, self.weight) != (Settings.fusion, Settings.weight):
            raise UserError("regate.fusion and regate.weight weigh a reference's losses: set regate.reference too")


class Cycle:
    """Which steps skip, as a part of `scheduler.Combined`."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def skips(self, step: int) -> bool:
        """Whether a step skips answers, if it is not slow."""
        return step >= self.settings.warmup and step % self.settings.cycle >= self.settings.refresh

    def change(self, plan: Plan, step: int) -> Plan:
        return replace(plan, answer_keep=self.settings.keep) if plan.mode != "slow" and self.skips(step) else plan

    def observe(self, plan: Plan, seen: dict) -> None:
        """Nothing: which answers are hard is the `Memory`'s."""

    def state_dict(self) -> dict:
        s = self.settings
        return {"kind": "Cycle", "keep": s.keep, "cycle": s.cycle, "refresh": s.refresh, "warmup": s.warmup}

    def load_state_dict(self, state: dict) -> None:
        if state != self.state_dict():
            raise UserError(f"the checkpoint was made with {state}, this run asks for {self.state_dict()}")


def kept(share: float, answers: int) -> int:
    """k. The 1e-9 keeps 0.28 of 25 at 7: their product is a hair above."""
    return max(1, math.ceil(share * answers - 1e-9)) if answers else 0


class Memory:
    """The difficulty of every answer token of these samples. `samples` ascending, `answers` how many each has,
    `reference` l_ref of all tokens, sample after sample."""

    def __init__(
        self, settings: Settings, samples: Sequence[int], answers: Sequence[int], reference: np.ndarray | None = None
    ):
        self.settings = settings
        self.samples = np.asarray(samples, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(answers, dtype=np.int64)])
        self.difficulty = np.full(int(self.starts[-1]), NEVER, dtype=np.float32)  # m
        if reference is not None and reference.shape != self.difficulty.shape:
            raise UserError(f"{len(reference):,} reference losses for {len(self.difficulty):,} answer tokens")
        self.reference = reference

    def _tokens(self, sample: int) -> slice:
        at = int(np.searchsorted(self.samples, sample))
        if at == len(self.samples) or self.samples[at] != sample:
            raise KeyError(f"sample {sample} is not one of the run's")
        return slice(int(self.starts[at]), int(self.starts[at + 1]))

    def keep(self, sample: int, share: float) -> np.ndarray:
        """(n,) bool: which of a sample's answer tokens stay."""
        tokens, weight = self._tokens(sample), self.settings.weight
        m = self.difficulty[tokens]
        if not np.isfinite(m).all():
            raise NotFinite(f"what ReGATE remembers of sample {sample} is not finite")
        stays = np.ones(len(m), dtype=bool)
        if self.reference is not None:
            reference = self.reference[tokens]
            m = np.where(m < 0, reference, m)
            m = (m if self.settings.fusion == "sum" else (1 - weight) * m) + weight * reference
        elif (m < 0).any():
            return stays
        stays[np.argsort(-m, kind="stable")[kept(share, len(m)) :]] = False
        return stays

    def update(self, sample: int, stayed: np.ndarray, losses: np.ndarray) -> None:
        """The student's losses on the tokens of a sample that ran."""
        tokens, beta = self.difficulty[self._tokens(sample)], np.float32(self.settings.beta)
        m, losses = tokens[stayed], losses.astype(np.float32)
        tokens[stayed] = np.where(m < 0, losses, beta * m + (1 - beta) * losses)
