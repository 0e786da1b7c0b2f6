"""What a run has trained so far: its newest checkpoint as a model that answers, or as a plain Hugging Face folder."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import ProcessorMixin

from ..data.chat import with_system
from ..dualspeed import DualSpeed
from ..models import loading, lora, precision, stages
from ..models.export import merge, save_adapter
from ..recipe import Recipe, of_run
from ..util import UserError, files, paths, require
from . import build, checkpoint, run_folder
from .loop import Totals


def newest_checkpoint(recipe: Recipe, mine: slice = slice(None)) -> tuple[checkpoint.Saved, dict]:
    """The tensors and the state of the run's newest checkpoint. `mine`: the files that this process verifies."""
    newest = checkpoint.newest(recipe.folder / "checkpoints")
    require(newest is not None, f"{recipe.folder} has no checkpoint yet: train it first")
    saved, state = checkpoint.read(newest, mine)
    check_state(recipe, newest, state)
    return saved, state


def check_state(recipe: Recipe, path: Path, state: dict) -> None:
    """Refuses the state of a checkpoint that is damaged or belongs to another run."""
    with checkpoint.reading(path):
        totals = Totals(**state["totals"])
        size, crc = state["log"]
        counts = [totals.steps, totals.rows, totals.rows_full, size, crc]
        counts += [state["stage"], state["stage_step"], state["threads"]]
        good = all(type(n) is int and n >= 0 for n in counts)
        good = good and all(type(t) in (int, float) and t >= 0 for t in (totals.seconds, totals.full_seconds))
        checkpoint.expect(good, "its state holds something else where a number should be")
        good = state["stage"] < len(recipe.stages()) and state["stage_step"] <= totals.steps == state["step"]
        checkpoint.expect(good, "it is of a step that the run does not have")
        checkpoint.expect(type(totals.base) is dict, "its state does not say which base model it has")
        of = state["recipe"]
    same, file = of == run_folder.fingerprint(recipe), recipe.folder / "recipe.toml"
    require(same, f"checkpoint {path} is of another run, with another recipe than {file}")
    if totals.base:  # an earlier version did not save it
        require_same_base(recipe, totals.base)


def require_same_base(recipe: Recipe, was: dict[str, str]) -> None:
    """Refuses a base model that is not the one that the run began with: no checkpoint has its frozen weights."""
    now, base = build.base_files(recipe), build.base_model(recipe, torch.device("cpu"))
    # Of a hub id, more files may have been downloaded since, and change nothing.
    names = {**was, **now} if paths.expanded(base).is_dir() else was
    if differ := sorted(name for name in names if was.get(name) != now.get(name)):
        what = f"{', '.join(differ)} of {base} {'differs' if len(differ) == 1 else 'differ'}"
        raise UserError(f"the base model is not the one that the run began with: {what}; put back what was there")


def load_trained(recipe: Recipe) -> DualSpeed:
    """The model of a run as its newest checkpoint has it, isolator included."""
    build.set_threads(recipe)
    saved, state = newest_checkpoint(recipe)
    model = build.build_model(recipe, build.base_folder(recipe))
    stages.set_trainable(model.model, recipe.stages()[state["stage"]][0])
    checkpoint.fill({f"model/{n}": p for n, p in model.named_parameters() if p.requires_grad}, saved)
    return model


@contextmanager
def open_model(
    path: str, device: str = "auto", system: str | None = None
) -> Iterator[tuple[nn.Module, ProcessorMixin, str]]:
    """The model of a run, or of any folder or hub id, with its processor and a name for it, ready to answer. `system`
    is put before every question, instead of the system message that a run was trained with."""
    if paths.is_run(path):
        recipe = of_run(path)
        model, name = load_trained(recipe).model, recipe.model.precision
        processor = _processor(recipe)
        system = recipe.data.system_message if system is None else system
        called = f"{path}, {checkpoint.newest(recipe.folder / 'checkpoints').name}"
    else:
        name, processor, called = "auto", loading.load_processor(path), path
        where = precision.device_of(device)
        model = loading.load_model(path, precision.resolve(name, where), device=where)
    # A run's model has fp32 weights beside bf16 ones.
    with precision.autocast(precision.resolve(name, model.device), model.device):
        yield model.eval(), with_system(processor, system or ""), called


def _processor(recipe: Recipe) -> ProcessorMixin:
    return loading.load_processor(build.base_folder(recipe), recipe.data.min_pixels, recipe.data.max_pixels)


def export(recipe: Recipe, out: Path, *, adapter_only: bool = False) -> None:
    """Writes the newest checkpoint as a plain folder with its processor and without isolator, for transformers alone.

    What was trained is merged into the base's own weights, which were never rounded to 4 bits; or the adapters are
    written alone, for peft. No model is loaded.
    """
    if adapter_only:
        require(recipe.lora.rank > 0, "this run has no adapter (lora.rank = 0): export the whole model")
    saved, _ = newest_checkpoint(recipe)
    base = build.base_folder(recipe)
    with files.atomic(out) as temporary:
        if adapter_only:
            named = build.base_model(recipe, torch.device("cpu"))
            save_adapter(saved, lora.lora_config(**asdict(recipe.lora)), named, temporary)
        else:
            merge(saved, recipe.lora.scale, base, temporary)
        with_system(_processor(recipe), recipe.data.system_message).save_pretrained(temporary)
        _make_readable(temporary)


def _make_readable(folder: Path) -> None:
    """Gives the weights the permissions of any new file. safetensors writes them for their owner alone, whatever the
    umask, and a server that runs as another user could not open them."""
    plain = folder / ".plain"
    plain.touch()
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(plain, weights)
    plain.unlink()
