"""Every chapter of the course runs in its short form, and what executes chapters does what it says."""

import os
import re
from pathlib import Path

import nbformat
import pytest

from tutorials import run


@pytest.mark.parametrize("chapter", run.chapters([]), ids=lambda file: file.stem)
def test_a_chapter_runs_from_top_to_bottom(chapter):
    made = run.execute(chapter, short=True)
    assert all(cell.execution_count for cell in made.cells if cell.cell_type == "code" and cell.source.strip())


def write(file: Path, *cells: str) -> None:
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), file)


def test_a_chapter_is_executed_where_it_is_and_keeps_what_it_printed(tmp_path):
    noisy = "import os, sys, time\nprint('one', flush=True)\nprint('bar', file=sys.stderr, flush=True)\ntime.sleep(0.1)"
    write(tmp_path / "1-a.ipynb", f"{noisy}\nprint('two')\nprint(os.path.exists('here'))", "print(os.getpid())")
    (tmp_path / "here").touch()
    made = run.execute(tmp_path / "1-a.ipynb")
    assert [(output.name, output.text) for output in made.cells[0].outputs] == [("stdout", "one\ntwo\nTrue\n")]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["1-a.ipynb", "here"]
    with pytest.raises(ProcessLookupError):  # the kernel is gone
        os.kill(int(made.cells[1].outputs[0].text), 0)


def test_a_chapter_whose_claim_does_not_hold_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setenv("SHORT", "1")  # is not what was asked for
    write(tmp_path / "1-a.ipynb", "import os\nloss = int(os.environ.get('SHORT', 3))", "assert loss < 2")
    before = (tmp_path / "1-a.ipynb").read_text()
    assert run.main(["1", "--keep"]) == 1
    said = capsys.readouterr().out
    assert "1-a.ipynb: FAILED" in said
    assert "assert loss < 2" in said
    assert "\x1b" not in said
    assert (tmp_path / "1-a.ipynb").read_text() == before
    assert run.main(["--short"]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_a_bar_counts_the_cells(tmp_path, capsys):
    write(tmp_path / "1-a.ipynb", "a = 1", "a + 1", "a + 2")
    run.execute(tmp_path / "1-a.ipynb")
    counts = re.findall(r"1-a\.ipynb: .* (\d)/3 ", capsys.readouterr().err.replace("\r", "\n"))
    assert list(dict.fromkeys(counts)) == ["0", "1", "2", "3"]


def test_what_is_kept_is_the_long_form(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    write(tmp_path / "1-a.ipynb", "print(1 + 1)")
    assert run.main(["--keep"]) == 0
    (cell,) = nbformat.read(tmp_path / "1-a.ipynb", as_version=4).cells
    assert [output.text for output in cell.outputs] == ["2\n"]
    with pytest.raises(SystemExit, match="2"):
        run.main(["--short", "--keep"])


def test_chapters_that_do_not_exist_are_not_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    write(tmp_path / "1-a.ipynb")
    with pytest.raises(SystemExit, match="no chapter 2; there are 1"):
        run.main(["1", "2"])
