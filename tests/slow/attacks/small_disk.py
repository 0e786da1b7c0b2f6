"""A small file system that fails from a chosen moment on, for everyone who writes to it.

    full         no page is left, as when another program fills the disk
    nearly full  a few pages are left
    no files     no file or folder can be created
    read-only    nothing can be changed, as after a fault of the medium

It is a tmpfs whose limits the kernel enforces: the system call itself fails, whoever makes it, also in the middle of a
write. A moment is an event of Python's audit hook on one of its paths (a file is opened, a folder is made, something is
renamed or deleted), so a program that does the same thing twice meets the same moment twice. Files that are open when
the disk turns read-only can still be written to: the kernel does not take them away.
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


def why_not() -> str:
    """Why no such disk can be mounted here; "" if it can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with SmallDisk(Path(folder)):
                return ""
        except (OSError, subprocess.CalledProcessError) as error:
            return f"only root can mount a file system: {getattr(error, 'stderr', None) or error}".strip()


def _mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True, capture_output=True, text=True)


class SmallDisk:
    """Mounted at a folder, and empty, while the context lasts."""

    def __init__(self, at: Path):
        self.at = at.resolve()

    def __enter__(self) -> "SmallDisk":
        self.at.mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", "-o", ",".join(ROOMY), "tmpfs", self.at)
        return self

    def __exit__(self, *_) -> None:
        self.repair()
        subprocess.run(["umount", self.at], check=True)

    def fail(self, kind: str, pages: int = 0) -> None:
        """Fail from now on. `pages` is how many are left."""
        if kind.endswith("full"):
            self._limit(
                lambda now: f"size={max(1, now.f_blocks - now.f_bfree + pages) * now.f_frsize}"
            )  # 0 is no limit
        elif kind == "no files":
            self._limit(lambda now: f"nr_inodes={now.f_files - now.f_ffree}")
        else:  # mounted over itself: a file that is open for writing keeps the mount below from changing
            _mount("--bind", self.at, self.at)
            _mount("-o", "remount,bind,ro", self.at)

    def _limit(self, of: Callable[[os.statvfs_result], str]) -> None:
        """Limit the disk to what is in use. The kernel refuses if another thread has taken more in the meantime."""
        for attempt in range(20):
            try:
                return _mount("-o", f"remount,{of(os.statvfs(self.at))}", self.at)
            except subprocess.CalledProcessError:
                if attempt == 19:
                    raise

    def repair(self) -> None:
        """Make space, and make it writable."""
        while _mounts(self.at) > 1:
            subprocess.run(["umount", self.at], check=True)
        _mount("-o", ",".join(("remount", *ROOMY)), self.at)

    def files(self) -> dict[str, Path]:
        return {str(path.relative_to(self.at)): path for path in sorted(self.at.rglob("*")) if path.is_file()}

    def watch(self, notes: Path, at: int = -1, kind: str = "", pages: int = 0) -> None:
        """Call this in the process that the fault is meant for. Each moment becomes a line in `notes`, which is on
        another disk, and at the moment of number `at` the disk fails."""
        numbers, inside, home = itertools.count(), f"{self.at}{os.sep}", os.getpid()
        log, busy = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), []

        def hook(event: str, arguments: tuple) -> None:
            if event not in EVENTS or busy or os.getpid() != home:
                return
            path = arguments[0]
            if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(inside):
                return
            busy.append(event)  # failing opens files, too
            number = next(numbers)
            os.write(log, f"{event} {os.fspath(path).removeprefix(inside)}\n".encode())
            if number == at:
                self.fail(kind, pages)
            busy.pop()

        sys.addaudithook(hook)


def _mounts(at: Path) -> int:
    """How many file systems are mounted there, one over another."""

    return sum(line.split()[4] == str(at) for line in Path("/proc/self/mountinfo").read_text().splitlines())
