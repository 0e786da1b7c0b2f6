"""Real processes that export to one folder at once, and one that is killed while it exports.

The oracle is an export that nobody disturbed. Two processes stand ready and begin at the same word, again and again.
"""

import subprocess

import pytest
from support import digits_runs
from support.digits_runs import small_base
from support.runs import content_of, finish, run_cli, run_python
from support.waiting import HANGS, until

from tinyspeed import recipe
from tinyspeed.training import train, trained_model

ROUNDS = 40
# Exports the run to each folder that it is told, and says how that ended.
EXPORTS = """
import sys
from pathlib import Path
from tinyspeed import UserError, recipe
from tinyspeed.training import trained_model
run = recipe.of_run(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    try:
        trained_model.export(run, Path(line.strip()))
        print("done", flush=True)
    except UserError as error:
        print(error, flush=True)
"""
# Stands still when the weights are written and the folder has not got its name yet.
STANDS = """
import sys, time
from pathlib import Path
from tinyspeed import cli
from tinyspeed.training import trained_model
def stand(folder):
    Path(sys.argv[3]).touch()
    while True:
        time.sleep(0.01)
trained_model._make_readable = stand
sys.exit(cli.main(["export", *sys.argv[1:3]]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    made = digits_runs.settings(small_base(home / "base"), home, "run")
    train.train(made, bar=False)
    return made


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    trained_model.export(recipe.of_run(str(made.folder)), out)
    return contents(out)


def contents(folder) -> dict:
    return {path.name: content_of(path.name, path.read_bytes()) for path in folder.iterdir()}


def test_of_two_exports_at_once_one_is_whole_and_the_other_is_told(made, whole, tmp_path):
    pair = [run_python(EXPORTS, made.folder, folder=tmp_path, stdin=subprocess.PIPE) for _ in range(2)]
    assert [process.stdout.readline() for process in pair] == ["ready\n"] * 2
    for number in range(ROUNDS):
        out = tmp_path / f"out-{number}"
        for process in pair:
            process.stdin.write(f"{out}\n")
            process.stdin.flush()
        said = sorted(process.stdout.readline().strip() for process in pair)
        assert contents(out) == whole, said
        assert said.count("done") == 1, said
        (other,) = (line for line in said if line != "done")
        assert other.startswith((f"another process is writing {out}; ", f"{out} exists already"))
    for process in pair:
        process.stdin.close()
        assert process.wait(HANGS) == 0
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_export_leaves_is_swept_by_the_next_one(made, whole, tmp_path):
    out, there = tmp_path / "out", tmp_path / "there"
    first = run_python(STANDS, made.folder, out, there, folder=tmp_path)
    until(there.exists, "it has written the weights", first)
    second = run_cli("export", made.folder, out, folder=tmp_path)
    said = second.communicate(timeout=HANGS)[1]
    assert second.returncode == 2
    (line,) = [line for line in said.splitlines() if line.startswith("tinyspeed: ")]
    assert f"another process is writing {out}" in line
    first.kill()
    first.communicate()
    assert not out.exists()
    assert (tmp_path / ".out.tmp").is_dir()
    finish(run_cli("export", made.folder, out, folder=tmp_path))
    assert contents(out) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "there"]
