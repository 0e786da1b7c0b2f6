"""A file system of its own that says no from a chosen moment on, to everyone who writes to it.

    full        not a page more, or so many and not one beyond (nearly full): as when another program fills the disk
    no files    not one file or folder more
    read-only   nothing at all may be changed, as after a fault of the medium

It is a tmpfs, and its limits are the kernel's: what fails is the system call itself, whoever makes it, in the middle of
a write too. A moment is an event of Python's audit hook on one of its paths (a file is opened, a folder made, something
renamed or deleted), so a program that does the same twice meets the same moment twice. Handles that are open when it
turns read-only can still be written to: the kernel refuses to take them away.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
ROOMY = ("size=512m", "nr_inodes=100k")
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.listdir", "os.scandir"}


def refused() -> str:
    """Why there can be none here; "" if there can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Volume(Path(folder)):
                return ""
        except (OSError, subprocess.CalledProcessError) as error:
            return f"a file system can be mounted by root alone: {getattr(error, 'stderr', None) or error}".strip()


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True, text=True)


class Volume:
    """Mounted at a folder, empty, for as long as the context lasts."""

    def __init__(self, at: Path):
        self.at = at.resolve()

    def __enter__(self) -> "Volume":
        self.at.mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", "-o", ",".join(ROOMY), "tmpfs", self.at)
        return self

    def __exit__(self, *_) -> None:
        self.relieve()
        subprocess.run(["umount", self.at], check=True)

    def trouble(self, kind: str, pages: int = 0) -> None:
        """From now on. `pages`: how many are left."""
        if kind.endswith("full"):
            self._limit(
                lambda now: f"size={max(1, now.f_blocks - now.f_bfree + pages) * now.f_frsize}"
            )  # 0 is no limit
        elif kind == "no files":
            self._limit(lambda now: f"nr_inodes={now.f_files - now.f_ffree}")
        else:  # over itself: a file that is open for writing keeps the one below from being changed
            _mount("--bind", self.at, self.at)
            _mount("-o", "remount,bind,ro", self.at)

    def _limit(self, of: Callable[[os.statvfs_result], str]) -> None:
        """To what is taken now; another thread may take more in between, which the kernel does not accept."""
        for attempt in range(20):
            try:
                return _mount("-o", f"remount,{of(os.statvfs(self.at))}", self.at)
            except subprocess.CalledProcessError:
                if attempt == 19:
                    raise

    def relieve(self) -> None:
        """Space is made, and it can be written to."""
        while _mounts(self.at) > 1:
            subprocess.run(["umount", self.at], check=True)
        _mount("-o", ",".join(("remount", *ROOMY)), self.at)

    def files(self) -> dict[str, Path]:
        return {str(path.relative_to(self.at)): path for path in sorted(self.at.rglob("*")) if path.is_file()}

    def watch(self, notes: Path, at: int = -1, kind: str = "", pages: int = 0) -> None:
        """In the process that is to be hit: write a line to `notes` (which is elsewhere) for each moment, and make
        trouble at that of this number."""
        numbers, inside, home = itertools.count(), f"{self.at}{os.sep}", os.getpid()
        log, busy = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), []

        def hook(event: str, arguments: tuple) -> None:
            if event not in EVENTS or busy or os.getpid() != home:
                return
            path = arguments[0]
            if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(inside):
                return
            busy.append(event)  # making trouble opens files, too
            number = next(numbers)
            os.write(log, f"{event} {os.fspath(path).removeprefix(inside)}\n".encode())
            if number == at:
                self.trouble(kind, pages)
            busy.pop()

        sys.addaudithook(hook)


def _mounts(at: Path) -> int:
    """How many file systems are mounted there, one over the other."""
    return sum(line.split()[4] == str(at) for line in Path("/proc/self/mountinfo").read_text().splitlines())
