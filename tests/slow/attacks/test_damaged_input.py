"""The short form of `damaged_input`: some cases of every part. And the attack itself finds what is wrong."""

import importlib.metadata
import os
import time
from pathlib import Path

import pytest
from slow.attacks.damaged_input import cases, commands, file_access, models, pictures, recipes, records, run_folders

from tinyspeed import UserError
from tinyspeed.util import files

PARTS = {
    "records": (records, 130), "recipes": (recipes, 400), "pictures": (pictures, 200), "models": (models, 10),
    "run_folders": (run_folders, 8), "commands": (commands, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_damaged_input_works_as_meant_or_is_refused_by_name(name, tmp_path):
    part, count = PARTS[name]
    tally = cases.Tally()
    cases.run_cases(name, part, tmp_path, range(count), 0, tally)
    assert not tally.failures, "\n".join(tally.failures)
    ends = {how for _, how in tally.seen}
    assert ends == {"worked", "refused"}, "cases that all end alike show nothing"


def refuse(message: str):
    raise UserError(message)


def read(path: str):
    if Path(path).exists():
        open(path).close()


def compute():
    while True:
        pass


@pytest.mark.parametrize(
    ("act", "wrong", "limits"),
    [
        (lambda: None, "", {}),
        (lambda: refuse("a.json: record 3"), "", {}),
        (lambda: refuse("record 3"), "without saying ['a.json']", {}),
        (lambda: 1 / 0, "ZeroDivisionError", {}),
        (lambda: read("/etc/hostname"), "also touched: [\"open '/etc/hostname'", {}),
        (lambda: os.system("true"), 'also touched: ["os.system', {}),
        (lambda: time.sleep(900), "still not done", {"waits": 0.3}),
        (lambda: os.read(os.pipe()[0], 1), "still not done", {"waits": 0.3}),
        (compute, "still not done", {"seconds": 0.3}),
    ],
)
def test_what_is_wrong_is_found(act, wrong, limits):
    case = cases.Case("", act, names=("a.json",), **limits)
    assert wrong in cases.run_case(case)[1]
    assert bool(wrong) == bool(cases.run_case(case)[1])


def test_a_case_that_must_be_refused_may_not_work():
    assert cases.run_case(cases.Case("", lambda: None, must="refuse"))[1] == "worked, but should refuse"
    assert cases.run_case(cases.Case("", lambda: None, must="work"))[1] == ""


def test_a_link_is_where_it_leads(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    with file_access.allowing([tmp_path / "in"]) as touched:
        (tmp_path / "in" / "mine").write_text("x")
    assert not touched
    with file_access.allowing([tmp_path / "in"]) as touched:
        (tmp_path / "in" / "link").read_text()
    assert touched


def test_the_code_and_what_its_installation_says_may_be_read():
    with file_access.allowing([]) as touched:
        assert importlib.metadata.version("tinyspeed")
        assert importlib.metadata.files("tinyspeed")
        assert Path(__file__).read_text()
    assert not touched


def test_the_folder_of_an_allowed_file_may_be_flushed_and_not_listed(tmp_path):
    (tmp_path / "beside").write_text("x")
    with file_access.allowing([tmp_path / "mine"]) as touched:
        files.flush(tmp_path)
        assert not touched
        list(tmp_path.iterdir())
        (tmp_path / "beside").read_text()
    assert [line.partition(" ")[0] for line in touched] == ["os.listdir", "open"]
