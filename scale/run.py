"""A recipe on many ranks: the core's recipe, data, steps, checkpoints and export, sharded and distributed.

    torchrun --nproc-per-node 8 -m scale RECIPE.toml     begins, or goes on from the newest complete checkpoint

When a process dies, torchrun starts all again with the same arguments, so there is no option for resuming. Each stage
gets a newly sharded model, filled with what the stage before has trained: other parameters train, and FSDP must know
which before it shards. Only rank 0 writes the log and makes folders; all ranks share the checking of the records.
"""

import gc
import io
import sys
from contextlib import ExitStack, nullcontext, redirect_stderr
from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers.utils import logging

from tinyspeed import DualSpeed, UserError
from tinyspeed.data import conversations, digits, digits_model
from tinyspeed.data.examples import Source
from tinyspeed.models import loading, precision, stages
from tinyspeed.recipe import Recipe
from tinyspeed.training import answer_gate, build, checkpoint, report, run_folder, stopping, trained_model
from tinyspeed.training import train as core
from tinyspeed.training.loop import Totals
from tinyspeed.util import counted, files, paths, provenance

from .loop import ShardedStage
from .ranks import Ranks
from .shard import shard

PLACES = {**run_folder.PLACES, "run": ("folder", "cache")}  # what may differ between nodes: where things are on each


def require_supported(recipe: Recipe, ranks: Ranks) -> None:
    """Refuses a recipe that cannot be distributed over these ranks."""
    for name, stage in recipe.stages():
        if stage.optimizer != "adamw":
            raise UserError(f'{name}.optimizer = "{stage.optimizer}": 8-bit moments cannot be sharded; set "adamw"')
        if stage.batch < ranks.size:
            raise UserError(f"{name}.batch = {stage.batch} is less than {ranks.size} ranks: some would only wait")
    if recipe.data.feature_cache_gb:
        raise UserError("data.feature_cache_gb: several ranks cannot share the feature cache; set it to 0")
    if recipe.scale.offload and (ranks.device.type != "cuda" or recipe.model.quantise != "none"):
        raise UserError("scale.offload is for weights that are not in 4 bits, on a GPU")


def train(recipe: Recipe, ranks: Ranks) -> int | None:
    """Runs a recipe to its end. Returns the signal that stopped it early, if one did."""
    mesh = prepare(recipe, ranks)
    with ExitStack() as stack:
        if ranks.is_main:
            stack.enter_context(run_folder.claimed(recipe, resume=recipe.folder.is_dir()))
        source = read_source(recipe, ranks)
        stop = stack.enter_context(stopping.stop_requested(quiet=not ranks.is_main))
        totals, stopped = _stages(recipe, ranks, mesh, source, stop)
        if ranks.is_main and totals.steps:
            report.draw_run(recipe.folder)
        return stopped


def dry_run(recipe: Recipe, ranks: Ranks) -> list[dict]:
    """Takes one step of every mode of every stage on the longest example, the same one on every rank."""
    mesh, largest = prepare(recipe, ranks), core.of_all_answers(recipe)
    source, found = read_source(largest, ranks), []
    answer_gate.require_some_skipping(recipe, len(source))
    for number, (name, stage) in enumerate(largest.stages()):
        model = sharded_model(largest, name, ranks, mesh, None)
        found += core.rehearsed(ShardedStage(ranks, mesh, largest, model, source, name, number, stage, Totals()))
        del model
        gc.collect()
    return found


def prepare(recipe: Recipe, ranks: Ranks) -> DeviceMesh:
    ranks.timeout = recipe.scale.timeout
    if recipe.run.device == "cpu":
        ranks.device = torch.device("cpu")
    build.place(recipe)  # refuses a device or a precision that is not there
    build.set_threads(recipe)
    if not ranks.is_main:
        logging.disable_progress_bar()
    require_supported(recipe, ranks)
    require_same_recipe(recipe, ranks)
    return ranks.device_mesh(recipe.scale.shard)


def require_same_recipe(recipe: Recipe, ranks: Ranks) -> None:
    """Refuses ranks that were started with different recipes; only places of files may differ between nodes."""
    (_, first), *others = ranks.gather([(ranks.name, recipe)])
    for name, other in others:
        if differ := run_folder.differences(first, other, free=PLACES):
            raise UserError(f"{name} was started with another recipe than rank 0: {', '.join(differ)}")


def require_same_files(ranks: Ranks, mine: dict) -> None:
    """Refuses ranks whose own files differ, wherever each of them has its copy."""
    (_, first), *others = ranks.gather([(ranks.name, mine)])
    for rank, other in others:
        if differ := sorted(name for name in {**first, **other} if first.get(name) != other.get(name)):
            what = f"{rank} and rank 0 do not have the same {', '.join(differ)}"
            raise UserError(f"{what}: the same data, base model and program must be on all machines")


def read_source(recipe: Recipe, ranks: Ranks) -> Source:
    """The training examples. Each rank checks its share of the records, and all learn what the others found."""
    ranks.progress("looking for model and data", patient=True)
    if ranks.is_main:
        run_folder.require_sources(recipe)
        build.base_model(recipe, ranks.device)  # makes it, if it has to be made and is not there yet
        build.base_files(recipe)  # ranks with the same `run.cache` then find the hashes of large files
    ranks.barrier()
    base = build.base_model(recipe, ranks.device)
    mine = provenance.program() | build.base_files(recipe)
    if recipe.dualspeed.isolator_from:
        mine["dualspeed.isolator_from"] = files.hashed(paths.require_isolator(recipe.dualspeed.isolator_from))
    require_same_files(ranks, mine)
    if recipe.data.kind == "digits":
        source = digits.from_recipe(recipe)
        digits_model.require_fitting(loading.load_config(base), base, source.canvas)
    else:
        ranks.progress("checking the records", patient=True)
        how = {"bar": ranks.is_main, "mine": slice(ranks.rank, None, ranks.size), "gather": ranks.gather}
        how["agree"] = partial(require_same_files, ranks)
        with nullcontext() if ranks.is_main else redirect_stderr(io.StringIO()):  # one rank's notices are enough
            source = conversations.from_recipe(recipe, base, **how)
        if ranks.is_main:
            build.list_skipped(recipe, source)
    answer_gate.require_some_skipping(recipe, len(source))
    if recipe.regate.reference:
        ranks.progress("computing the reference's losses", patient=True)
        # The other ranks read them: from a `run.cache` that all share, or else from their machine's own.
        for computes in (ranks.is_main, ranks.local_rank == 0):
            if computes:
                answer_gate.Gate(recipe, source, ranks.device, base)
            ranks.barrier()
    return source


def _stages(recipe: Recipe, ranks: Ranks, mesh: DeviceMesh, source: Source, stop: list) -> tuple[Totals, int | None]:
    folder = recipe.folder
    mine, there = slice(ranks.rank, None, ranks.size), checkpoint.newest(folder / "checkpoints")
    state = trained_model.newest_checkpoint(recipe, mine)[1] if there else None
    ranks.require_same("the checkpoint to go on from", state and state["step"])
    if ranks.is_main:
        core.begin(recipe, folder, ranks.device, state, ranks=ranks.size)
        if state:
            print(f"going on after step {state['step']} of {folder}", file=sys.stderr)
    torch.manual_seed(recipe.run.seed + ranks.rank)  # for dropout, which must differ between ranks
    totals = Totals(**state["totals"]) if state else Totals(base=build.base_files(recipe))
    for number in range(state["stage"] if state else 0, len(recipe.stages())):
        (name, stage), checkpoints = recipe.stages()[number], folder / "checkpoints"
        # By its name: another node may not see yet which checkpoint is the newest.
        saved = checkpoint.read(checkpoint.folder_of(checkpoints, totals.steps), slice(0))[0] if totals.steps else None
        with torch.random.fork_rng([ranks.device] if ranks.device.type == "cuda" else []):
            model = sharded_model(recipe, name, ranks, mesh, saved)
        run = ShardedStage(ranks, mesh, recipe, model, source, name, number, stage, totals)
        if state and number == state["stage"]:
            run.restore(saved, state)
        del saved  # its files are mapped, and could not be deleted
        run.go(folder, stop, bar=ranks.is_main)
        run.settle()
        if run.stopped:
            return totals, stop[0]
        del run, model
        gc.collect()  # FSDP's modules refer to each other in circles, and the next stage needs the memory
    ranks.progress("exporting", patient=True)
    if ranks.is_main:
        core.finish(recipe)
        print(f"{counted(totals.steps, 'step')}, {totals.seconds:.0f} s; model in {folder / 'model'}")
    ranks.barrier()
    return totals, stop[0] if stop else None


def sharded_model(
    recipe: Recipe, stage: str, ranks: Ranks, mesh: DeviceMesh, before: checkpoint.Saved | None
) -> DualSpeed:
    """The sharded model of a stage, with the weights that the stage before has trained."""
    ranks.progress("loading the model", patient=True)
    device, name = ranks.device, precision.resolve(recipe.model.precision, ranks.device)
    path, quantise = build.base_model(recipe, device), recipe.model.quantise
    if quantise != "none":
        plain = loading.load_model(path, name, quantise=quantise, storage=torch.bfloat16, device=device)
    elif ranks.is_main:
        plain = loading.load_model(path, name)
    else:
        plain = loading.empty_model(path, name)
    model = build.wrap(recipe, plain)
    stages.set_trainable(model.model, stage)
    if before is not None:
        here = {f"model/{n}": p for n, p in model.named_parameters() if not p.is_meta}
        checkpoint.fill({n: p for n, p in here.items() if n in before}, before)
        del here  # or sharding could not free them
    ranks.require_same("the model", [(n, p.shape, p.dtype) for n, p in model.named_parameters()])
    full = stage == "train" and not recipe.lora.rank and mesh.get_group("shard").size() > 1
    cast = precision.DTYPES[name] if full and name != "fp32" else None
    ranks.progress("sharding the model", patient=True)
    shard(model, mesh, device, cast=cast, reshard=recipe.scale.reshard, offload=recipe.scale.offload)
    return model.train()
