"""A run: recipe -> model -> data -> two stages -> a plain Hugging Face folder.

What a run does follows from (recipe, seed, step) alone, so one that is killed and resumes from a checkpoint ends with
the same bits as one that was never killed (on a CPU, with the same number of threads). The first Ctrl-C or SIGTERM
finishes the step and saves.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import ProcessorMixin

from .. import regate
from ..data import conversations, digits, feature_cache
from ..data.examples import Source
from ..dualspeed import DualSpeed
from ..models import assembling, isolator_file, loading, precision, trainable
from ..models.export import merge, only_training, save_adapter
from ..models.precision import device_of
from ..recipe import Recipe, of_run
from ..recipe.schedules import schedule_of
from ..util import files, paths, provenance
from ..util.errors import UserError, counted
from . import answer_gate, checkpoint, run_folder
from .loop import StageRun, Totals
from .stopping import stop_requested


@dataclass
class Result:
    model: DualSpeed
    totals: Totals
    stopped_by: int | None = None  # the signal that ended the run early

    @property
    def speedup(self) -> float | None:
        return self.totals.speedup


def train(recipe: Recipe, *, resume: bool = False, bar: bool = True) -> Result:
    """Run a recipe from the start, or from its newest checkpoint."""
    set_threads(recipe)
    with run_folder.claimed(recipe, resume) as folder:
        model, source = build(recipe)
        with stop_requested() as stop:  # not before: while the base model is built there is nothing to save
            return _stages(recipe, folder, model, source, stop, bar)


def _stages(recipe: Recipe, folder: Path, model: DualSpeed, source: Source, stop: list[int], bar: bool) -> Result:
    saved, state = _newest(recipe) if checkpoint.newest(folder / "checkpoints") else (None, None)
    begin(recipe, folder, model.device, state)
    totals = Totals(**state["totals"]) if state else Totals()
    torch.manual_seed(recipe.run.seed)  # after building: dropout is the only thing that draws from here on
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
    return Result(model, totals)


def finish(recipe: Recipe) -> None:
    """What a run leaves when all its steps are done."""
    if not (recipe.folder / "model").is_dir():
        saved, _ = _newest(recipe)
        discarded = [name for name in saved if only_training(name)]
        with files.atomic(recipe.folder / paths.ISOLATOR) as temporary:
            isolator_file.save({name.removeprefix("model/"): saved[name] for name in discarded}, temporary)
        export(recipe, recipe.folder / "model")


def dry_run(recipe: Recipe) -> tuple[Source, list[dict]]:
    """The data, and one step of every mode of every stage on its longest example: what it takes, before training.

    Slow steps are rare and long: without this, a run that cannot fit ends after an hour instead of a minute.
    """
    set_threads(recipe)
    model, source = build(of_all_answers(recipe))
    answer_gate.require_some_skipping(recipe, len(source))
    return source, list(rehearsals(of_all_answers(recipe), model, source))


def of_all_answers(recipe: Recipe) -> Recipe:
    """Its largest steps: no answer is skipped, and no reference is asked which."""
    return replace(recipe, regate=regate.Settings())


def rehearsals(recipe: Recipe, model: DualSpeed, source: Source) -> Iterator[dict]:
    for number, (name, stage) in enumerate(recipe.stages()):
        yield from rehearsed(StageRun(recipe, model, source, name, number, stage, Totals()))


def rehearsed(run: StageRun) -> Iterator[dict]:
    """One step of every mode of a stage."""
    # Beyond the run's own steps: a short one may draw no slow step, and the next, longer one will. Of a mode's steps
    # one that runs every layer, if there is any.
    drawn = sorted(map(run.model.schedule.plan, range(10_000)), key=lambda plan: plan.layers is None)
    plans = {plan.mode: plan for plan in drawn}
    for plan in plans.values():
        yield {"stage": run.name, "mode": plan.mode, **run.rehearse(plan)}


def set_threads(recipe: Recipe) -> None:
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)


def begin(recipe: Recipe, folder: Path, device: torch.device, state: dict | None, **more) -> None:
    """The run's log, cut off where the newest checkpoint, whose state this is, was written."""
    for half in checkpoint.unfinished(folder / "checkpoints"):
        print(f"removing {half}: it was being written, or deleted, when the run ended", file=sys.stderr)
        files.remove(half)
    checkpoint.prune(folder / "checkpoints", recipe.run.keep_checkpoints)  # it may have ended between new and old
    if state and state["threads"] != torch.get_num_threads():
        print(
            f"the run used {counted(state['threads'], 'thread')} and goes on with {torch.get_num_threads()}: "
            f"its weights will be right, but not bit-identical to an uninterrupted run",
            file=sys.stderr,
        )
    with files.atomic(folder / run_folder.LOG) as temporary:
        temporary.write_bytes(run_folder.log_until(folder, state) if state else b"")
    model = base(recipe)
    known = {"seed": recipe.run.seed, "base": model, "revision": loading.hub_revision(model)}
    provenance.write(folder / "record.json", device=device, **known, **more)


def build(recipe: Recipe) -> tuple[DualSpeed, Source]:
    """The wrapped model and the training examples of a recipe."""
    source = None
    run_folder.require_sources(recipe)
    place(recipe)
    if recipe.data.kind == "chat":  # first: its mistakes show before a large model is loaded
        source = _conversations(recipe)
    if recipe.regate.keep < 1:
        answer_gate.require_some_skipping(recipe, len(source or digits.from_recipe(recipe)))
    if recipe.regate.reference:  # also first: two models need not fit side by side
        answer_gate.Gate(recipe, source or digits.from_recipe(recipe), place(recipe)[0], base(recipe))
    model = build_model(recipe)
    if source is not None and recipe.data.feature_cache_gb and len(source.visual):
        _keep_features(recipe, model, source)
    if source is None:
        digits.check_model(model.model, base(recipe), digits.canvas_of(recipe))
        source = digits.from_recipe(recipe)
    return model, source


def _conversations(recipe: Recipe) -> conversations.Conversations:
    source = conversations.from_recipe(recipe, base(recipe))
    list_skipped(recipe, source)
    return source


def list_skipped(recipe: Recipe, source: conversations.Conversations) -> None:
    if source.bad:
        file = recipe.folder / "skipped.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(file, "\n".join(source.bad) + "\n")
        count = f"{len(source.bad):,} of {counted(len(source.records), 'record')}"
        print(f"{count} left out, listed in {file}; the first: {source.bad[0]}", file=sys.stderr)


def _keep_features(recipe: Recipe, model: DualSpeed, source: conversations.Conversations) -> None:
    name = precision.resolve(recipe.model.precision, model.device)
    folder, most = paths.expanded(recipe.run.cache) / "features", recipe.data.feature_cache_gb * feature_cache.GB
    prepare = source.processor.image_processor
    source.features = feature_cache.Features(folder, model.vlm, prepare, name)
    feature_cache.fill(source.features, source.pictures(), model.vlm, prepare, name, most, bar=True)


def build_model(recipe: Recipe) -> DualSpeed:
    """The base model with adapters and isolator."""
    device, name = place(recipe)
    plain = loading.load_model(base(recipe), name, quantise=recipe.model.quantise, device=device)
    return wrap(recipe, plain)


def wrap(recipe: Recipe, plain: nn.Module) -> DualSpeed:
    """A loaded model with what training adds to it."""
    if recipe.lora.rank:
        lora = asdict(recipe.lora)
        plain = lora.add_lora(plain, **lora, seed=recipe.run.seed, views=recipe.dualspeed.views)
    settings = recipe.dualspeed
    model = DualSpeed(
        plain,
        plugin=settings.plugin,
        keep=max(settings.keep, recipe.sts.compress),  # the larger stage's: a learned plugin serves both
        isolator=settings.isolator,
        views=settings.views,
        temperature=settings.temperature,
        positions=settings.positions,
        layout=settings.layout,
        schedule=schedule_of(recipe, "train", plain.config.text_config.num_hidden_layers),
        seed=recipe.run.seed,
    )
    if settings.isolator_from:
        isolator_file.load_into(model.only_training, paths.isolator(settings.isolator_from))
    return model


def base(recipe: Recipe) -> str:
    """Where the untrained model is; one from parts, and the embedded default's, are made on first use."""
    if recipe.model.path:
        return recipe.model.path
    if recipe.model.llm:
        return str(assembling.assemble(recipe.model.tower, recipe.model.llm, recipe.folder / "base", recipe.run.seed))
    sizes = recipe.digits
    how = {"tower_steps": sizes.tower_steps, "device": place(recipe)[0], **sizes.sizes}
    return str(digits.prepare(recipe.folder / "base", recipe.run.seed, **how))


def place(recipe: Recipe) -> tuple[torch.device, str]:
    """Where the model runs, and in which precision."""
    device = device_of(recipe.run.device)
    return device, precision.resolve(recipe.model.precision, device)


def load_trained(recipe: Recipe) -> DualSpeed:
    """The model of a run as its newest checkpoint has it, isolator included."""
    set_threads(recipe)
    saved, state = _newest(recipe)
    model = build_model(recipe)
    trainable.set_trainable(model.model, recipe.stages()[state["stage"]][0])
    checkpoint.fill({f"model/{n}": p for n, p in model.named_parameters() if p.requires_grad}, saved)
    return model


def _newest(recipe: Recipe) -> tuple[checkpoint.Saved, dict]:
    newest = checkpoint.newest(recipe.folder / "checkpoints")
    if newest is None:
        raise UserError(f"{recipe.folder} has no checkpoint yet")
    saved, state = checkpoint.read(newest)
    check_state(recipe, newest, state)
    return saved, state


def check_state(recipe: Recipe, path: Path, state: dict) -> None:
    """That a checkpoint is of this run, and says where in it."""
    with checkpoint.reading(path):
        totals = Totals(**state["totals"])
        size, crc = state["log"]
        whole = [totals.steps, totals.rows, totals.rows_full, size, crc]
        whole += [state["stage"], state["stage_step"], state["threads"]]
        times = [totals.seconds, totals.full_seconds]
        if not all(type(n) is int and n >= 0 for n in whole) or not all(
            type(t) in (int, float) and t >= 0 for t in times
        ):
            raise ValueError("its numbers are none")
        if state["stage"] >= len(recipe.stages()) or not state["stage_step"] <= totals.steps == state["step"]:
            raise ValueError("it is of a step that the run has not")
        of = state["recipe"]
    if of != run_folder.fingerprint(recipe):
        raise UserError(
            f"checkpoint {path} is of another run, with another recipe than {recipe.folder / 'recipe.toml'}"
        )


@contextmanager
def open_model(path: str, device: str = "auto") -> Iterator[tuple[nn.Module, ProcessorMixin, str]]:
    """The model of a run, or of any folder or hub id, with its processor and a name for it, ready to answer."""
    if paths.is_run(path):
        recipe = of_run(path)
        made = load_trained(recipe)
        model, name, processor = made.model, recipe.model.precision, loading.load_processor(base(recipe))
        called = f"{path}, {checkpoint.newest(recipe.folder / 'checkpoints').name}"
    else:
        name, processor, called = "auto", loading.load_processor(path), path
        model = loading.load_model(path, precision.resolve(name, device_of(device)), device=device_of(device))
    with precision.autocast(precision.resolve(name, model.device), model.device):  # a run has fp32 beside bf16
        yield model.eval(), processor, called


def export(recipe: Recipe, out: Path, *, adapter_only: bool = False) -> None:
    """The newest checkpoint as a plain folder, without isolator, with its processor: transformers alone can load it.

    What was trained is put into the base's own weights, which were never rounded to 4 bits, or adapters are saved alone
    for peft. No model is loaded.
    """
    lora = recipe.lora
    if adapter_only and not lora.rank:
        raise UserError("this run has no adapter (lora.rank = 0): export the whole model")
    saved, _ = _newest(recipe)
    with files.atomic(out) as temporary:
        if adapter_only:
            save_adapter(saved, lora.lora_config(**asdict(lora)), base(recipe), temporary)
        else:
            merge(saved, lora.scale, base(recipe), temporary)
        loading.load_processor(base(recipe)).save_pretrained(temporary)
        _share(temporary)


def _share(folder: Path) -> None:
    """Make the weights as readable as any new file here. safetensors writes them for their owner alone, whatever the
    umask, and a server that runs as another user could not open them."""
    plain = folder / ".plain"
    plain.touch()
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(plain, weights)
    plain.unlink()
