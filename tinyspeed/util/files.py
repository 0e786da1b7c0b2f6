"""Files and folders that are whole or not there, and one error for a disk that cannot be written.

    with files.atomic(path) as temporary:  ...write...     becomes `path` once all of it is on disk; or nothing is left
    with files.appending(path) as add:     add(line)       a file that grows, and never keeps half a line
    with files.errors_about(path):         ...write...     a disk error in here names `path`

Any write can find the disk full, and the system mostly does not say which file it was. Some libraries that we write
with are in Rust and raise errors of their own, with the system's number in their text. All become one `DiskError`.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError, require

# What reading a damaged file of our own may raise.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError)
STALE = 3600.0  # seconds after which an unfinished file is taken for one of a killed process
MANY = 1000  # files
LARGE = 1 << 26  # bytes of a file whose hash is worth keeping
REMEDIES = {
    errno.ENOSPC: "make space there",
    errno.EROFS: "make it writable",
    errno.EFBIG: "allow larger files there",
    errno.EIO: "check that disk",
}
if hasattr(errno, "EDQUOT"):  # not on Windows
    REMEDIES[errno.EDQUOT] = "make space there, or raise the quota"


class DiskError(UserError):
    """A disk that cannot be written. `then` is what to do once that is mended."""

    then = "give the same command again"

    def __init__(self, path: Path | str, number: int):
        super().__init__(f"cannot write {path}: {os.strerror(number)}; {REMEDIES[number]}")

    def __str__(self) -> str:
        return f"{super().__str__()}, then {self.then}"


def errno_of(error: BaseException) -> int | None:
    """The system's number for a disk error, or None for any other error. Errors from Rust have it in their text."""
    found = error.errno if isinstance(error, OSError) else None
    if not isinstance(error, OSError | UserError) and (said := re.search(r"\(os error (\d+)\)", str(error))):
        found = int(said[1])
    return found if found in REMEDIES else None


@contextmanager
def errors_about(path: Path | str) -> Iterator[None]:
    """Turns a disk error into one that names this path."""
    try:
        yield
    except Exception as error:
        if (said := errno_of(error)) is None:
            raise
        raise DiskError(path, said) from error


@contextmanager
def atomic(path: Path, *, cached: bool = False) -> Iterator[Path]:
    """A temporary name for a file or a folder, which is renamed to `path` once it is written. The folder around it is
    made if need be. While one process writes `path`, others are refused. What is only `cached` can be made again: it
    need not survive a power cut, and other processes may be making the same, each under a name of its own."""
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp" if cached else f".{target.name}.tmp")
    lock = temporary.with_name(f"{temporary.name}.lock")
    with errors_about(path):
        if not cached and special(target):  # /dev/null must not become a file
            yield target
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with nullcontext() if cached else locked(lock, f"another process is writing {path}; choose another name"):
            try:
                require(not (target.is_dir() and any(target.iterdir())), f"{path} exists already")
                delete(temporary)  # left by a killed process
                yield temporary
                if not cached:
                    flush_all([*temporary.rglob("*"), temporary])
                temporary.replace(target)
            except BaseException:
                delete_if_possible(temporary)
                raise
            finally:
                delete_if_possible(lock)
            if not cached:
                flush(target.parent)


@contextmanager
def locked(path: Path, taken: str = "") -> Iterator[None]:
    """Locks a file, which is made if need be. The kernel unlocks it however the process ends. If another process has
    the lock, the error is `taken`; without that text this process waits."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    with open(path, "ab", opener=lambda name, flags: regular(name, flags | os.O_NOFOLLOW)) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if taken else 0))
            free = os.fstat(lock.fileno()).st_nlink > 0  # otherwise the process before has just deleted it
        except OSError as error:
            free = not isinstance(error, BlockingIOError)  # some network disks have no such locks either
        require(free or not taken, taken)
        yield


def special(path: Path) -> bool:
    """Whether this is a pipe, a socket or a device: opening one may wait for ever, and reading one may never end."""
    return path.exists() and not (path.is_file() or path.is_dir())


def regular(path: str, flags: int) -> int:
    """An opener (see `open`) of files that waits for nothing else, but refuses it."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)  # not on Windows
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is not a file")
    return handle


def read(path: Path) -> bytes:
    with open(path, "rb", opener=regular) as file:
        return file.read()


@contextmanager
def appending(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A function that adds a line to a file. Once it returns, the system has the line, and no signal can lose it."""
    with errors_about(path):
        file = open(path, "ab", buffering=0, opener=regular)  # noqa: SIM115 (closed below, to name the path again)

    def add(line: bytes) -> None:
        before = file.tell()
        with errors_about(path):
            try:
                while line:  # a disk that is nearly full writes a part, and refuses the rest
                    line = line[file.write(line) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(before)
                raise

    try:
        yield add
    finally:
        with errors_about(path):
            file.close()


def delete_stale(unfinished: Iterable[Path]) -> None:
    """Deletes what killed processes have left half-written in a cache. Files of living ones are seconds old."""
    for path in unfinished:
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                delete_if_possible(path)


def delete_if_possible(path: Path) -> None:
    with suppress(OSError):
        delete(path)


def delete(path: Path) -> None:
    """Deletes a file or a folder, if it is there, and raises if it cannot."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_all(paths: list[Path]) -> None:
    """Flushes many files by flushing the disk: each file takes milliseconds, and 500,000 pictures an hour."""
    if len(paths) > MANY and hasattr(os, "sync"):  # not on Windows
        os.sync()
        return
    for path in paths:
        flush(path)


def flush(path: Path) -> None:
    """Makes sure that a file's content, or a folder's entries, survive a power cut."""
    if path.is_dir() and os.name == "nt":  # Windows cannot, and keeps its folders consistent by itself
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: str | bytes, *, cached: bool = False) -> None:
    with atomic(path, cached=cached) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def fingerprint(path: Path) -> tuple[int, int]:
    """The size and the CRC-32 of a file."""
    crc = size = 0
    with open(path, "rb", opener=regular) as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return size, crc


def hashed(path: Path | str) -> str:
    """The BLAKE2b hash of a file."""
    with open(path, "rb", opener=regular) as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def hashes(paths: list[Path], folder: Path) -> list[str]:
    """The hashes of files that may be large. `folder`/hashes.json keeps those of large ones, so that each is read once.
    They hold until the file's place, size, times or inode change."""
    kept, file = {}, folder / "hashes.json"
    with suppress(*UNREADABLE):
        saved, crc = json.loads(file.read_text())
        kept = saved if crc == zlib.crc32(json.dumps(saved).encode()) else {}
    stats = {path: path.stat() for path in paths}
    seen = [(str(p.resolve()), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for p, s in stats.items()]
    with ThreadPoolExecutor() as pool:
        found = [*pool.map(lambda path, version: kept.get(repr(version)) or hashed(path), paths, seen)]
    large = {repr(version): of for version, of in zip(seen, found, strict=True) if version[1] > LARGE}
    if large.keys() - kept.keys():
        kept = dict([*kept.items(), *large.items()][-MANY:])
        with suppress(OSError, DiskError):  # then they are computed again
            write_atomically(file, json.dumps([kept, zlib.crc32(json.dumps(kept).encode())]), cached=True)
    return found
