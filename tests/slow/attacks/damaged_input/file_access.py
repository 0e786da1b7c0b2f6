"""Which files Python opens, lists, moves or removes while a case runs, and whether it starts a program or connects to
anything.

An audit hook sees all this before it happens. Such a hook cannot be removed, so there is one, which is paused between
cases. Paths are resolved: a link is what it leads to. What native code opens by itself (safetensors, pyarrow,
tokenizers) is not seen.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import peft  # noqa: F401 (tinyspeed would import it in the middle of a case, and it opens many files)

import tinyspeed

PATHS = {
    "open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod",
    "os.link", "os.symlink", "shutil.rmtree", "shutil.copyfile", "shutil.move",
}  # fmt: skip
NEVER = {
    "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo",
    "pickle.find_class", "os.startfile", "webbrowser.open",
}  # fmt: skip
# What Python imports, and what any program reads of the system.
CODE = (sys.prefix, sys.base_prefix, Path(tinyspeed.__file__).parents[1])
SYSTEM = (
    "/dev/null", "/dev/urandom", "/proc/cpuinfo", "/proc/meminfo", "/proc/self/mounts", "/proc/self/cgroup",
    "/sys/fs/cgroup",
)  # fmt: skip

_allowed: tuple[str, ...] | None = None  # None: paused
_parents: set[str] = set()
_programs: tuple[str, ...] = ()
_seen: list[str] = []


@contextmanager
def allowing(allowed: Iterable[str | Path], programs: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """Yields the list of what else was touched. These files and folders, everything in the folders and these programs
    are allowed. The folder of an allowed file may be made, and opened, as flushing it does, but not listed."""
    global _allowed, _parents, _programs
    _seen.clear()
    _programs = programs
    given = [os.path.realpath(path) for path in allowed]
    _parents = {os.path.dirname(path) for path in given}
    _allowed = tuple(os.path.realpath(path) for path in (*CODE, *SYSTEM, *given))
    try:
        yield _seen
    finally:
        _allowed = None


@contextmanager
def paused() -> Iterator[None]:
    """For what the attack itself reads in the meantime."""
    global _allowed
    before, _allowed = _allowed, None
    try:
        yield
    finally:
        _allowed = before


def _hook(event: str, arguments: tuple) -> None:
    if _allowed is None:
        return
    if event == "subprocess.Popen" and arguments[0] in _programs:
        return
    # A name in a folder that was opened before, and seen then. An `open` does not tell the hook in which folder.
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        return
    if event == "open" and sys._getframe(1).f_code.co_filename == shutil.__file__ and not os.path.isabs(arguments[0]):
        return
    if event in NEVER:
        _seen.append(f"{event} {arguments!r:.200}")
    elif event in PATHS and isinstance(arguments[0], str | bytes | os.PathLike):
        try:
            path = os.path.realpath(os.fsdecode(arguments[0]))
        except ValueError:  # not a path, so nothing will be opened
            return
        if event in ("open", "os.mkdir") and path in _parents:
            return
        if not any(path == one or path.startswith(one + os.sep) for one in _allowed):
            _seen.append(f"{event} {path!r:.300}")


sys.addaudithook(_hook)
tempfile.gettempdir()  # the first call writes a file, to see whether it can
