"""Checkpoints: complete, or not there at all.

    checkpoints/step-00000400/   tensors.safetensors   everything with a shape
                                 state.json            everything else, and the CRC-32 of both

A checkpoint is written under a temporary name, flushed to disk and renamed. Whatever kills the run, a folder called
step-NNNNNNNN is therefore complete. A damaged one (a disk fault, a stray copy) is reported and never used silently.
Nothing is pickled: the files are safetensors and JSON.

With several processes each writes a file of its own (tensors-00003-of-00008.safetensors) with some rows of each tensor,
and the file's header says which. A reader asks for the rows that it needs, from whichever files have them. So a run can
be resumed with any number of processes.
"""

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from ..util import UserError, files, finite
from ..util.files import UNREADABLE, fingerprint

BACK = "delete the folder to resume from the one before it"
CONSTANT = ("qmap1", "qmap2")  # bitsandbytes' tables of 8-bit values, the same for all parameters
TENSORS, STATE = "tensors.safetensors", "state.json"
_OURS = re.compile(r"tensors[-\w]*\.safetensors")
Local = Callable[[Tensor], tuple[Tensor, int]]  # gives the part of a tensor that this process holds, and its first row


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """Writes the checkpoint of `step`, then deletes all but the newest `keep`."""
    if found := not_finite(tensors.items(), state):
        raise refusal(step, found)
    try:
        temporary = begin(folder, step)
        return finish(temporary, state, write(temporary, tensors), keep)
    except BaseException:
        # A half-written checkpoint would keep a full disk full.
        files.delete_if_possible(temporary_folder_of(folder, step))
        raise


def not_finite(tensors: Iterable[tuple[str, Tensor]], state: dict) -> str | None:
    """Names the first number that is not finite: a run could not recover from a checkpoint that holds one."""
    return finite.first_bad(tensors) or finite.bad_number(state)


def refusal(step: int, found: str) -> UserError:
    return UserError(f"the checkpoint of step {step} was not written: {found}. Resume the run: the one before is good")


def folder_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`. If it exists it is complete."""
    return folder / f"step-{step:08d}"


def temporary_folder_of(folder: Path, step: int) -> Path:
    """The name of that folder while the checkpoint is being written."""
    return folder / f".tmp-step-{step:08d}"


def begin(folder: Path, step: int) -> Path:
    """Makes an empty folder for the checkpoint of `step`, under its temporary name."""
    temporary = temporary_folder_of(folder, step)
    with files.errors_about(folder_of(folder, step)):
        files.delete(temporary)
        temporary.mkdir(parents=True)
    return temporary


def write(
    temporary: Path, tensors: dict[str, Tensor], rows: dict | None = None, part: str = ""
) -> dict[str, list[int]]:
    """Writes the file of one process and returns its name with its fingerprint. `rows`: for tensors that are split over
    files, the first row of this part and the number of rows in all files."""
    path = temporary / TENSORS.replace("tensors.", f"tensors{part}.")
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with files.errors_about(_final(temporary) / path.name):
        save_file(here, path, metadata={"rows": json.dumps(rows or {})})
        files.flush(path)
    return {path.name: [*fingerprint(path)]}


def finish(temporary: Path, state: dict, written: dict[str, list[int]], keep: int) -> Path:
    """Writes the state when all files are there, gives the folder its final name, and deletes old checkpoints."""
    final = _final(temporary)
    state = {**state, "step": int(final.name.rpartition("-")[2]), "files": written}
    with files.errors_about(final / STATE):
        (temporary / STATE).write_text(json.dumps({"state": state, "crc32": _crc(state)}, indent=1), encoding="utf-8")
        files.flush(temporary / STATE)
    with files.errors_about(final):
        temporary.rename(final)
        files.flush(final.parent)
    prune(final.parent, keep)
    return final


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep`. Each is renamed first, so that a half-deleted one never looks complete."""
    for old in _complete(folder)[:-keep]:
        with suppress(OSError):  # a checkpoint that cannot be deleted must not end the run
            files.delete(old.rename(old.with_name(f".tmp-{old.name}")))


def only_one(folder: Path) -> AbstractContextManager[None]:
    """Refuses a second process in the same folder: two would overwrite each other's checkpoints and metrics."""
    return files.locked(folder / ".lock", f"another process is training in {folder}; wait for it, or stop it")


def newest(folder: Path) -> Path | None:
    complete = _complete(folder)
    return complete[-1] if complete else None


def unfinished(folder: Path) -> list[Path]:
    """Checkpoints that a killed run left half-written or half-deleted. They are harmless."""
    return sorted(folder.glob(".tmp-step-*"))


class Saved(Mapping[str, Tensor]):
    """The tensors of a checkpoint. Each is read from disk when it is asked for."""

    def __init__(self, paths: list[Path]):
        self._parts: dict[str, list[tuple[int, int, object]]] = {}  # name -> (first row, number of rows, file)
        self._folder = paths[0].parent
        self._rows: dict[str, int] = {}  # name -> the number of rows in all files
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
                expect(first == end or not count, f"{name} has rows twice or not at all")
                end += count
            expect(end == self._rows[name], f"{name} has {end} rows of {self._rows[name]}")

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
            raise UserError(f"checkpoint {self._folder} is not finite: {found}; {BACK}")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._parts[name][0][2].get_slice(name).get_shape()
        return (self._rows[name], *shape[1:]) if shape else ()

    def part(self, name: str, begin: int, end: int) -> Tensor:
        """Rows `begin` to `end` of a tensor. Refuses values that are not finite."""
        found = []
        for first, count, file in self._parts[name]:
            low, high = max(begin, first), min(end, first + count)
            if low < high or begin == end:
                found.append(file.get_slice(name)[low - first : max(low, high) - first])
        return self._finite(name, found[0] if len(found) == 1 else torch.cat(found))


def expect(good: bool, what: str) -> None:
    """Refuses a checkpoint inside of `reading`, which says that it is damaged."""
    if not good:
        raise ValueError(what)


def read(path: Path, mine: slice = slice(None)) -> tuple[Saved, dict]:
    """The tensors and the state of a checkpoint. A damaged one is refused. `mine`: the files this process verifies."""
    with reading(path):
        text = files.read(path / STATE).decode()
        written = json.loads(text, parse_constant=lambda name: expect(False, f"{STATE} holds {name}"))
        state = written["state"]
        expect(written["crc32"] == _crc(state), f"{STATE} is not what was written")
        same = folder_of(path.parent, state["step"]).name == path.name
        expect(same, f"it is the checkpoint of step {state['step']}")
        for name in state["files"]:
            expect(bool(_OURS.fullmatch(name)), f"{name!r} is not the name of a checkpoint's file")
        for name in sorted(state["files"])[mine]:
            expect([*fingerprint(path / name)] == state["files"][name], f"{name} is not what was written")
        return Saved([path / name for name in state["files"]]), state


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turns whatever goes wrong while a checkpoint is read into the error that it is damaged."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"checkpoint {path} is damaged ({type(error).__name__}: {error}); {BACK}") from error


def unsharded(tensor: Tensor) -> tuple[Tensor, int]:
    """The part of a tensor that this process holds, and its first row: here the whole tensor."""
    return tensor, 0


@torch.no_grad()
def fill(tensors: dict[str, Tensor], saved: Saved, local: Local = unsharded) -> None:
    """Copies what was saved into these tensors. Refuses a checkpoint that lacks one of them."""
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name not in saved or saved.shape(name) != shape:
            raise UserError(f"the checkpoint has no {name} of shape {shape}: it is of another model or recipe")
        here, begin = local(tensor)
        here.copy_(saved.part(name, begin, begin + len(here)) if here.dim() else saved[name])


def _final(temporary: Path) -> Path:
    return temporary.with_name(temporary.name.removeprefix(".tmp-"))


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-" + "[0-9]" * 8) if p.is_dir())


def _crc(state: dict) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def optimizer_tensors(optimizer: Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's moments, named by their parameters."""
    found = {}
    for parameter, state in optimizer.state.items():
        kept = {key: torch.as_tensor(value) for key, value in state.items() if key not in CONSTANT}
        found |= {f"optimizer/{key}/{names[parameter]}": value for key, value in kept.items()}
    return found


def load_optimizer(optimizer: Optimizer, names: dict[Tensor, str], saved: Saved, local: Local = unsharded) -> None:
    """Fills the optimizer's moments, which must exist already (`optimizer.py` makes them before step 0)."""
    current = optimizer_tensors(optimizer, names)
    fill(current, saved, local)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor):  # bitsandbytes counts steps in a plain int
                state[key] = current[f"optimizer/{key}/{names[parameter]}"].item()
