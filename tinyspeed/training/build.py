"""Everything that a run is made of, built in one order.

    sources     model, data, reference and isolator are where the recipe says
    place       the device and the precision
    base        the untrained model: a folder or a hub id; the digits' own, or one from parts, is made on first use
    examples    read and checked before a large model is loaded, so that a mistake shows within seconds
    reference   ReGATE's reference losses, computed now so that two models need not fit side by side
    model       the base with adapters and isolator
    features    the frozen tower's features on disk, if the recipe asks for them

Each step gets what the steps before it made, and no step asks for it a second time.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..data import conversations, digits, digits_model, feature_cache
from ..data.examples import Source
from ..dualspeed import DualSpeed
from ..models import assembling, isolator_file, loading, lora, precision
from ..recipe import Recipe
from ..recipe.schedules import schedule_of
from ..util import counted, files, paths
from . import answer_gate, run_folder


class Place(NamedTuple):
    device: torch.device
    precision: str


def build(recipe: Recipe) -> tuple[DualSpeed, Source]:
    """The wrapped model and the training examples of a recipe."""
    run_folder.require_sources(recipe)
    where = place(recipe)
    if recipe.data.kind == "digits":
        source = digits.from_recipe(recipe)
        answer_gate.require_some_skipping(recipe, len(source))
        base = base_model(recipe, where.device)
        digits_model.require_fitting(loading.load_config(base), base, source.canvas)
    else:
        base = base_model(recipe, where.device)
        source = conversations.from_recipe(recipe, base)
        list_skipped(recipe, source)
        answer_gate.require_some_skipping(recipe, len(source))
    if recipe.regate.reference:
        answer_gate.Gate(recipe, source, where.device, base)
    model = build_model(recipe, base)
    if recipe.data.feature_cache_gb and recipe.data.kind == "chat" and len(source.visual):
        folder, most = paths.expanded(recipe.run.cache) / "features", recipe.data.feature_cache_gb * feature_cache.GB
        pictures = source.processor.image_processor
        source.features = feature_cache.FeatureCache(folder, model.vlm, pictures, where.precision)
        source.features.fill(source.pictures(), model.vlm, most, bar=True)
    return model, source


def place(recipe: Recipe) -> Place:
    """Where the model runs, and in which precision. Refuses what this machine does not have."""
    device = precision.device_of(recipe.run.device)
    return Place(device, precision.resolve(recipe.model.precision, device))


def set_threads(recipe: Recipe) -> None:
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)


def base_model(recipe: Recipe, device: torch.device) -> str:
    """The folder or hub id of the untrained model. The digits' own, or one from parts, is made on first use."""
    if recipe.model.path:
        return recipe.model.path
    folder = recipe.folder / "base"
    if recipe.model.llm:
        return str(assembling.assemble(recipe.model.tower, recipe.model.llm, folder, recipe.run.seed))
    how = {"tower_steps": recipe.digits.tower_steps, "device": device, **recipe.digits.sizes}
    return str(digits_model.prepare(folder, recipe.run.seed, **how))


def base_folder(recipe: Recipe) -> str:
    """The same model's folder here, which is the hub's cache for a hub id."""
    return str(loading.local_folder(base_model(recipe, torch.device("cpu"))))


def base_files(recipe: Recipe) -> dict[str, str]:
    """The files of the base model that training depends on, with their hashes."""
    return loading.identity(Path(base_folder(recipe)), paths.expanded(recipe.run.cache))


def list_skipped(recipe: Recipe, source: conversations.Conversations) -> None:
    """Writes the records that --skip-bad left out to skipped.txt in the run's folder, and says how many there are."""
    if source.bad:
        file = recipe.folder / "skipped.txt"
        files.write_atomically(file, "\n".join(source.bad) + "\n")
        count = f"{len(source.bad):,} of {counted(len(source.records), 'record')}"
        print(f"{count} left out, listed in {file}; the first: {source.bad[0]}", file=sys.stderr)


def build_model(recipe: Recipe, base: str | None = None) -> DualSpeed:
    """The model alone, before it has learned anything."""
    device, name = place(recipe)
    base = base or base_model(recipe, device)
    return wrap(recipe, loading.load_model(base, name, quantise=recipe.model.quantise, device=device))


def wrap(recipe: Recipe, plain: nn.Module) -> DualSpeed:
    """A loaded model with adapters, isolator and the schedule of its steps."""
    if recipe.lora.rank:
        plain = lora.add_lora(plain, **asdict(recipe.lora), seed=recipe.run.seed, views=recipe.dualspeed.views)
    settings, schedule = recipe.dualspeed, schedule_of(recipe, "train", plain.config.text_config.num_hidden_layers)
    names = ("isolator", "views", "temperature", "positions", "weights", "power", "layout")
    how = {name: getattr(settings, name) for name in names}
    keep = max(settings.keep, recipe.sts.compress)  # the larger stage's: a learned plugin serves both
    model = DualSpeed(plain, plugin=settings.plugin, keep=keep, schedule=schedule, seed=recipe.run.seed, **how)
    if settings.isolator_from:
        isolator_file.load_into(model.only_training, paths.require_isolator(settings.isolator_from))
    return model
