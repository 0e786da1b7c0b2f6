"""Checkpoints that are whole or not there.

    checkpoints/step-00000400/   tensors.safetensors   everything with a shape
                                 state.json            everything else, and the CRC-32 of both

A checkpoint is written under a temporary name, flushed to disk and renamed: whatever kills the run, a folder called
step-NNNNNNNN is complete. One that is not (a disk fault, a stray copy) is named, and never used in silence. Nothing
here is pickled: safetensors and JSON only.

Several processes write a file each (tensors-00003-of-00008.safetensors), with some rows of each tensor; its header says
which. Whoever reads asks for the rows it needs, from whichever files have them, so a run goes on with any number of
processes, and one process can read what many wrote.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..util import files, finite
from ..util.errors import UserError
from ..util.files import UNREADABLE, fingerprint

CONSTANT = ("qmap1", "qmap2")  # bitsandbytes' table of 8-bit values, one for all
TENSORS, STATE = "tensors.safetensors", "state.json"
_OURS = re.compile(r"tensors[-\w]*\.safetensors")


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """Write the checkpoint of `step`, then delete all but the newest `keep`."""
    if found := not_finite(tensors.items(), state):
        raise refusal(step, found)
    try:
        temporary = begin(folder, step)
        return finish(temporary, state, write(temporary, tensors), keep)
    except BaseException:
        files.remove(temporary_folder_of(folder, step))  # half of one would keep a full disk full
        raise


def not_finite(tensors: Iterable[tuple[str, Tensor]], state: dict) -> str | None:
    """What of a checkpoint must not be saved, since it is not finite: a run that goes on from there is lost."""
    return finite.first_bad(tensors) or finite.bad_number(state)


def refusal(step: int, found: str) -> UserError:
    return UserError(
        f"the checkpoint of step {step} was not written: {found}. Resume the run: what was saved before is good"
    )


def folder_of(folder: Path, step: int) -> Path:
    """The checkpoint of `step`, which is complete if it is there."""
    return folder / f"step-{step:08d}"


def temporary_folder_of(folder: Path, step: int) -> Path:
    """The same while it is written."""
    return folder / f".tmp-step-{step:08d}"


def begin(folder: Path, step: int) -> Path:
    """An empty folder for the checkpoint of `step`, under its temporary name."""
    temporary = temporary_folder_of(folder, step)
    with files.about(folder_of(folder, step)):
        files.delete(temporary)
        temporary.mkdir(parents=True)
    return temporary


def write(
    temporary: Path, tensors: dict[str, Tensor], rows: dict[str, tuple[int, int]] | None = None, part: str = ""
) -> dict[str, list[int]]:
    """One process's file. `rows`: of tensors that are not whole, the first row and how many there are in all files.
    Returns the file's name with its fingerprint."""
    path = temporary / TENSORS.replace("tensors.", f"tensors{part}.")
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with files.about(_final(temporary) / path.name):
        save_file(here, path, metadata={"rows": json.dumps(rows or {})})
        files.flush(path)
    return {path.name: [*fingerprint(path)]}


def finish(temporary: Path, state: dict, written: dict[str, list[int]], keep: int) -> Path:
    """When all files are written: the state beside them, and the final name."""
    final = _final(temporary)
    state = {**state, "step": int(final.name.rpartition("-")[2]), "files": written}
    with files.about(final / STATE):
        (temporary / STATE).write_text(json.dumps({"state": state, "crc32": _crc(state)}, indent=1), encoding="utf-8")
        files.flush(temporary / STATE)
    with files.about(final):
        temporary.rename(final)
        files.flush(final.parent)
    prune(final.parent, keep)
    return final


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep`. Each loses its name first: a part of one must not look like a whole one."""
    for old in _complete(folder)[:-keep]:
        with suppress(OSError):  # what cannot be deleted must not end the run
            files.delete(old.rename(old.with_name(f".tmp-{old.name}")))


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Refuse a second process in the same run: two would write each other's checkpoints and metrics."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing stops a second one there
        yield
        return
    with files.about(folder / ".lock"):
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(
                lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # the kernel lets go when the process ends, however it does
        except OSError as error:
            raise UserError(f"another process is training in {folder}; wait for it, or stop it") from error
        yield


def newest(folder: Path) -> Path | None:
    complete = _complete(folder)
    return complete[-1] if complete else None


def unfinished(folder: Path) -> list[Path]:
    """What a killed run left half-written, or half-deleted. Harmless; the caller may name it."""
    return sorted(folder.glob(".tmp-step-*"))


class Saved(Mapping[str, Tensor]):
    """The tensors of a checkpoint, read when they are asked for."""

    def __init__(self, paths: list[Path]):
        self._parts: dict[str, list[tuple[int, int, object]]] = {}  # name -> (first row, number of rows, file)
        self._folder = paths[0].parent
        self._rows: dict[str, int] = {}  # of tensors in parts: the number of rows in all files
        for path in paths:
            file = safe_open(path, framework="pt")
            rows = json.loads(file.metadata()["rows"])
            for name in file.keys():  # noqa: SIM118 (not a dict)
                shape = file.get_slice(name).get_shape()
                first, self._rows[name] = rows.get(name, (0, shape[0] if shape else 0))
                self._parts.setdefault(name, []).append((first, shape[0] if shape else 0, file))
        for name, parts in self._parts.items():
            parts.sort(key=lambda part: part[:2])
            end = 0
            for first, count, _ in parts:
                if count and first != end:
                    raise ValueError(f"{name} has rows twice or not at all")
                end += count
            if end != self._rows[name]:
                raise ValueError(f"{name} has {end} rows of {self._rows[name]}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, name: str) -> Tensor:
        if self.shape(name):
            return self.part(name, 0, self._rows[name])
        return self._finite(name, self._parts[name][0][2].get_tensor(name))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if found := finite.first_bad([(name, tensor)]):
            raise UserError(
                f"checkpoint {self._folder} is not finite: {found}; delete the folder to resume from the one before it"
            )
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._parts[name][0][2].get_slice(name).get_shape()
        return (self._rows[name], *shape[1:]) if shape else ()

    def part(self, name: str, begin: int, end: int) -> Tensor:
        """Rows `begin` to `end` of a tensor. A version that did not look before it saved may have left some that are
        not finite."""
        found = []
        for first, count, file in self._parts[name]:
            low, high = max(begin, first), min(end, first + count)
            if low < high or begin == end:
                found.append(file.get_slice(name)[low - first : max(low, high) - first])
        return self._finite(name, found[0] if len(found) == 1 else torch.cat(found))


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{STATE} holds {name}")


def read(path: Path, mine: slice = slice(None)) -> tuple[Saved, dict]:
    """Tensors and state of one checkpoint; a damaged one is an error that says so. `mine`: which of the files this
    process checks, where several share that."""
    with reading(path):
        if not (path / STATE).is_file():
            raise ValueError(f"{STATE} is not there, or no file")
        written = json.loads((path / STATE).read_text(encoding="utf-8"), parse_constant=_no_number)
        state = written["state"]
        if written["crc32"] != _crc(state):
            raise ValueError(f"{STATE} is not what was written")
        if folder_of(path.parent, state["step"]).name != path.name:
            raise ValueError(f"it is the checkpoint of step {state['step']}")
        if strange := [name for name in state["files"] if not _OURS.fullmatch(name)]:
            raise ValueError(f"{strange[0]!r} is no file of a checkpoint")
        for name in sorted(state["files"])[mine]:
            if not (path / name).is_file():  # a pipe would be waited for
                raise ValueError(f"{name} is not there, or no file")
            if [*fingerprint(path / name)] != state["files"][name]:
                raise ValueError(f"{name} is not what was written")
        return Saved([path / name for name in state["files"]]), state


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Whatever goes wrong while a checkpoint is read: it is damaged."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(
            f"checkpoint {path} is damaged ({type(error).__name__}: {error}); delete the folder to resume from the one "
            f"before it"
        ) from error


def unsharded(tensor: Tensor) -> tuple[Tensor, int]:
    """What this process has of a tensor, and its first row: all of it."""
    return tensor, 0


def fill(tensors: dict[str, Tensor], saved: Saved, local: Callable[[Tensor], tuple[Tensor, int]] = unsharded) -> None:
    """Copy what was saved into these tensors; all must be there."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name not in saved or saved.shape(name) != tuple(tensor.shape):
                raise UserError(
                    f"the checkpoint has no {name} of shape {tuple(tensor.shape)}: it is of another model or recipe"
                )
            here, begin = local(tensor)
            here.copy_(saved.part(name, begin, begin + len(here)) if here.dim() else saved[name])


def _final(temporary: Path) -> Path:
    return temporary.with_name(temporary.name.removeprefix(".tmp-"))


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-" + "[0-9]" * 8) if p.is_dir())


def _crc(state: dict) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's moments under their parameters' names."""
    return {
        f"optimizer/{key}/{names[parameter]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if key not in CONSTANT
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    names: dict[Tensor, str],
    saved: Saved,
    local: Callable[[Tensor], tuple[Tensor, int]] = unsharded,
) -> None:
    """The reverse; the state of every parameter must be there already (see `optimizer.py`)."""
    current = optimizer_tensors(optimizer, names)
    fill(current, saved, local)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor):  # bitsandbytes counts its steps in a plain number
                state[key] = current[f"optimizer/{key}/{names[parameter]}"].item()
