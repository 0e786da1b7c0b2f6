"""Pipes and devices are refused and never waited for, and nothing in a run's folder is followed out of it."""

import json
import os
import socket
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyspeed import UserError, cli, recipe
from tinyspeed.data import images, parquet
from tinyspeed.data.record_files import RecordFile
from tinyspeed.evaluation import benchmarks, questions
from tinyspeed.evaluation.questions import Question
from tinyspeed.models import manifest
from tinyspeed.recipe import comparison
from tinyspeed.training import checkpoint, metrics, train
from tinyspeed.util import files, paths

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
RUN = 'run.name = "mine"\ndata.kind = "digits"\ntrain.steps = 1\n'


def bind(path: Path) -> None:
    """A socket with this name, which must be short."""
    here = os.getcwd()
    os.chdir(path.parent)
    with closing(socket.socket(socket.AF_UNIX)) as made:
        made.bind(path.name)
    os.chdir(here)


# A pipe without a writer is waited for when it is opened; /dev/zero has no end.
SPECIAL = {"pipe": os.mkfifo, "socket": bind, "device": lambda path: path.symlink_to("/dev/zero")}


def predictions(path: Path) -> None:
    asked = [Question("1", None, "What?", "yes")]
    ask = lambda pictures, text: "no"
    benchmarks.run("pope", asked, path.parent, ask, path, model="m", prompts=["What?"], bar=False)


def appended(path: Path) -> None:
    with files.appending(path) as add:
        add(b"a line\n")


def locked(path: Path) -> None:
    with files.locked(path, "taken"):
        pass


def verified(path: Path) -> None:
    (path.parent / "parts.json").write_text(json.dumps({"how": {}, "files": {path.name: [1, 2]}}))
    manifest.verify(path.parent, "parts.json", {})


OPENED = {
    "a picture": lambda path: images.decode(path, "ask"),
    "a picture's size": lambda path: images.size(path, "ask"),
    "a named picture": lambda path: images.inside(path.parent, path.name, "record 1"),
    "questions": lambda path: questions.read("pope", path),
    "predictions": predictions,
    "predictions, to go on": appended,
    "a log": metrics.read_metrics,
    "records": RecordFile,
    "a recipe": lambda path: recipe.read(str(path)),
    "arms": lambda path: comparison.read(recipe.read("digits"), str(path), None),
    "a lock": locked,
    "a base model's file": verified,
    "a base model's manifest": lambda path: manifest.verify(path.parent, path.name, {}),
    "an isolator": lambda path: paths.require_isolator(str(path.parent)),
    "any file": files.read,
    "any file's fingerprint": files.fingerprint,
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("what", OPENED)
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, what, kind):
    path = tmp_path / "given"
    SPECIAL[kind](path)
    with pytest.raises((UserError, OSError)) as found:
        OPENED[what](path)
    assert "given" in cli.message_of(found.value)


@pytest.mark.parametrize("kind", SPECIAL)
def test_parquet_that_is_no_file_is_not_waited_for(tmp_path, kind):
    pytest.importorskip("pyarrow")
    SPECIAL[kind](tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no file .*a\.parquet"):
        RecordFile(tmp_path / "a.parquet", cache=tmp_path / "cache")
    with pytest.raises(UserError, match=r"without \.parquet files"):
        parquet.unpack(tmp_path, tmp_path / "cache")


def test_a_pipe_that_somebody_writes_into_is_no_file_either(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(writer, b"{}\n")
    for act in (files.read, appended, locked, lambda path: questions.read("pope", path)):
        with pytest.raises(UserError, match="pipe is not a file"):
            act(tmp_path / "pipe")
    os.close(writer)


def test_what_opens_files_still_opens_them(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert files.read(tmp_path / "file") == files.read(tmp_path / "link") == b"content"
    with pytest.raises(UserError, match="is not a file"):
        files.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.read(tmp_path / "absent")
    with open(tmp_path / "new", "w", opener=files.regular) as made:
        made.write("x")
    assert (tmp_path / "new").stat().st_mode & 0o777 == (tmp_path / "file").stat().st_mode & 0o777


# Folders of runs


def plant(run: Path, name: str, secret: Path) -> None:
    """A link from a name in a run's folder to a secret."""
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)


@pytest.fixture
def run(tmp_path):
    """The folder of a run, as far as a recipe makes one. The folder itself is a link, as to a larger disk."""
    (tmp_path / "large" / "mine").mkdir(parents=True)
    (tmp_path / "large" / "mine" / "recipe.toml").write_text(RUN)
    (tmp_path / "mine").symlink_to(tmp_path / "large" / "mine")
    return tmp_path / "mine"


STEP = "checkpoints/step-00000004"
NAMES = (
    ".lock", "metrics.jsonl", "recipe.toml", "record.json", "skipped.txt", "report.png", "isolator.safetensors",
    "model", "model/config.json", "base", "base/config.json", "checkpoints", STEP, f"{STEP}/state.json",
    f"{STEP}/tensors.safetensors", ".metrics.jsonl.tmp", ".metrics.jsonl.tmp.lock", "pope.jsonl", "kept.png",
)  # fmt: skip
COMMANDS = {
    "train": ["train", "RUN/recipe.toml", "--set=run.folder=HOME", "--set=run.name=mine"],
    "resume": ["train", "RUN/recipe.toml", "--set=run.folder=HOME", "--set=run.name=mine", "--resume"],
    "demo": ["demo", "--set=run.folder=HOME", "--set=run.name=mine"],
    "export": ["export", "RUN", "HOME/out"],
    "ask": ["ask", "RUN", "What?"],
    "eval": ["eval", "RUN"],
    "isolator": ["train", "digits", "--set=run.folder=HOME/more", "--set=dualspeed.isolator_from=RUN"],
}


@pytest.mark.parametrize("name", NAMES)
def test_no_link_in_a_runs_folder_leads_out_of_it(run, tmp_path, capsys, name):
    secret = tmp_path / "secret"
    secret.write_text(RUN)
    plant(run, name, secret)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    for words in COMMANDS.values():
        words = [word.replace("HOME", str(tmp_path)).replace("RUN", str(run)) for word in words]
        assert cli.main(words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name} is a link out of its run, to {secret.resolve()}" in line, (words, line)
    assert secret.read_text() == RUN
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "record.json", "base/config.json", f"{STEP}/state.json"])
def test_no_pipe_in_a_runs_folder_is_waited_for(run, tmp_path, capsys, name, kind):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    SPECIAL[kind](run / name)
    for words in COMMANDS.values():
        assert cli.main([word.replace("HOME", str(tmp_path)).replace("RUN", str(run)) for word in words]) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name} is a pipe or a device" in line, (words, line)


def test_a_comparison_follows_no_link_either(tmp_path, capsys):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    plant(tmp_path / "c-compare", "seed-0/full/result.json", secret)
    assert cli.main(["compare", f"--set=run.folder={tmp_path}", "--set=run.name=c"]) == 2
    assert "result.json is a link out" in capsys.readouterr().err
    assert secret.read_text() == "mine"


def test_a_lock_is_neither_emptied_nor_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").symlink_to("mine")
    with pytest.raises(OSError, match=r"\.lock"), checkpoint.only_one(tmp_path):
        pass
    (tmp_path / ".lock").unlink()
    (tmp_path / "mine").rename(tmp_path / ".lock")
    with checkpoint.only_one(tmp_path):
        assert (tmp_path / ".lock").read_text() == "mine"


def test_links_within_a_run_and_the_run_as_a_link_stay(run):
    (run / STEP).mkdir(parents=True)
    (run / "best").symlink_to(STEP)
    (run / "gone").symlink_to("nowhere")
    paths.require_plain(run, own=True)
    assert recipe.of_run(str(run)).folder == run.resolve()


KINDS = ("file", "folder", "pipe", "inside", "outside", "sibling", "gone", "loop")


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(KINDS)), max_size=6))
def test_a_folder_is_plain_if_every_entry_is_a_file_a_folder_or_a_link_within(tmp_path_factory, entries):
    """An oracle: the kinds of entries, which it has made itself."""
    home = tmp_path_factory.mktemp("home")
    run = home / "run"
    run.mkdir()
    (home / "run-sibling").mkdir()  # its name begins as the folder's does
    for number, (depth, kind) in enumerate(entries):
        path = run.joinpath(*["in"] * depth, str(number))
        path.parent.mkdir(parents=True, exist_ok=True)
        target = {
            "inside": run, "outside": home, "sibling": home / "run-sibling", "gone": home / "no", "loop": path.name
        }  # fmt: skip
        if kind in target:
            path.symlink_to(target[kind])
        else:
            {"file": Path.touch, "folder": Path.mkdir, "pipe": os.mkfifo}[kind](path)
    kinds = {kind for _, kind in entries}
    for own, bad in ((True, {"pipe", "outside", "sibling", "gone"}), (False, {"pipe"})):
        try:
            paths.require_plain(run, own=own)
            refused = False
        except UserError:
            refused = True
        assert refused == bool(kinds & bad), (own, kinds)


def test_what_a_run_begins_with_is_not_followed(run, tmp_path):
    """Also where the command line is not what asks."""
    plant(run, "metrics.jsonl", tmp_path / "secret")
    made = recipe.read("digits", [f"run.folder={tmp_path}", "run.name=mine"])
    with pytest.raises(UserError, match=r"metrics\.jsonl is a link out"):
        train.train(made, bar=False)
    assert not (tmp_path / "secret").exists()
