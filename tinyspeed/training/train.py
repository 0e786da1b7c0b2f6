"""A run: a recipe is built, trained in its stages, and exported as a plain Hugging Face folder.

What a run does follows from (recipe, seed, step) alone, so one that is killed and resumes from a checkpoint ends with
the same bits as one that was never killed (on a CPU, with the same number of threads). The first Ctrl-C or SIGTERM
finishes the step and saves, and so does SIGHUP.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .. import regate
from ..data.examples import Source
from ..dualspeed import DualSpeed
from ..models import isolator_file, loading
from ..models.export import only_training
from ..recipe import Recipe
from ..util import counted, files, paths, provenance
from . import answer_gate, checkpoint, metrics, run_folder
from .build import base_files, base_model, build, set_threads
from .loop import StageRun, Totals
from .stopping import stop_requested
from .trained_model import export, newest_checkpoint


@dataclass
class Result:
    model: DualSpeed
    totals: Totals
    stopped_by: int | None = None  # the signal that ended the run early


def train(recipe: Recipe, *, resume: bool = False, bar: bool = True) -> Result:
    """Runs a recipe from the start, or from its newest checkpoint."""
    set_threads(recipe)
    with run_folder.claimed(recipe, resume) as folder:
        model, source = build(recipe)
        with stop_requested() as stop:  # from here on there is something to save
            return _stages(recipe, folder, model, source, stop, bar)


def _stages(recipe: Recipe, folder: Path, model: DualSpeed, source: Source, stop: list[int], bar: bool) -> Result:
    saved, state = newest_checkpoint(recipe) if checkpoint.newest(folder / "checkpoints") else (None, None)
    begin(recipe, folder, model.device, state)
    totals = Totals(**state["totals"]) if state else Totals(base=base_files(recipe))
    torch.manual_seed(recipe.run.seed)  # only dropout draws from here on
    for number, (name, stage) in enumerate(recipe.stages()):
        if state and number < state["stage"]:
            continue
        run = StageRun(recipe, model, source, name, number, stage, totals)
        if state and number == state["stage"]:
            run.restore(saved, state)
            saved = None
        run.go(folder, stop, bar)
        if run.stopped:
            return Result(model, totals, stop[0])
    finish(recipe)
    return Result(model, totals, stop[0] if stop else None)  # a signal that came while the model was being written


def finish(recipe: Recipe) -> None:
    """Writes what a finished run leaves: the isolator's file and the exported model."""
    if not (recipe.folder / "model").is_dir():
        saved, _ = newest_checkpoint(recipe)
        discarded = [name for name in saved if only_training(name)]
        with files.atomic(recipe.folder / paths.ISOLATOR) as temporary:
            isolator_file.save({name.removeprefix("model/"): saved[name] for name in discarded}, temporary)
        export(recipe, recipe.folder / "model")


def dry_run(recipe: Recipe) -> tuple[Source, list[dict]]:
    """Takes one step of every mode of every stage on the longest example. Returns the data and what the steps took.

    Slow steps are rare and long: without a dry run, a run that does not fit may fail after an hour instead of a minute.
    """
    set_threads(recipe)
    model, source = build(of_all_answers(recipe))
    answer_gate.require_some_skipping(recipe, len(source))
    return source, list(rehearsals(of_all_answers(recipe), model, source))


def of_all_answers(recipe: Recipe) -> Recipe:
    """The recipe without ReGATE: its steps skip no answers, and so take the most memory."""
    return replace(recipe, regate=regate.Settings())


def rehearsals(recipe: Recipe, model: DualSpeed, source: Source) -> Iterator[dict]:
    for number, (name, stage) in enumerate(recipe.stages()):
        yield from rehearsed(StageRun(recipe, model, source, name, number, stage, Totals()))


def rehearsed(run: StageRun) -> Iterator[dict]:
    """Takes one step of every mode of a stage."""
    # The plans of 10,000 steps, since a short run may draw no slow step and a longer one will. The last plan of each
    # mode counts, and plans that run every layer come last.
    drawn = sorted(map(run.model.schedule.plan, range(10_000)), key=lambda plan: plan.layers is None)
    plans = {plan.mode: plan for plan in drawn}
    for plan in plans.values():
        yield {"stage": run.name, "mode": plan.mode, **run.rehearse(plan)}


def begin(recipe: Recipe, folder: Path, device: torch.device, state: dict | None, **more) -> None:
    """Prepares the run's folder: no half-written checkpoints, the log cut off at this state's step, and record.json."""
    for half in checkpoint.unfinished(folder / "checkpoints"):
        print(f"removing {half}: it was being written, or deleted, when the run ended", file=sys.stderr)
        files.delete_if_possible(half)
    checkpoint.prune(folder / "checkpoints", recipe.run.keep_checkpoints)  # the run may have ended before it did
    if state and state["threads"] != (now := torch.get_num_threads()):
        what = "its weights will be right, but not bit-identical to an uninterrupted run"
        print(f"the run used {counted(state['threads'], 'thread')} and goes on with {now}: {what}", file=sys.stderr)
    files.write_atomically(folder / metrics.LOG, run_folder.log_until(folder, state) if state else b"")
    model = base_model(recipe, device)
    known = {"seed": recipe.run.seed, "base": model, "revision": loading.hub_revision(model)}
    provenance.write(folder / "record.json", device=device, **known, **more)
