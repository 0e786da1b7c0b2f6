"""Checkpoints that are whole or not there.

    checkpoints/step-00000400/   tensors.safetensors   everything with a shape
                                 state.json            everything else, and the CRC-32 of both

A checkpoint is written under a temporary name, flushed to disk and renamed: whatever kills the run, a folder called
step-NNNNNNNN is complete. One that is not (a disk fault, a stray copy) is named, and never used in silence. Nothing
here is pickled: safetensors and JSON only.
"""

import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import UserError

CONSTANT = ("qmap1", "qmap2")  # bitsandbytes' table of 8-bit values, one for all
TENSORS, STATE = "tensors.safetensors", "state.json"


def write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict, keep: int) -> Path:
    """Write the checkpoint of `step`, then delete all but the newest `keep`."""
    final, temporary = folder / f"step-{step:08d}", folder / f".tmp-step-{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
    except SafetensorError as error:
        raise UserError(f"cannot write {temporary}: {error}; earlier checkpoints are untouched") from error
    size, crc = _fingerprint(temporary / TENSORS)
    state = {**state, "step": step, "bytes": size, "crc32": crc}
    (temporary / STATE).write_text(json.dumps({"state": state, "crc32": _crc(state)}, indent=1), encoding="utf-8")
    for path in (temporary / TENSORS, temporary / STATE):
        _to_disk(path)
    temporary.rename(final)
    _to_disk(folder)
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return final


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Refuse a second process in the same run: two would write each other's checkpoints and metrics."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing stops a second one there
        yield
        return
    with open(folder / ".lock", "w") as lock:
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
    """What a killed run left half-written. Harmless; the caller may name it."""
    return sorted(folder.glob(".tmp-step-*"))


def load(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and state of one checkpoint; a damaged one is an error that says so."""
    try:
        written = json.loads((path / STATE).read_text(encoding="utf-8"))
        state = written["state"]
        if written["crc32"] != _crc(state):
            raise ValueError(f"{STATE} is not what was written")
        if _fingerprint(path / TENSORS) != (state["bytes"], state["crc32"]):
            raise ValueError(f"{TENSORS} is not what was written")
        return load_file(path / TENSORS), state
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {path} is damaged ({type(error).__name__}: {error}); delete the folder to resume from the one "
            f"before it"
        ) from error


def _complete(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-" + "[0-9]" * 8) if p.is_dir())


def _to_disk(path: Path) -> None:
    """Make sure that a file's content, or a folder's entries, survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows cannot, and keeps its folders in order by itself
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _crc(state: dict) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _fingerprint(path: Path) -> tuple[int, int]:
    crc = size = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, crc


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's moments under their parameters' names."""
    return {
        f"optimizer/{key}/{names[parameter]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if key not in CONSTANT
    }


def load_optimizer(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], tensors: dict[str, Tensor]) -> None:
    """The reverse; the state of every parameter must be there already (see `optimizer.py`)."""
    for parameter, state in optimizer.state.items():
        for key, current in state.items():
            if key in CONSTANT:
                continue
            name = f"optimizer/{key}/{names[parameter]}"
            if name not in tensors or tensors[name].shape != torch.as_tensor(current).shape:
                raise UserError(f"the checkpoint has no {name}: it is of another recipe")
            if isinstance(current, Tensor):
                current.copy_(tensors[name])
            else:  # bitsandbytes counts its steps in a plain number
                state[key] = tensors[name].item()
