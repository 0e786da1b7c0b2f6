"""The schedule that a recipe asks for in a stage: which rows a step sees (DualSpeed), which layers run (STS), and which
answers stay (ReGATE). DualSpeed prunes in both stages; STS compresses visual rows while aligning and skips
layers while tuning.
"""

from ..adaptive import AdaptiveSchedule
from ..regate import Cycle
from ..scheduler import KINDS, Combined, DualSpeedSchedule, FastSchedule, FullSchedule, PeriodicSchedule, Schedule
from ..sts import LayerSkipper
from ..util import require_known
from . import Recipe


def by_name(kind: str, *, slow: float, keep: float, distill: float, seed: int, gap: float) -> Schedule:
    """The schedule of this name."""
    require_known("schedule", kind, KINDS)
    if kind == "full":
        return FullSchedule()
    if kind == "fast":
        return FastSchedule(keep)
    if kind == "adaptive":
        return AdaptiveSchedule(slow, keep, distill, seed, gap)
    return (DualSpeedSchedule if kind == "bernoulli" else PeriodicSchedule)(slow, keep, distill, seed)


def rows_schedule(recipe: Recipe, stage: str) -> Schedule:
    """Decides the modes and rows. Aligning is all fast, unless the recipe prunes nothing; tuning follows the recipe."""
    d = recipe.dualspeed
    fast = stage == "align" and (d.schedule != "full" or recipe.sts.compress)
    _, keep = recipe.pruning(stage)
    kind = "fast" if fast else d.schedule
    return by_name(kind, slow=d.slow, keep=keep, distill=d.distill, seed=recipe.run.seed, gap=d.gap)


def skipper_of(recipe: Recipe, stage: str, depth: int) -> LayerSkipper | None:
    """Chooses among the LLM's `depth` layers, if the stage skips some."""
    s = recipe.sts
    if stage == "align" or not s.skip:
        return None
    return LayerSkipper(depth, s.skip, s.layers, s.protect_first, s.protect_last, s.every, recipe.run.seed)


def schedule_of(recipe: Recipe, stage: str, depth: int) -> Schedule:
    """Everything that decides about the steps of a stage."""
    schedule, skipper = rows_schedule(recipe, stage), skipper_of(recipe, stage, depth)
    gates = stage == "train" and recipe.regate.keep < 1
    parts = [*([skipper] if skipper else []), *([Cycle(recipe.regate)] if gates else [])]
    return Combined(schedule, *parts) if parts else schedule
