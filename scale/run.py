"""A recipe on many ranks: the core's recipe, data, steps, checkpoints and export; sharded, and shared out.

    torchrun --nproc-per-node 8 -m scale RECIPE.toml     begins, or goes on from the newest complete checkpoint

torchrun starts everything again with the same arguments when a process dies, so going on is not asked for. Each stage
gets a freshly sharded model, into which the trained weights of the stage before are put: what trains differs, and FSDP
wants to know before. Only rank 0 writes the log and makes folders; checking the records is shared by all ranks.
"""

import dataclasses
import gc
import io
import sys
from contextlib import ExitStack, nullcontext, redirect_stderr

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers.utils import logging

from tinyspeed import DualSpeed, UserError
from tinyspeed.data import conversations, digits
from tinyspeed.data.examples import Source
from tinyspeed.models import loading, precision, trainable
from tinyspeed.recipe import Recipe
from tinyspeed.training import answer_gate, build, checkpoint, report, run_folder, stopping, trained
from tinyspeed.training import train as core
from tinyspeed.training.loop import Totals
from tinyspeed.util.errors import counted

from .shard import shard
from .stage import ShardedStage
from .world import World

# What may differ between nodes: where things are, on each.
PLACES = {f"{section}.{key}" for section, keys in run_folder.PLACES.items() for key in keys}
PLACES = PLACES - {"run.name", "run.device"} | {"run.cache"}


def supported(made: Recipe, world: World) -> None:
    """That this recipe can be spread over these ranks."""
    for name, stage in made.stages():
        if stage.optimizer != "adamw":
            raise UserError(f'{name}.optimizer = "{stage.optimizer}": 8-bit moments cannot be sharded; set "adamw"')
        if stage.batch < world.size:
            raise UserError(f"{name}.batch = {stage.batch} is less than {world.size} ranks: some would only wait")
    if made.data.feature_cache_gb:
        raise UserError("data.feature_cache_gb: several ranks cannot share the feature cache; set it to 0")
    if made.scale.offload and (world.device.type != "cuda" or made.model.quantise != "none"):
        raise UserError("scale.offload is for weights that are not in 4 bits, on a GPU")


def train(made: Recipe, world: World) -> int | None:
    """Run a recipe to its end; the signal that ended it early, if one did."""
    mesh = _prepare(made, world)
    with ExitStack() as stack:
        if world.leads:
            stack.enter_context(run_folder.claimed(made, resume=made.folder.is_dir()))
        source = _source(made, world)
        stop = stack.enter_context(stopping.stop_requested(quiet=not world.leads))
        totals, stopped = _stages(made, world, mesh, source, stop)
        if world.leads and totals.steps:
            report.draw_run(made.folder)
        return stopped


def dry_run(made: Recipe, world: World) -> list[dict]:
    """One step of every mode of every stage on the longest example, the same on every rank: what it takes."""
    mesh, every = _prepare(made, world), core.of_all_answers(made)
    source, found = _source(every, world), []
    answer_gate.require_some_skipping(made, len(source))
    for number, (name, stage) in enumerate(every.stages()):
        model = sharded_model(every, name, world, mesh, None)
        found += core.rehearsed(ShardedStage(world, mesh, every, model, source, name, number, stage, Totals()))
        del model
        gc.collect()
    return found


def _prepare(made: Recipe, world: World) -> DeviceMesh:
    if made.run.device == "cpu":
        world.device = torch.device("cpu")
    build.place(made)  # refuses a device or a precision that is not there
    build.set_threads(made)
    if not world.leads:
        logging.disable_progress_bar()
    supported(made, world)
    same_recipe(made, world)
    return world.mesh(made.scale.shard)


def same_recipe(made: Recipe, world: World) -> None:
    """That all ranks were started with it; only where things are may differ from node to node."""
    tables = dataclasses.asdict(made).items()
    mine = {f"{section}.{key}": value for section, table in tables for key, value in table.items()}
    first, *others = world.gather([{key: value for key, value in mine.items() if key not in PLACES}])
    for rank, other in enumerate(others, 1):
        if differ := [key for key in first if first[key] != other[key]]:
            raise UserError(f"rank {rank} was started with another recipe than rank 0: {', '.join(differ)}")


def _source(made: Recipe, world: World) -> Source:
    """The training examples. Each rank checks its share of the records, and all learn what all found."""
    world.at("looking for model and data", patient=True)
    if world.leads:
        run_folder.require_sources(made)
        build.base_model(made, world.device)  # puts it together, if it is not there yet
    world.wait()
    source = digits.from_recipe(made) if made.data.kind == "digits" else _conversations(made, world)
    answer_gate.require_some_skipping(made, len(source))
    if made.regate.reference:
        world.at("computing the reference's losses", patient=True)
        # The others read them: from one `run.cache` for all, or else from their machine's own.
        for computes in (world.leads, world.first_here):
            if computes:
                answer_gate.Gate(made, source, world.device, build.base_model(made, world.device))
            world.wait()
    return source


def _conversations(made: Recipe, world: World) -> conversations.Conversations:
    world.at("checking the records", patient=True)
    mine = slice(world.rank, None, world.size)
    with nullcontext() if world.leads else redirect_stderr(io.StringIO()):  # one rank's notices are enough
        source = conversations.from_recipe(
            made, build.base_model(made, world.device), bar=world.leads, mine=mine, gather=world.gather
        )
    if world.leads:
        build.list_skipped(made, source)
    world.agree("the data", source.fingerprint)
    return source


def _stages(made: Recipe, world: World, mesh: DeviceMesh, source: Source, stop: list[int]) -> tuple[Totals, int | None]:
    folder = made.folder
    newest = checkpoint.newest(folder / "checkpoints")
    state = checkpoint.read(newest, slice(world.rank, None, world.size))[1] if newest else None
    if state:
        trained.check_state(made, newest, state)
    world.agree("the checkpoint to go on from", state and state["step"])
    if world.leads:
        core.begin(made, folder, world.device, state, ranks=world.size)
        if state:
            print(f"going on behind step {state['step']} of {folder}", file=sys.stderr)
    torch.manual_seed(made.run.seed + world.rank)  # dropout; the same on two ranks would drop the same twice
    world.timeout = made.scale.timeout
    totals = Totals(**state["totals"]) if state else Totals()
    for number in range(state["stage"] if state else 0, len(made.stages())):
        if _stopped(made, world, mesh, source, stop, number, totals, state):
            return totals, stop[0]
        gc.collect()  # FSDP's modules know each other in circles, and the next stage needs the memory
    world.at("exporting", patient=True)
    if world.leads:
        core.finish(made)
        print(f"{counted(totals.steps, 'step')}, {totals.seconds:.0f} s; model in {folder / 'model'}")
    world.wait()
    return totals, None


def _stopped(
    made: Recipe, world: World, mesh: DeviceMesh, source: Source, stop: list[int], number: int, totals: Totals, state
) -> bool:
    """Run one stage, on what has been trained so far; whether it was stopped."""
    (name, stage), checkpoints = made.stages()[number], made.folder / "checkpoints"
    # By name: what is newest may look different from another node.
    saved = checkpoint.read(checkpoint.folder_of(checkpoints, totals.steps), slice(0))[0] if totals.steps else None
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        model = sharded_model(made, name, world, mesh, saved)
    run = ShardedStage(world, mesh, made, model, source, name, number, stage, totals)
    if state and number == state["stage"]:
        run.restore(saved, state)
    del saved  # its files are mapped, and could not be deleted
    run.go(made.folder, stop, bar=world.leads)
    run.settle()
    return run.stopped


def sharded_model(
    made: Recipe, stage: str, world: World, mesh: DeviceMesh, before: checkpoint.Saved | None
) -> DualSpeed:
    """The sharded model of a stage, with what the stage before has trained."""
    world.at("loading the model", patient=True)
    device, name = world.device, precision.resolve(made.model.precision, world.device)
    path, quantise = build.base_model(made, world.device), made.model.quantise
    if quantise != "none":
        plain = loading.load_model(path, name, quantise=quantise, storage=torch.bfloat16, device=device)
    elif world.leads:
        plain = loading.load_model(path, name)
    else:
        plain = loading.skeleton(path, name)
    model = build.wrap(made, plain)
    trainable.set_trainable(model.model, stage)
    if before is not None:
        here = {f"model/{n}": p for n, p in model.named_parameters() if not p.is_meta}
        checkpoint.fill({n: p for n, p in here.items() if n in before}, before)
        del here  # or sharding could not free them
    world.agree("the model", [(n, p.shape, p.dtype) for n, p in model.named_parameters()])
    full = stage == "train" and not made.lora.rank and mesh.get_group("shard").size() > 1
    cast = precision.DTYPES[name] if full and name != "fp32" else None
    world.at("sharding the model", patient=True)
    shard(model, mesh, device, cast=cast, reshard=made.scale.reshard, offload=made.scale.offload)
    return model.train()
