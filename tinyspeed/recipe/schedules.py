"""The schedule that a recipe asks for in a stage: which rows a step sees (DualSpeed), which layers run (STS), and which
answers stay (ReGATE). DualSpeed prunes in both stages; STS compresses rows while aligning, skips layers while tuning.
"""

from ..adaptive import AdaptiveSchedule
from ..regate import Cycle
from ..scheduler import (
    Combined,
    DualSpeedSchedule,
    FastSchedule,
    FullSchedule,
    LateWeights,
    PeriodicSchedule,
    Schedule,
)
from ..sts import LayerSkipper
from . import Recipe


def rows_schedule(recipe: Recipe, stage: str) -> Schedule:
    """Decides the modes and rows. Aligning is all fast, unless the recipe prunes nothing; tuning follows the recipe."""
    d, (_, keep) = recipe.dualspeed, recipe.pruning(stage)
    if d.schedule == "fast" or (stage == "align" and (d.schedule != "full" or recipe.sts.compress)):
        return FastSchedule(keep)
    if d.schedule == "full":
        return FullSchedule()
    how = (d.slow, keep, d.distill, recipe.run.seed)
    if d.schedule == "adaptive":
        return AdaptiveSchedule(*how, d.gap)
    return (DualSpeedSchedule if d.schedule == "bernoulli" else PeriodicSchedule)(*how)


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
    if stage == "train" and recipe.dualspeed.weights_after:
        parts.append(LateWeights(recipe.dualspeed.weights_after))
    return Combined(schedule, *parts) if parts else schedule
