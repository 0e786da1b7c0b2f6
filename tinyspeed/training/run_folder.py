"""The folder of a run: may it begin or go on there, by one process alone; and nothing is left of one that never began.

    runs/NAME/   recipe.toml   checkpoints/   metrics.jsonl   ...

Nothing of another run, or of anything else, is ever overwritten. What can be known before torch builds a model is
known here, so that a mistake costs a second and not the time that a base model, or 200,000 records, take.
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
from ..util import files, paths
from ..util.errors import UserError

LOG = "metrics.jsonl"
OURS = {"recipe.toml", "checkpoints", ".lock", "base", "skipped.txt"}
# What a resumed run may change: where things are kept, and how a step fits into memory. No sample, no weight of it and
# no schedule depends on these (dropout draws differently for micro-batches that are cut differently).
FREE = {
    "run": ("save_every", "keep_checkpoints", "cache"),
    "data": ("workers", "feature_cache_gb"),
    "align": ("row_budget", "checkpointing"),
    "train": ("row_budget", "checkpointing"),
    "scale": ("shard", "reshard", "offload", "check_every", "timeout"),
}
# Where what a run is made of, or made in, is.
PLACES = {
    "run": ("name", "folder", "device"),
    "model": ("path", "tower", "llm"),
    "data": ("file", "images"),
    "dualspeed": ("isolator_from",),
    "regate": ("reference",),
}


def require_sources(recipe: Recipe) -> None:
    """That what the run is made from is there."""
    if recipe.model.path:
        paths.model(recipe.model.path)
    if recipe.regate.reference:
        paths.model(recipe.regate.reference)
    if recipe.dualspeed.isolator_from:
        paths.isolator(recipe.dualspeed.isolator_from)
    if recipe.data.kind == "chat":
        paths.conversations(recipe.data.file, recipe.data.images)


def require_free_or_resumable(recipe: Recipe, resume: bool) -> None:
    """That the run may begin, or go on, in its folder."""
    folder = recipe.folder
    if resume and not folder.is_dir():
        raise UserError(f"there is no run to resume in {folder}")
    there = has_begun(folder)
    if there and not resume:
        raise UserError(f"{folder} holds a run already: --resume continues it, and --set run.name=NAME begins another")
    if there and (changed := differences(read(str(folder / "recipe.toml")), recipe)):
        raise UserError(
            f"{folder} was started with another recipe ({folder / 'recipe.toml'}): {', '.join(changed)} "
            f"{'differs' if len(changed) == 1 else 'differ'}. Resume with that one, or choose another run.name"
        )
    if folder.is_dir() and any(folder.iterdir()) and not OURS & {path.name for path in folder.iterdir()}:
        raise UserError(f"{folder} exists and is not a run; choose another run.name or run.folder")


def has_begun(folder: Path) -> bool:
    """Whether a run in this folder has taken a step: then it can go on, and nothing else can begin there."""
    from . import checkpoint  # here, for it imports torch

    log = folder / LOG
    return bool(checkpoint.newest(folder / "checkpoints") or (log.is_file() and log.stat().st_size))


def differences(before: Recipe, now: Recipe) -> list[str]:
    """The keys in which two recipes ask for different runs."""
    a, b = dataclasses.asdict(before), dataclasses.asdict(now)
    return [
        f"{section}.{key}"
        for section in a
        for key in a[section]
        if a[section][key] != b[section][key] and key not in FREE.get(section, ())
    ]


def log_fingerprint(folder: Path) -> tuple[int, int]:
    """Size and CRC-32 of the log so far; of one that somebody has deleted, of nothing."""

    file = folder / LOG
    return files.fingerprint(file) if file.is_file() else (0, 0)


def log_until(folder: Path, state: dict) -> bytes:
    """The log as it was when the checkpoint with this state was written; or nothing, where it has been deleted."""
    file, (size, crc), step = folder / LOG, state["log"], state["step"]
    if not file.is_file():
        print(f"{file} is gone: the log begins at step {step + 1}", file=sys.stderr)
        return b""
    lines = file.read_bytes()[:size]
    if (len(lines), zlib.crc32(lines)) != (size, crc):
        raise UserError(
            f"{file} is damaged: its first {size:,} bytes are not what was written until step {step}; delete it to go "
            f"on with a log that begins at step {step + 1}"
        )
    return lines


def fingerprint(recipe: Recipe) -> str:
    """Of all that a run's numbers follow from. Not of where things are: a run may be moved, and what it reads too. Nor
    of what is as it always was: a later version may have more keys."""
    told = []
    for section, asked in dataclasses.asdict(recipe).items():
        usual = dataclasses.asdict(type(getattr(recipe, section))())
        free = (*FREE.get(section, ()), *PLACES.get(section, ()))
        told += [(section, key, asked[key]) for key in sorted(asked) if key not in free and asked[key] != usual[key]]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=8).hexdigest()


@contextmanager
def claimed(recipe: Recipe, resume: bool) -> Iterator[Path]:
    """The run's folder, with its recipe in it, for this process alone."""
    require_free_or_resumable(recipe, resume)
    from . import checkpoint

    folder = recipe.folder
    new = not folder.is_dir()
    with files.about(folder):
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    with checkpoint.only_one(folder):
        try:
            files.write_atomically(folder / "recipe.toml", recipe.to_toml())
            yield folder
        except BaseException:
            if new:
                _leave(folder)
            raise


def _leave(folder: Path) -> None:
    """Take the folder away again, unless something was made in it."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"recipe.toml", "checkpoints", ".lock"}:
        with suppress(OSError):  # a checkpoint, or another process: then it is a run
            (folder / "checkpoints").rmdir()
            for name in ("recipe.toml", ".lock"):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
