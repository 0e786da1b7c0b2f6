"""A result says which commit it was made with."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tinyspeed.util import provenance

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_is_the_one_of_the_checkout():
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert provenance.commit().rstrip("+") == found.stdout.strip()


def test_the_program_is_every_file_of_the_source_wherever_it_is(tmp_path, monkeypatch):
    here = provenance.program()
    for package in ("tinyspeed", "scale"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "tinyspeed" / "util" / "provenance.py"))
    assert provenance.program() == here
    for file in ("tinyspeed/rows.py", "scale/loop.py", "tinyspeed/pruning/dpp.py"):
        with open(tmp_path / file, "a") as opened:
            opened.write("\n")
        now = provenance.program()
        assert {name for name in now if now[name] != here.get(name)} == {file}
        here = now
    (tmp_path / "tinyspeed" / "new.py").touch()
    assert provenance.program().keys() - here.keys() == {"tinyspeed/new.py"}
    monkeypatch.setattr(provenance, "version", lambda package: f"0 of {package}")
    assert provenance.program()["torch"] != here["torch"]
