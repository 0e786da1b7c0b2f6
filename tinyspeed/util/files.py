"""Files and folders that are whole or not there; and what is said when a disk takes no more.

    with disk.whole(path) as temporary:    ...write...     becomes `path` when all of it is on disk; or nothing is left
    with disk.lines(path) as add:          add(line)       a file that grows; it never keeps half a line
    with disk.to(path):                    ...write...     an error in here is about `path`

A full disk shows in any write, and in most the system does not say of which file. Parts of what we write with are in
Rust, and have errors of their own, in which the system's number is words. All of them become one `DiskError`.
"""

import errno
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from . import files
from .errors import UserError

# What reading a damaged file of ours may raise.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError)
STALE = 3600.0  # seconds
MANY = 1000  # files
MENDS = {
    errno.ENOSPC: "make space there",
    errno.EROFS: "make it writable",
    errno.EFBIG: "let files be as large as that there",
    errno.EIO: "look after that disk",
}
if hasattr(errno, "EDQUOT"):  # not on Windows
    MENDS[errno.EDQUOT] = "make space there, or raise the quota"


class DiskError(UserError):
    """A disk that does not take what is written. `then`: what the user is to do when it does."""

    then = "give the same command again"

    def __init__(self, path: Path | str, number: int):
        super().__init__(f"cannot write {path}: {os.strerror(number)}; {MENDS[number]}")

    def __str__(self) -> str:
        return f"{super().__str__()}, then {self.then}"


def errno_of(error: BaseException) -> int | None:
    """The system's number of what a disk said; None if it is something else. An error from Rust has it in its text."""
    found = error.errno if isinstance(error, OSError) else None
    if not isinstance(error, OSError | UserError) and (said := re.search(r"\(os error (\d+)\)", str(error))):
        found = int(said[1])
    return found if found in MENDS else None


@contextmanager
def about(path: Path | str) -> Iterator[None]:
    """Whatever a disk refuses in here is about this path."""
    try:
        yield
    except Exception as error:
        if (said := errno_of(error)) is None:
            raise
        raise DiskError(path, said) from error


@contextmanager
def atomic(path: Path, *, cached: bool = False) -> Iterator[Path]:
    """A name to write a file or a folder to, which then gets its own. `cached`: it can be made again, so that it need
    not survive a power cut, and other processes may be making the same."""
    target = path.resolve()  # a link stays one
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp" if cached else f".{target.name}.tmp")
    with about(path):
        if target.exists() and not (target.is_file() or target.is_dir()):  # /dev/null must not become a file
            yield target
            return
        delete(temporary)  # of a killed process
        try:
            yield temporary
            if not cached:
                flush_all([*temporary.rglob("*"), temporary])
            temporary.replace(target)
        except BaseException:
            remove(temporary)
            raise
        if not cached:
            flush(target.parent)


@contextmanager
def appending(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that adds a line to a file; when it returns, the system has it and no signal takes it away."""
    with about(path):
        file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed below, where an error is about the path again)

    def add(line: bytes) -> None:
        before = file.tell()
        with about(path):
            try:
                while line:  # a disk that is nearly full takes a part, and says no to the rest
                    line = line[file.write(line) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(before)
                raise

    try:
        yield add
    finally:
        with about(path):
            file.close()


def remove_stale(halves: Iterable[Path]) -> None:
    """Take away what killed processes have left half-written in a cache; a living one's is seconds old."""
    for half in halves:
        with suppress(OSError):
            if time.time() - half.stat().st_mtime > STALE:
                remove(half)


def remove(path: Path) -> None:
    """A file or a folder, if it is there and can be taken away."""
    with suppress(OSError):
        delete(path)


def delete(path: Path) -> None:
    """The same of what is in the way: where it cannot be taken away, the disk says why."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_all(paths: list[Path]) -> None:
    """Many files at once: each costs a disk milliseconds, and 500,000 pictures are an hour."""
    if len(paths) > MANY and hasattr(os, "sync"):  # not on Windows
        os.sync()
        return
    for path in paths:
        flush(path)


def flush(path: Path) -> None:
    """Make sure that a file's content, or a folder's entries, survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows cannot, and keeps its folders in order by itself
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    with files.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def fingerprint(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file."""
    crc = size = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, crc
