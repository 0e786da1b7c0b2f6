"""Files and folders are whole or not there, and every refusal of a disk is one line about what was to be written."""

import errno
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import tiny

from scale import ranks
from tinyspeed import UserError, cli, recipe
from tinyspeed.data import parquet
from tinyspeed.models import isolator_file
from tinyspeed.training import checkpoint, metrics, run_folder, train
from tinyspeed.util import files, plots

resource = pytest.importorskip("resource")  # not on Windows
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


@pytest.fixture
def small_files():
    """The system lets no file grow beyond 100,000 bytes: it fails in the middle of a write, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


LARGE = {"a": torch.zeros(50_000)}
WRITERS = {
    "text": lambda path: path.write_text("x" * 200_000),
    "safetensors": lambda path: save_file(LARGE, path),
    "isolator": lambda path: isolator_file.save(LARGE, path),
    "a model": lambda path: tiny.model("llava").save_pretrained(path),
    "a folder": lambda path: (path.mkdir(), WRITERS["text"](path / "large")),
    "a tokenizer": lambda path: (path.mkdir(), _large_tokenizer().save(str(path / "tokenizer.json"))),
}  # fmt: skip


def _large_tokenizer():
    made = tiny.tokenizer()
    made.add_tokens([f"word{i}" for i in range(3000)])
    return made.backend_tokenizer


@pytest.mark.parametrize("what", WRITERS)
def test_what_cannot_be_written_is_named_and_leaves_nothing(tmp_path, small_files, what):
    path = tmp_path / "made"
    said = re.escape(f"cannot write {path}: {os.strerror(errno.EFBIG)}; ")
    with pytest.raises(files.DiskError, match=said), files.atomic(path) as temporary:
        WRITERS[what](temporary)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("number", sorted(files.REMEDIES))
def test_a_mend_for_every_refusal_also_by_rust(number):
    for error in (OSError(number, "no"), Exception(f"I/O error: no (os error {number})")):
        said = f"^cannot write there: .*; {files.REMEDIES[number]}, then give the same command again"
        with pytest.raises(files.DiskError, match=said), files.errors_about("there"):
            raise error


def test_other_errors_stay_what_they_are():
    for error in (FileNotFoundError(errno.ENOENT, "no", "x"), UserError("(os error 28)"), KeyError("x")):
        with pytest.raises(type(error)) as found, files.errors_about("there"):
            raise error
        assert found.value is error


def test_many_files_are_flushed_at_once_and_few_one_by_one(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files, "flush", done.append)
    monkeypatch.setattr(os, "sync", lambda: done.append("all"))
    few, many = [tmp_path] * files.MANY, [tmp_path] * (files.MANY + 1)
    files.flush_all(few)
    assert done == few
    done.clear()
    files.flush_all(many)
    assert done == ["all"]


def test_an_older_one_stays_until_the_new_one_is_whole(tmp_path, small_files):
    path = tmp_path / "report.png"
    path.write_text("the old one")
    with pytest.raises(files.DiskError), files.atomic(path) as temporary:
        temporary.write_text("x" * 200_000)
    assert path.read_text() == "the old one"
    with files.atomic(path) as temporary:
        temporary.write_text("the new one")
    assert [p.name for p in tmp_path.iterdir()] == ["report.png"]
    assert path.read_text() == "the new one"


def test_a_link_and_a_device_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        files.write_atomically(tmp_path / name, "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    assert os.read(reader, 10) == b"new"
    os.close(reader)


def test_lines_are_whole_or_cut_off(tmp_path, small_files):
    path = tmp_path / "metrics.jsonl"
    line = b"x" * 999 + b"\n"
    with files.appending(path) as add:
        add(b"the first\n")
        for _ in range(99):
            add(line)
        with pytest.raises(files.DiskError, match=re.escape(str(path))):
            add(line)
    content = path.read_bytes()
    assert content == b"the first\n" + 99 * line
    with files.appending(path) as add:  # and it goes on behind them
        add(b"y\n")
    assert path.read_bytes() == content + b"y\n"


def test_a_log_that_cannot_be_flushed_is_named(tmp_path, monkeypatch):
    """Where a disk turns read-only between a step and its checkpoint."""
    values = (
        f"run.folder={tmp_path}", "run.name=one", "run.threads=1", "digits.pictures=4", "digits.side=6",
        "digits.tower_steps=1", "align.steps=1", "train.steps=1", "align.batch=1", "train.batch=1",
    )  # fmt: skip
    made = recipe.read("digits", [*values])
    flush = files.flush

    def read_only(path):
        if path.name == metrics.LOG:
            raise OSError(errno.EROFS, "read-only", str(path))
        flush(path)

    monkeypatch.setattr(files, "flush", read_only)
    with pytest.raises(files.DiskError, match=r"cannot write .*metrics\.jsonl"):
        train.train(made, bar=False)


def test_an_error_between_two_lines_is_not_about_the_file(tmp_path):
    with pytest.raises(OSError, match="another disk") as found, files.appending(tmp_path / "metrics.jsonl"):
        raise OSError(errno.ENOSPC, "another disk")
    assert not isinstance(found.value, files.DiskError)


def test_half_a_checkpoint_is_taken_away(tmp_path, small_files):
    good = checkpoint.save(tmp_path, 1, {"a": torch.zeros(9)}, {}, keep=1)
    with pytest.raises(files.DiskError, match=re.escape(str(checkpoint.folder_of(tmp_path, 2)))):
        checkpoint.save(tmp_path, 2, LARGE, {}, keep=1)
    with pytest.raises(files.DiskError, match=r"step-00000002/state\.json"):
        checkpoint.save(tmp_path, 2, {"a": torch.zeros(9)}, {"much": "x" * 200_000}, keep=1)
    assert [*tmp_path.iterdir()] == [good]
    checkpoint.read(good)


def test_a_picture_that_cannot_be_written_is_a_matter_of_the_disk(tmp_path, small_files):
    fig = plots.figure(30, 30)
    fig.add_subplot().imshow(torch.rand(300, 300))
    with pytest.raises(files.DiskError, match=r"report\.png"):
        plots.save(fig, tmp_path / "report.png")
    with pytest.raises(UserError, match=r"ends in \.png"):
        plots.save(fig, tmp_path / "report.what")
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def nothing_goes(monkeypatch):
    """A disk that has turned read-only under a folder that is to be deleted: a part of it is gone."""

    def rmtree(path):
        for file in sorted(file for file in Path(path).rglob("*") if file.is_file())[:1]:
            file.unlink()
        raise OSError(errno.EROFS, "read-only", str(path))

    monkeypatch.setattr(files.shutil, "rmtree", rmtree)


def test_half_of_an_old_checkpoint_is_none(tmp_path, nothing_goes):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"a": torch.zeros(9)}, {}, keep=2)
    assert [path.name for path in checkpoint.unfinished(tmp_path)] == [".tmp-step-00000001"]
    for path in sorted(tmp_path.glob("step-*")):
        checkpoint.read(path)


def test_what_is_in_the_way_and_stays_is_a_matter_of_the_disk(tmp_path, nothing_goes):
    left = tmp_path / ".model.tmp"
    left.mkdir()
    (left / "half").touch()
    with (
        pytest.raises(files.DiskError, match=r"cannot write .*/model: .*make it writable"),
        files.atomic(left.with_name("model")),
    ):
        pass
    half = checkpoint.temporary_folder_of(tmp_path, 1)
    half.mkdir()
    (half / "half").touch()
    with pytest.raises(files.DiskError, match=r"step-00000001.*make it writable"):
        checkpoint.save(tmp_path, 1, {"a": torch.zeros(9)}, {}, keep=2)


def test_advice_is_to_resume_only_what_has_begun(tmp_path, capsys, monkeypatch):
    words = ["train", "digits", "--set", f"run.folder={tmp_path}", "--set", "run.name=one"]

    def full(recipe, *, resume):
        raise files.DiskError("somewhere", errno.ENOSPC)

    monkeypatch.setattr(train, "train", full)
    assert cli.main(words) == 2
    assert capsys.readouterr().err.endswith("make space there, then give the same command again\n")
    checkpoint.save(tmp_path / "one" / "checkpoints", 1, LARGE, {}, keep=1)
    (tmp_path / "one" / "recipe.toml").write_text(recipe.read("digits", words[3::2]).to_toml())
    assert cli.main([*words, "--resume"]) == 2
    assert capsys.readouterr().err.endswith("make space there, then continue with --resume\n")


@needs_full
def test_output_that_cannot_be_printed_is_an_error_that_says_so(capsys, monkeypatch):
    full = FULL.open("w")
    monkeypatch.setattr(sys, "stdout", full)
    assert cli.main(["estimate", "digits"]) == 2
    with suppress(OSError):  # closing it tries again
        full.close()
    assert "tinyspeed: cannot write standard output: No space left on device; make space" in capsys.readouterr().err


@needs_full
def test_a_log_on_a_full_disk_takes_no_exit_code_away():
    with FULL.open("w") as full:
        words = [sys.executable, "-m", "tinyspeed", "estimate", "absent.toml"]
        assert subprocess.run(words, stderr=full, cwd=Path(__file__).parents[2]).returncode == 2


@needs_full
def test_notices_are_lost_and_nothing_else():
    with FULL.open("wb", buffering=0) as full:
        stream = io.TextIOWrapper(full, write_through=True)
        with pytest.raises(OSError, match="No space"):
            print("a line", file=stream, flush=True)
        notices = cli.SafeStream(stream)
        print("a line", file=notices, flush=True)
        assert notices.fileno() == full.fileno()
        stream.detach()


def test_a_rank_that_says_why_is_not_lost_when_the_board_goes_first(monkeypatch):
    codes = []

    class Board:
        gone = False

        def clone(self):
            return self

        def compare_set(self, key, before, value):
            return value.encode()

        def check(self, keys):
            if self.gone:
                raise RuntimeError("connection reset")
            return False

    board = Board()
    here = ranks.Ranks(1, 2, torch.device("cpu"), board)
    real = ranks.time.sleep

    def asleep(seconds):
        board.gone = True
        real(0.2)

    monkeypatch.setattr(ranks, "CHECK_EVERY", 0.01)
    monkeypatch.setattr(ranks.time, "sleep", asleep)
    monkeypatch.setattr(ranks.os, "_exit", codes.append)
    here.watch()
    here.abort(ranks.MISTAKE, "why")
    here.watcher.join()
    assert codes == [ranks.MISTAKE]


def test_a_cache_is_swept_of_what_the_dead_left_and_of_nothing_else(tmp_path):
    def left(name: str, age: float) -> Path:
        path = tmp_path / name
        path.write_text("half")
        os.utime(path, (path.stat().st_mtime - age,) * 2)
        return path

    old, young = left(".a.1.tmp", 2 * files.STALE), left(".b.2.tmp", 0.0)
    files.delete_stale([old, young, tmp_path / ".gone.3.tmp"])
    assert not old.exists()
    assert young.read_text() == "half"


def test_a_run_that_could_not_write_its_recipe_leaves_nothing(tmp_path, monkeypatch):
    made = recipe.read("digits", [f"run.folder={tmp_path}", "run.name=one"])

    def full(path, text):
        raise files.DiskError(path, errno.ENOSPC)

    monkeypatch.setattr(files, "write_atomically", full)
    with pytest.raises(files.DiskError), run_folder.claimed(made, resume=False):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_second_process_takes_nothing_of_the_first_away(tmp_path, monkeypatch):
    """Also where it looked before the first had made the folder."""
    made = recipe.read("digits", [f"run.folder={tmp_path}", "run.name=one"])
    with run_folder.claimed(made, resume=False) as folder:
        before, is_dir = sorted(folder.iterdir()), Path.is_dir
        monkeypatch.setattr(Path, "is_dir", lambda path: path != folder and is_dir(path))
        with pytest.raises(UserError, match="another process"), run_folder.claimed(made, resume=False):
            pass
        monkeypatch.undo()
        assert sorted(folder.iterdir()) == before


def test_a_run_that_ended_before_it_had_pruned_does_so_when_it_goes_on(tmp_path):
    values = [f"model.path={tiny.checkpoint('llava', tmp_path / 'base')}", f"run.folder={tmp_path}", "run.name=one"]
    made = recipe.read("digits", [*values, "run.keep_checkpoints=2"])
    for step in (1, 2, 3):
        checkpoint.save(made.folder / "checkpoints", step, {"a": torch.zeros(9)}, {}, keep=3)
    train.begin(made, made.folder, torch.device("cpu"), None)
    assert sorted(p.name for p in (made.folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


def test_parquet_that_is_unpacked_is_read_without_writing(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"conversations": turns}]), tmp_path / "x.parquet")
    first = parquet.unpack(tmp_path / "x.parquet", tmp_path / "cache")
    for lock in (tmp_path / "cache").glob(".*.lock"):
        lock.unlink()
    assert parquet.unpack(tmp_path / "x.parquet", tmp_path / "cache") == first
    assert not [*(tmp_path / "cache").glob(".*")]  # on a read-only disk it would have failed


# Hashes


@pytest.fixture
def read(monkeypatch):
    """The files that were read to be hashed; the hash of any file is worth keeping."""
    found, original = [], files.hashed
    monkeypatch.setattr(files, "LARGE", 0)
    monkeypatch.setattr(files, "hashed", lambda path: found.append(path.name) or original(path))
    return found


@given(contents=st.lists(st.binary(max_size=100), max_size=5))
def test_a_files_hash_is_blake2b_of_its_content(contents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    assert files.hashes(paths, folder) == [hashlib.blake2b(content).hexdigest() for content in contents]
    assert not (folder / "hashes.json").exists(), "small files are read again"


def test_a_large_file_is_read_once(tmp_path, read):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(path.name)
    first = files.hashes(paths, tmp_path / "cache")
    assert files.hashes(paths[::-1], tmp_path / "cache") == first[::-1]
    assert sorted(read) == ["a", "b"]


def changed_in_place(file: Path) -> None:
    """As by a program that hides it: neither the size nor the time of the content tells."""
    before = file.stat()
    with open(file, "r+b") as opened:
        opened.write(b"X")
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # which nobody can set; it moves every few milliseconds
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(file: Path) -> None:
    before = file.stat()
    file.rename(file.with_name("old"))
    file.write_text("Xther content")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def touched(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def longer(file: Path) -> None:
    file.write_text("longer content")


@pytest.mark.parametrize("change", [changed_in_place, replaced, touched, longer])
def test_a_kept_hash_is_not_believed_of_a_file_that_may_have_changed(tmp_path, read, change):
    file = tmp_path / "a"
    file.write_text("other content")
    files.hashes([file], tmp_path / "cache")
    change(file)
    assert files.hashes([file], tmp_path / "cache") == [hashlib.blake2b(file.read_bytes()).hexdigest()]
    assert read == ["a", "a"]


def test_kept_hashes_that_are_damaged_are_not_believed(tmp_path, read):
    file, kept = tmp_path / "a", tmp_path / "cache" / "hashes.json"
    file.write_text("content")
    true = files.hashes([file], kept.parent)
    sound = kept.read_text()
    wrong = sound.replace(true[0], "f" * 128)
    for text in (wrong, "[]", "{}", "[3, 4]", '[{"a": 1}, 0]', "\0", sound[:-9], "[" * 9999):
        kept.write_text(text)
        assert files.hashes([file], kept.parent) == true
        assert kept.read_text() == sound
    assert len(read) == 9


def test_hashes_that_cannot_be_kept_are_computed_each_time(tmp_path, read):
    (tmp_path / "a").write_text("content")
    (tmp_path / "cache").write_text("a file, where the folder should be")
    for _ in range(2):
        assert files.hashes([tmp_path / "a"], tmp_path / "cache") == [hashlib.blake2b(b"content").hexdigest()]
    assert read == ["a", "a"]


def test_only_the_newest_hashes_are_kept(tmp_path, read, monkeypatch):
    monkeypatch.setattr(files, "MANY", 2)
    for name in "abc":
        (tmp_path / name).write_text(name)
        files.hashes([tmp_path / name], tmp_path)
    files.hashes([tmp_path / "c", tmp_path / "b"], tmp_path)
    assert read == ["a", "b", "c"]
    files.hashes([tmp_path / "a"], tmp_path)
    assert read == ["a", "b", "c", "a"]
