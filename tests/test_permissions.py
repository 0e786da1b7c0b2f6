"""What a user may not read or write is one line that names it. Root may everything, so there the tests are nobody."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from support import digits_runs, tiny
from support.album import album
from support.runs import fails

from tinyspeed import UserError, cli, recipe
from tinyspeed.data.record_files import RecordFile
from tinyspeed.models import export, loading
from tinyspeed.training import checkpoint
from tinyspeed.util import files

NOBODY = 65534
pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users as on Unix here")


@pytest.fixture(scope="module")
def given():
    """A model, pictures and a file of conversations, in a folder that everybody may enter (not pytest's own)."""
    with tempfile.TemporaryDirectory() as home:
        os.chmod(home, 0o755)
        home = Path(home)
        album(home, 4)
        tiny.checkpoint("llava", home / "llava")
        (home / "digits").mkdir()
        made = digits_runs.settings(str(home / "llava"), home, "run")
        made.folder.mkdir()
        (made.folder / "recipe.toml").write_text(made.to_toml())
        (home / "questions.json").write_text('{"question_id": 1, "image": "p0-0.jpg", "text": "A?", "label": "yes"}\n')
        yield home


@pytest.fixture
def home(given):
    """A copy of these that belongs to nobody, and this process is nobody until the test ends."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(shutil.copytree(given, folder, dirs_exist_ok=True))
        user = os.geteuid()
        if user == 0:
            for path in (home, *home.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
            os.seteuid(NOBODY)
        yield home
        if user == 0:
            os.seteuid(user)
        for path in (home, *home.rglob("*")):
            path.chmod(0o755)


def forbid(path: Path, mode: int = 0) -> Path:
    path.chmod(mode)
    if path.is_file() and mode == 0:
        with pytest.raises(PermissionError):
            path.read_bytes()
    return path


READ = {  # what may not be read: the command that would
    "train.json": lambda home: RecordFile(home / "train.json"),
    "images/p0-0.jpg": lambda home: fails_with("ask", home / "llava", home / "images/p0-0.jpg", "What?"),
    "questions.json": lambda home: fails_with(
        "eval", home / "llava", "--task", "pope", "--questions", home / "questions.json", "--images", home / "images"
    ),
    "run/recipe.toml": lambda home: fails_with("export", home / "run", home / "out"),
    "llava/config.json": lambda home: loading.load_config(str(home / "llava")),
    "llava/tokenizer.json": lambda home: loading.load_processor(str(home / "llava")),
    "llava/model.safetensors": lambda home: loading.load_model(str(home / "llava")),
    "llava/processor_config.json": lambda home: loading.load_processor(str(home / "llava")),
}


def fails_with(*words) -> None:
    """What the command line would print, as an error."""
    try:
        arguments = cli._parser().parse_args([str(word) for word in words])
        arguments.command(arguments)
    except (UserError, OSError) as error:
        raise UserError(cli.message_of(error)) from error


@pytest.mark.parametrize("name", READ)
def test_what_may_not_be_read_is_named(home, name):
    forbid(home / name)
    with pytest.raises(UserError, match=r"(?i)permission denied|cannot|No such file") as found:
        READ[name](home)
    named = (name, Path(name).name, str(home / Path(name).parts[0]))
    assert any(part in str(found.value) for part in named), found.value


def test_a_folder_that_may_not_be_entered_is_named(home, capsys):
    forbid(home / "llava")
    assert "llava" in fails(capsys, "ask", home / "llava", "What?")
    forbid(home / "run")
    assert "run" in fails(capsys, "export", home / "run", home / "out")
    assert "run" in fails(capsys, "train", "digits", "--set", f"run.folder={home}", "--set", "run.name=run")


def test_a_folder_that_may_not_be_written_is_named(home, capsys):
    picture = home / "images" / "p0-0.jpg"
    forbid(home / "digits", 0o555)
    assert f"{home}/digits" in fails(capsys, "look", picture, "--out", home / "digits" / "look.png")
    where = ("--set", f"run.folder={home / 'digits'}", "--set", "run.name=a")
    for command in ("train", "demo", "compare"):
        assert f"{home}/digits/a" in fails(capsys, command, "digits", *where)
    forbid(home / "run", 0o555)
    where = ("--set", f"run.folder={home}", "--set", "run.name=run")
    assert f"{home}/run" in fails(capsys, "train", home / "run" / "recipe.toml", *where)
    assert [path.name for path in (home / "run").iterdir()] == ["recipe.toml"]
    assert not list((home / "digits").iterdir())


def test_an_export_that_may_not_be_written_or_whose_base_may_not_be_read(home):
    forbid(home / "digits", 0o555)
    with pytest.raises(OSError, match=f"{home}/digits"), files.atomic(home / "digits" / "out"):
        pass
    forbid(home / "llava" / "model.safetensors")
    with pytest.raises((UserError, OSError)) as found:
        export.merge({}, 1.0, str(home / "llava"), home / "out")
    assert "model.safetensors" in cli.message_of(found.value)


def test_a_checkpoint_that_may_not_be_read_is_named(home):
    import torch

    path = checkpoint.save(home / "run" / "checkpoints", 1, {"a": torch.zeros(3)}, {}, keep=1)
    for name in (checkpoint.TENSORS, checkpoint.STATE):
        forbid(path / name)
        with pytest.raises(UserError, match=f"{path.name} is damaged .*{name}"):
            checkpoint.read(path)


def test_a_recipe_that_may_not_be_read_is_named(home, capsys):
    (home / "mine.toml").write_text(recipe.read("digits").to_toml())
    forbid(home / "mine.toml")
    assert "mine.toml" in fails(capsys, "estimate", home / "mine.toml")
