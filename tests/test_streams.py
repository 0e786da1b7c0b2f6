"""Standard streams that are closed, not read, or cannot show a character; a working directory that is gone; names that
are not UTF-8. A command that has done its work exits with 0, and a mistake is one line."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import fails

from tinyspeed import cli, recipe
from tinyspeed.evaluation.demo import draw_example
from tinyspeed.training import run_folder

ROOT = Path(__file__).parents[1]
GONE = "the working directory has been deleted"
not_utf8 = pytest.mark.skipif(sys.platform != "linux", reason="other systems want names in UTF-8")
LATIN = os.fsdecode(b"caf\xe9")  # a name that is not UTF-8, as Python lists it


def unread() -> io.TextIOWrapper:
    """A stream into a pipe whose reader has ended, as `head` does when it has seen enough."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w", buffering=1)  # line by line, as standard error is


@pytest.mark.parametrize("stream", [unread, lambda: os.fdopen(os.open(os.devnull, os.O_RDONLY), "w"), lambda: None])
def test_a_command_whose_output_nobody_reads_does_its_work(capsys, monkeypatch, tmp_path, stream):
    """Into a pipe without reader, into what cannot be written, into nothing (`>&-`)."""
    picture, out = draw_example(tmp_path / "p.png", 0), tmp_path / "o.png"
    where = stream()
    monkeypatch.setattr(sys, "stdout", where)
    assert cli.main(["look", "--plugin=grid", str(picture), "--out", str(out)]) == 0
    assert cli.main(["estimate", "digits"]) == 0
    if where:
        where.close()  # as Python does at its end
    monkeypatch.undo()
    assert out.stat().st_size > 10_000
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stream", [unread, lambda: None])
def test_a_mistake_of_which_nobody_reads_is_still_one(capsys, monkeypatch, stream):
    where = stream()
    monkeypatch.setattr(sys, "stderr", where)
    assert cli.main(["estimate", "absent.toml"]) == 2
    if where:
        where.close()


def test_output_goes_on_silently_when_its_reader_ends_in_the_middle(monkeypatch):
    """A run prints more lines later, and must not end because of the first one that is lost."""
    stream = cli.SafeStream(unread(), needed=True)
    for n in range(3):
        print(n, file=stream, flush=True)
    assert os.fstat(stream.fileno()).st_rdev == os.stat(os.devnull).st_rdev
    stream.close()


def test_no_file_gets_the_number_of_a_closed_standard_stream(tmp_path):
    """Or what a library prints would land in it. In a process of its own: the streams are closed when Python starts."""
    see = "import os, sys; from tinyspeed import cli; code = cli.main(['estimate', 'absent'])\n"
    see += "made = open(sys.argv[1], 'w'); made.write(f'{code} {made.fileno() > 2}')"
    words = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", see, str(tmp_path / "seen")]
    assert subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
    assert (tmp_path / "seen").read_text() == "2 True"


@not_utf8
def test_a_terminal_without_the_characters_shows_their_numbers(monkeypatch, tmp_path, capsys):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    out = tmp_path / f"café {LATIN}.png"
    assert cli.main(["look", "--plugin=grid", str(draw_example(tmp_path / "p.png", 0)), "--out", str(out)]) == 0
    assert out.is_file()
    assert rb"caf\xe9 caf\udce9.png: " in shown.buffer.getvalue()


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    yield
    monkeypatch.undo()


@pytest.mark.parametrize(
    "words",
    [
        ["ask", "org/model", "a.png", "What?"], ["train", "digits"], ["estimate", "digits"], ["eval", "run"],
        ["export", "run", "out"], ["look", "a.png"], ["demo"], ["compare"], ["bench", "savings"],
    ],
)  # fmt: skip
def test_a_working_directory_that_is_gone_is_said_to_be(capsys, nowhere, words):
    assert GONE in fails(capsys, *words)


# Names


@not_utf8
def test_a_folder_of_pictures_or_a_model_whose_name_is_not_utf8_is_one_line(capsys, tmp_path):
    for key in ("run.name", "data.images", "data.file", "model.path", "run.folder"):
        said = fails(capsys, "train", "digits", "--set", f"run.folder={tmp_path}", "--set", f"{key}={LATIN}")
        assert key in said
        assert r"\udce9" in said
    (tmp_path / LATIN).mkdir()
    assert r"caf\udce9" in fails(capsys, "export", tmp_path / LATIN, tmp_path / "out")
    assert r"caf\udce9" in fails(capsys, "ask", tmp_path / LATIN, "What?")
    assert "absent" in fails(capsys, "ask", tmp_path / "absent", tmp_path / LATIN, "What?")


@not_utf8
def test_a_picture_whose_name_is_not_utf8_is_drawn(capsys, tmp_path):
    """The name is in the title of the drawing, too."""
    picture = draw_example(tmp_path / f"{LATIN}.png", 0)
    (listed,) = os.listdir(tmp_path)
    assert cli.main(["look", "--plugin=grid", str(tmp_path / listed), "--out", str(tmp_path / "o.png")]) == 0
    assert (tmp_path / "o.png").stat().st_size > 10_000
    assert "is the picture itself" in fails(capsys, "look", picture, "--out", picture)


@not_utf8
def test_a_recipe_that_cannot_hold_where_its_data_is_says_so(capsys, tmp_path, monkeypatch):
    """A relative path becomes absolute, and here the working directory is not UTF-8, as a recipe must be."""
    (tmp_path / LATIN).mkdir()
    monkeypatch.chdir(tmp_path / LATIN)
    (tmp_path / LATIN / "base").mkdir()
    (tmp_path / LATIN / "base" / "config.json").write_text("{}")
    said = fails(capsys, "train", "digits", "--set", "model.path=base", "--set", f"run.folder={tmp_path}")
    assert r"caf\udce9/base" in said
    assert "rename it" in said
    assert sorted(os.listdir(tmp_path)) == [LATIN]


def test_names_that_a_locale_cannot_write_are_one_line(capsys, tmp_path, monkeypatch):
    """Under LC_ALL=C, Python cannot open a file whose name is not ASCII."""
    made = recipe.read("digits", [f"run.folder={tmp_path}", "run.name=café"])

    def ascii_only(*arguments):
        "café".encode("ascii")

    monkeypatch.setattr(run_folder, "require_free_or_resumable", ascii_only)
    words = [f"--set=run.{key}={getattr(made.run, key)}" for key in ("folder", "name")]
    assert "'café': rename it, or set LC_ALL=C.UTF-8" in fails(capsys, "train", "digits", *words)


def test_a_file_name_with_a_line_break_is_one_line(capsys, tmp_path):
    (tmp_path / "a\nb.toml").mkdir()
    for words in (["train", tmp_path / "a\nb.toml"], ["look", tmp_path / "a\nb.toml"]):
        assert r"a\nb" in fails(capsys, *words)
    assert r"a\nb" in cli.message_of(PermissionError(13, "Permission denied", "a\nb"))
