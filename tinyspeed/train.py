"""A run: recipe -> model -> data -> two stages -> a plain Hugging Face folder.

What a run does follows from (recipe, seed, step) alone, so one that is killed and resumes from a checkpoint ends with
the same bits as one that was never killed (on a CPU, with the same number of threads). The first Ctrl-C or SIGTERM
finishes the step and saves. Nothing of another run, or of anything else, is ever overwritten.
"""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, digits, record, vlm
from .data import Source
from .dualspeed import DualSpeed
from .errors import UserError
from .recipe import Recipe, read
from .stage import StageRun, Totals, load_parameters, schedule_of


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
    folder = _folder(recipe, resume)
    with checkpoint.only_one(folder):
        checkpoint.write_atomically(folder / "recipe.toml", recipe.to_toml())
        model, source = build(recipe)
        with _stop_requested() as stop:  # not before: while the base model is built there is nothing to save
            return _stages(recipe, folder, model, source, stop, bar)


def _stages(recipe: Recipe, folder: Path, model: DualSpeed, source: Source, stop: list[int], bar: bool) -> Result:
    state, tensors = _begin(recipe, folder, model.device)
    totals = Totals(**state["totals"]) if state else Totals()
    torch.manual_seed(recipe.run.seed)  # after building: dropout is the only thing that draws from here on
    for number, (name, stage) in enumerate(recipe.stages()):
        if state and number < state["stage"]:
            continue
        run = StageRun(recipe, model, source, name, number, stage, totals)
        if state and number == state["stage"]:
            run.restore(tensors, state)
            tensors = None
        run.go(folder, stop, bar)
        if run.stopped:
            return Result(model, totals, stop[0])
    if not (folder / "model").is_dir():
        export(model, recipe, folder / "model")
    return Result(model, totals)


def set_threads(recipe: Recipe) -> None:
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)


def _folder(recipe: Recipe, resume: bool) -> Path:
    """The run's folder, made or found."""
    folder = recipe.folder
    begun = checkpoint.newest(folder / "checkpoints") or _metrics(folder)
    if resume and not folder.is_dir():
        raise UserError(f"there is no run to resume in {folder}")
    if begun and not resume:
        raise UserError(f"{folder} holds a run already: --resume continues it, or choose another run.name")
    if begun and read(str(folder / "recipe.toml")) != recipe:
        raise UserError(
            f"{folder} was started with another recipe ({folder / 'recipe.toml'}): resume with that one, or choose "
            f"another run.name"
        )
    ours = {"recipe.toml", "checkpoints", ".lock"}
    if folder.is_dir() and any(folder.iterdir()) and not ours & {path.name for path in folder.iterdir()}:
        raise UserError(f"{folder} exists and is not a run; choose another run.name or run.folder")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return folder


def _metrics(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    return file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []


def _begin(recipe: Recipe, folder: Path, device: torch.device) -> tuple[dict | None, dict[str, Tensor] | None]:
    """The newest checkpoint, if there is one, and metrics that end where it does."""
    for half in checkpoint.unfinished(folder / "checkpoints"):
        print(f"ignoring {half}: it was being written when the run was killed", file=sys.stderr)
    newest = checkpoint.newest(folder / "checkpoints")
    tensors, state = checkpoint.load(newest) if newest else (None, None)
    if state and state["threads"] != torch.get_num_threads():
        print(
            f"the run used {state['threads']} threads and goes on with {torch.get_num_threads()}: "
            f"its weights will be right, but not bit-identical to an uninterrupted run",
            file=sys.stderr,
        )
    lines = _metrics(folder)[: state["totals"]["steps"] if state else 0]
    checkpoint.write_atomically(folder / "metrics.jsonl", "".join(lines))
    record.write(folder / "record.json", device=device, seed=recipe.run.seed)
    return state, tensors


def build(recipe: Recipe) -> tuple[DualSpeed, Source]:
    """The wrapped model and the training examples of a recipe."""
    device = _device(recipe.run.device)
    path = base(recipe)
    # Far more pictures than any run looks at: every picture is new.
    source = digits.Digits(1_000_000, recipe.data.turns, "train", recipe.run.seed)
    settings = recipe.dualspeed
    loaded = vlm.load(path)
    digits.check_model(loaded, path)
    model = DualSpeed(
        loaded,
        plugin=settings.plugin,
        keep=settings.keep,
        isolator=settings.isolator,
        temperature=settings.temperature,
        positions=settings.positions,
        layout=settings.layout,
        schedule=schedule_of(recipe, "train"),
        seed=recipe.run.seed,
    )
    return model.to(device), source


def base(recipe: Recipe) -> str:
    """Where the untrained model is; the embedded default's is made on first use."""
    if recipe.model.path:
        return recipe.model.path
    return str(digits.prepare(recipe.folder / "base", recipe.run.seed, **asdict(recipe.digits)))


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError('run.device = "cuda", but torch finds no CUDA device; use "auto" or "cpu"')
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def load_trained(recipe: Recipe) -> DualSpeed:
    """The model of a run as its newest checkpoint has it, isolator included."""
    newest = checkpoint.newest(recipe.folder / "checkpoints")
    if newest is None:
        raise UserError(f"{recipe.folder} has no checkpoint yet")
    tensors, state = checkpoint.load(newest)
    model, _ = build(recipe)
    vlm.set_trainable(model.model, recipe.stages()[state["stage"]][0])
    load_parameters({p: n for n, p in model.named_parameters() if p.requires_grad}, tensors)
    return model


def export(model: DualSpeed, recipe: Recipe, out: Path) -> None:
    """The plain model, without isolator, with its processor: transformers alone can load it."""
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.model.save_pretrained(temporary)
    processor = vlm.load_processor(base(recipe))
    processor.save_pretrained(temporary)
    temporary.rename(out)


@contextmanager
def _stop_requested() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM puts its number into; a second one ends the process as usual."""
    stop: list[int] = []
    before = {}

    def ask(number, frame):
        stop.append(number)
        # Not print: the signal may have come in the middle of another write to the same stream.
        os.write(2, f"\n{signal.Signals(number).name}: this step, then saving; once more to quit at once\n".encode())
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    except ValueError:  # not the main thread: signals are somebody else's business
        pass
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
