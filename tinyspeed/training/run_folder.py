"""A run's folder: whether a run may begin or be resumed there, by one process at a time.

    runs/NAME/   recipe.toml   checkpoints/   metrics.jsonl   ...

Nothing of another run, or of anything else, is ever overwritten, and a run that never began leaves nothing behind.
Everything here is checked before torch builds a model, so that a mistake costs a second and not minutes.
"""

import dataclasses
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..recipe import Recipe, read
from ..recipe.sections import INPUTS
from ..util import UserError, files, paths, require
from .metrics import LOG

OURS = {"recipe.toml", "checkpoints", ".lock", "base", "skipped.txt"}
# The keys that a resumed run may change: where things are kept, and how a step fits into memory. No sample, weight or
# schedule depends on them. (Dropout does draw differently if micro-batches are cut differently.)
FREE = {
    "run": ("save_every", "save_minutes", "keep_checkpoints", "cache"),
    "data": ("workers", "feature_cache_gb"),
    "align": ("row_budget", "checkpointing"),
    "train": ("row_budget", "checkpointing"),
    "scale": ("shard", "reshard", "offload", "check_every", "timeout"),
}
PLACES = {"run": ("name", "folder", "device"), **INPUTS}  # the keys that say where a run's inputs and outputs are


def require_sources(recipe: Recipe) -> None:
    """Refuses a recipe whose model, reference, isolator or data is not where it says."""
    if recipe.model.path:
        paths.model_folder_or_hub_id(recipe.model.path)
    if recipe.regate.reference:
        paths.model_folder_or_hub_id(recipe.regate.reference)
    if recipe.dualspeed.isolator_from:
        paths.require_isolator(recipe.dualspeed.isolator_from)
    if recipe.data.kind == "chat":
        paths.require_conversations(recipe.data.file, recipe.data.images)


def require_free_or_resumable(recipe: Recipe, resume: bool) -> None:
    """Refuses a folder in which the run may neither begin nor be resumed."""
    folder = recipe.folder
    paths.require_plain(folder, own=True)
    require(folder.is_dir() or not resume, f"there is no run to resume in {folder}")
    there = has_begun(folder)
    if there and not resume:
        raise UserError(f"{folder} holds a run already: --resume continues it, and --set run.name=NAME begins another")
    file = folder / "recipe.toml"
    if there and (changed := differences(read(str(file)), recipe)):
        which = f"{', '.join(changed)} {'differs' if len(changed) == 1 else 'differ'}"
        raise UserError(f"the run was started with another recipe ({file}): {which}. Use that, or another run.name")
    if folder.is_dir() and any(folder.iterdir()) and not OURS & {path.name for path in folder.iterdir()}:
        raise UserError(f"{folder} exists and is not a run; choose another run.name or run.folder")


def has_begun(folder: Path) -> bool:
    """Whether a run in this folder has taken a step. Then it can be resumed, and no other run can begin there."""
    from . import checkpoint  # imported here because it imports torch

    log = folder / LOG
    return bool(checkpoint.newest(folder / "checkpoints") or (log.is_file() and log.stat().st_size))


def differences(before: Recipe, now: Recipe, free: dict = FREE) -> list[str]:
    """The keys, but those that are `free`, whose values make two recipes ask for different runs."""
    found, asked = [], dataclasses.asdict(now)
    for section, values in dataclasses.asdict(before).items():
        other = [key for key in values if values[key] != asked[section][key] and key not in free.get(section, ())]
        found += [f"{section}.{key}" for key in other]
    return found


def log_fingerprint(folder: Path) -> tuple[int, int]:
    """Size and CRC-32 of the log so far, or of an empty one if somebody has deleted it."""
    file = folder / LOG
    return files.fingerprint(file) if file.is_file() else (0, 0)


def log_until(folder: Path, state: dict) -> bytes:
    """The log as it was when the checkpoint with this state was written, or nothing if it has been deleted."""
    file, (size, crc), step = folder / LOG, state["log"], state["step"]
    if not file.is_file():
        print(f"{file} is gone: the log begins at step {step + 1}", file=sys.stderr)
        return b""
    lines = files.read(file)[:size]
    if (len(lines), zlib.crc32(lines)) != (size, crc):
        what = f"its first {size:,} bytes are not what was written until step {step}"
        raise UserError(f"{file} is damaged: {what}; delete it to begin a new log at step {step + 1}")
    return lines


def fingerprint(recipe: Recipe) -> str:
    """A hash of the settings that a run's numbers depend on. Paths are left out, so that runs and their inputs may be
    moved, and so are settings at their defaults, so that a later version may add keys."""
    told = []
    for section, asked in dataclasses.asdict(recipe).items():
        usual = dataclasses.asdict(type(getattr(recipe, section))())
        free = (*FREE.get(section, ()), *PLACES.get(section, ()))
        told += [(section, key, asked[key]) for key in sorted(asked) if key not in free and asked[key] != usual[key]]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()


@contextmanager
def claimed(recipe: Recipe, resume: bool) -> Iterator[Path]:
    """Makes the run's folder with its recipe in it, and keeps other processes out of it."""
    require_free_or_resumable(recipe, resume)
    from . import checkpoint

    folder = recipe.folder
    new = not folder.is_dir()
    with files.errors_about(folder):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    with checkpoint.only_one(folder):
        try:
            files.write_atomically(folder / "recipe.toml", recipe.to_toml())
            yield folder
        except BaseException:
            if new:
                _delete_if_empty(folder)
            raise


def _delete_if_empty(folder: Path) -> None:
    """Deletes the folder of a run that never began, unless it holds anything else."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"recipe.toml", "checkpoints", ".lock"}:
        with suppress(OSError):  # if a checkpoint is in the way, this is a run after all
            (folder / "checkpoints").rmdir()
            for name in ("recipe.toml", ".lock"):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
