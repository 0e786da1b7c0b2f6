"""Several processes that write one path at once: the file or folder is wholly of one of them, and the others are told.

A writer here is a generator, so that a test can interleave several in one process as processes would be: the system's
locks belong to open files, not to processes.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyspeed import UserError
from tinyspeed.training import checkpoint
from tinyspeed.util import files

fcntl = pytest.importorskip("fcntl")  # not on Windows
TAKEN, THERE = "another process is writing", "exists already"


class Killed(BaseException):
    pass


def written(path: Path, folder: bool, text: str) -> None:
    """Write this text, a part of it at each call, as a file or as the two files of a folder."""
    if folder:
        path.mkdir(exist_ok=True)
    for file in (path / "a", path / "b") if folder else (path,):
        with open(file, "a") as out:
            out.write(text)


def content(path: Path) -> str | dict[str, str] | None:
    if path.is_dir():
        return {file.name: file.read_text() for file in path.iterdir()}
    return path.read_text() if path.exists() else None


class Writer:
    """One process that writes `path`; `go` takes its next step, and `kill` ends it as SIGKILL does."""

    def __init__(self, path: Path, folder: bool, name: str):
        self.whole = {"a": 2 * name, "b": 2 * name} if folder else 2 * name
        self.writing, self.inside, self.done = files.atomic(path), False, False
        self.steps = self._steps(folder, name)

    def _steps(self, folder: bool, name: str) -> Iterator[None]:
        temporary = self.writing.__enter__()
        self.inside = True
        for _ in range(2):
            yield
            written(temporary, folder, name)
        yield
        self.inside = False
        self.writing.__exit__(None, None, None)

    def go(self) -> None:
        try:
            next(self.steps)
        except StopIteration:
            self.done = True
        except UserError:
            self.done = True
            raise

    def kill(self) -> None:
        """The kernel takes its locks away, and nobody cleans up."""
        self.done, was_inside, self.inside = True, self.inside, False
        if was_inside:
            with mock.patch.object(files, "delete_if_possible"), suppress(Killed):
                self.writing.__exit__(Killed, Killed(), None)


@given(
    folder=st.booleans(), before=st.booleans(),
    moves=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["go", "go", "go", "kill"])), max_size=20),
)  # fmt: skip
def test_however_writers_take_turns_the_path_is_of_one_and_the_others_are_told(tmp_path_factory, folder, before, moves):
    """The oracle keeps only who is inside, and what the last one to end has written."""
    path = tmp_path_factory.mktemp("writers") / "made"
    if before and not folder:
        path.write_text("old")
    writers = [Writer(path, folder, str(n)) for n in range(4)]
    expected, inside = content(path), None
    to_the_end = [(n, "go") for n in range(4) for _ in range(4)]
    for n, how in moves + to_the_end:
        writer = writers[n]
        if writer.done:
            continue
        if how == "kill":
            writer.kill()
            inside = None if inside is writer else inside
        elif not writer.inside and inside is not None:
            with pytest.raises(UserError, match=TAKEN):
                writer.go()
        elif not writer.inside and folder and expected is not None:
            with pytest.raises(UserError, match=THERE):
                writer.go()
        else:
            writer.go()
            inside = writer
            if writer.done:
                inside, expected = None, writer.whole
        assert content(path) == expected
    assert all(writer.done for writer in writers)
    if not folder:  # whoever writes next also sweeps what the killed have left
        files.write_atomically(path, "new")
        assert [p.name for p in path.parent.iterdir()] == ["made"]


def test_the_second_of_two_exports_is_told_at_once_and_loses_nothing_of_the_first(tmp_path):
    out = tmp_path / "model"
    with files.atomic(out) as first:
        written(first, True, "first")
        with pytest.raises(UserError, match=f"{TAKEN} {out}; "), files.atomic(out):
            pytest.fail("both are writing")
        with files.atomic(tmp_path / "other") as other:  # another name is free
            written(other, True, "other")
    assert content(out) == {"a": "first", "b": "first"}
    with pytest.raises(UserError, match=f"{out} {THERE}"), files.atomic(out):
        pytest.fail("the first one would be overwritten")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_two_who_fill_one_cache_share_no_name(tmp_path):
    """Both may: what is cached is the same whoever makes it. Process numbers would be shared by two machines."""
    one, two = (files.atomic(tmp_path / "cached", cached=True) for _ in range(2))
    first, second = one.__enter__(), two.__enter__()
    first.write_text("whole")
    second.write_text("who")
    one.__exit__(None, None, None)
    assert (tmp_path / "cached").read_text() == "whole"
    second.write_text("whole")
    two.__exit__(None, None, None)
    assert (tmp_path / "cached").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["cached"]


def test_a_lock_that_the_one_before_has_just_deleted_is_no_lock(tmp_path, monkeypatch):
    """The first one ends between two calls of the second: it has opened the lock, and not locked it yet. A third one
    would make a new lock, and both would be inside."""
    path, flock = tmp_path / "made", fcntl.flock
    first = files.atomic(path)
    first.__enter__().write_text("first")

    def late(*arguments):
        monkeypatch.undo()
        first.__exit__(None, None, None)
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match=TAKEN), files.atomic(path):
        pytest.fail("it holds a lock that nobody else can see")
    assert content(path) == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]


def test_a_disk_without_locks_is_as_good_as_windows(tmp_path, monkeypatch):
    def unknown(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    files.write_atomically(tmp_path / "made", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    with checkpoint.only_one(tmp_path):
        pass


def test_one_who_waits_goes_on_when_the_other_ends(tmp_path, monkeypatch):
    """As the processes that read one parquet file do; the system's own waiting is left out."""
    flock, asked = fcntl.flock, []
    monkeypatch.setattr(fcntl, "flock", lambda lock, how: asked.append(how) or flock(lock, how))
    with files.locked(tmp_path / ".lock"):
        pass
    assert asked == [fcntl.LOCK_EX]
