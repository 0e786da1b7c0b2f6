"""ReGATE (arXiv 2507.21420): skip the answer tokens that are already easy.

An answer token that a text-only language model predicts without the image, and that the student predicts too, teaches
little. Each answer token of each sample has a difficulty d:

    m <- beta m + (1 - beta) l                    moving average of the student's loss l on this token
    d  = m + lambda l_ref               "sum"     with the loss of a text-only LLM on the same token
    d  = (1 - lambda) m + lambda l_ref    "mix"

Of a sample's n answer tokens the k = ceil(share n) most difficult stay, and the earlier ones of equals. The row that
predicts a skipped token leaves the computation (`rows.skip_answers`).

`Memory` stores m, a float per token, in one flat array. It knows no model. `Cycle` says which steps skip: all but those
of a warm-up at the start of the run, and the first `refresh` steps of every `cycle`, which see all answers and bring
every m up to date. Slow steps see all answers too: they keep the model good at whole sequences, and their teacher and
student need the same answers. They are expensive anyway, so a refresh costs little there.

What differs from the paper: there, inactive tokens bypass every block through the residual stream and are neither
queries nor keys. Removing their rows is the same for the rows that are left, if all layers do it and positions are
`original`. We take no loss of the bypassed rows, which would be the head's on a bare embedding; whether the paper does
is not known. The paper is known from its website and from notes, and its code is not public. "sum" is the formula of
the notes. Their ablation, in which lambda = 1 is "reference only", fits "mix", so both are here. (A figure on the
website has a product sign between the losses. Neither a weight lambda nor "reference only" would fit a product, so it
is not here.) Where nothing is known, these choices are ours: the cycle counts from step 0, including the warm-up; the
first loss of a token becomes its m; until then l_ref takes its place, so that tokens with and without m compare.

The trade-off: a skipped token keeps its m, so it comes back only with a refresh. Without a reference (lambda = 0) a
sample that was never seen keeps all its answers, so a run of a single epoch skips nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .scheduler import Plan, Stateful
from .util import NotFinite, UserError, require, require_known

FUSIONS = ("sum", "mix")
NEVER = -1.0  # the m of a token without a loss so far; no loss is below 0


@dataclass(frozen=True)
class Settings:
    keep: float = 1.0  # Share of a sample's answer tokens that a step learns when it skips; 1 = ReGATE is off.
    reference: str = ""  # A text-only LLM with the same tokenizer, folder or hub id; empty = none.
    fusion: str = "sum"  # "sum": own + weight * reference loss. "mix": (1 - weight) * own + weight * reference loss.
    weight: float = 0.5  # Weight of the reference losses (lambda).
    beta: float = 0.9  # How slowly earlier losses of a token are forgotten.
    cycle: int = 128  # Steps from one refresh to the next.
    refresh: int = 16  # Steps at the start of each cycle that see all answers.
    warmup: int = 100  # First steps of the run that see all answers; in a short run take a tenth of it.

    def __post_init__(self):
        at = {name: f"regate.{name} = {value}" for name, value in vars(self).items()}
        require(0 < self.keep <= 1, f"{at['keep']}: a share must be above 0 and at most 1")
        require(self.keep < 1 or not self.reference, "regate.reference is given: set regate.keep below 1 too")
        require(0 <= self.weight <= 1000, f"{at['weight']}: must be between 0 and 1,000")
        require(self.fusion != "mix" or self.weight <= 1, f'{at["weight"]}: at most 1 with fusion = "mix"')
        require(0 <= self.beta < 1, f"{at['beta']}: must be at least 0 and below 1")
        require(self.warmup >= 0, f"{at['warmup']}: must not be negative")
        require(0 < self.refresh <= self.cycle, f"{at['refresh']}: must be between 1 and regate.cycle")
        some_skip = self.keep == 1 or self.refresh < self.cycle
        require(some_skip, f"{at['refresh']}: must be below regate.cycle, or no step would skip anything")
        require_known("regate.fusion", self.fusion, FUSIONS)
        alone = (self.fusion, self.weight) == (Settings.fusion, Settings.weight)
        what = "regate.fusion and regate.weight weigh a reference's losses: set regate.reference too"
        require(bool(self.reference) or alone, what)


class Cycle(Stateful):
    """Chooses the steps that skip answers. It is a part of `scheduler.Combined`."""

    def __init__(self, settings: Settings):
        self.keep, self.cycle = settings.keep, settings.cycle
        self.refresh, self.warmup = settings.refresh, settings.warmup

    def change(self, plan: Plan, step: int) -> Plan:
        skips = plan.mode != "slow" and step >= self.warmup and step % self.cycle >= self.refresh
        return replace(plan, answer_keep=self.keep) if skips else plan


def kept(share: float, answers: int) -> int:
    """k. Rounding makes 0.28 * 25 slightly more than 7; subtracting 1e-9 keeps k at 7."""
    return max(1, math.ceil(share * answers - 1e-9)) if answers else 0


class Memory:
    """The difficulty of every answer token of these samples. `samples` are their numbers in ascending order, `answers`
    the number of answer tokens of each, and `reference` l_ref of all tokens, sample after sample."""

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
            raise KeyError(f"sample {sample} is not part of this run")
        return slice(int(self.starts[at]), int(self.starts[at + 1]))

    def keep(self, sample: int, share: float) -> np.ndarray:
        """(n,) bool: which of a sample's answer tokens stay."""
        tokens, weight = self._tokens(sample), self.settings.weight
        m: np.ndarray = self.difficulty[tokens]
        if not np.isfinite(m).all():
            raise NotFinite(f"a difficulty that ReGATE remembers of sample {sample} is not finite")
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
        """Takes in the student's losses on the tokens of a sample that stayed."""
        tokens, beta = self.difficulty[self._tokens(sample)], np.float32(self.settings.beta)
        m, losses = tokens[stayed], losses.astype(np.float32)
        tokens[stayed] = np.where(m < 0, losses, beta * m + (1 - beta) * losses)
