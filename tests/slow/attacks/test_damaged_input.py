"""The short form of `broken`: some hundred cases of every part, and the torture's own teeth."""

import os
import time
from pathlib import Path

import pytest
from slow.attacks.damaged_input import cases, commands, file_access, models, pictures, recipes, records

from tinyspeed import UserError
from tinyspeed.util import files

PARTS = {
    "records": (records, 130), "recipes": (recipes, 400), "pictures": (pictures, 200), "models": (models, 8),
    "wrecks": (wrecks, 8), "commands": (commands, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_broken_input_works_as_meant_or_is_refused_by_name(name, tmp_path):
    part, count = PARTS[name]
    tally = cases.Tally()
    cases.run(name, part, tmp_path, range(count), 0, tally)
    assert not tally.lost, "\n".join(tally.lost)
    ends = {how for _, how in tally.seen}
    assert ends == {"worked", "refused"}, "a torture that only sees one end has no teeth"


def refuse(message: str):
    raise UserError(message)


@pytest.mark.parametrize(
    ("act", "wrong"),
    [
        (lambda: None, ""),
        (lambda: refuse("a.json: record 3"), ""),
        (lambda: refuse("record 3"), "without saying ['a.json']"),
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: time.sleep(9), "still not done"),
        (lambda: os.read(os.pipe()[0], 1), "still not done"),
        (
            lambda: Path("/etc/hostname").exists() and open("/etc/hostname").close(),
            "also touched: [\"open '/etc/hostname'",
        ),
        (lambda: os.system("true"), 'also touched: ["os.system'),
    ],
)
def test_what_is_amiss_is_seen(act, wrong):
    case = cases.Case("", act, names=("a.json",), seconds=0.3)
    assert wrong in cases.judge(case)[1]
    assert bool(wrong) == bool(cases.judge(case)[1])


def test_a_case_that_must_be_refused_may_not_work():
    assert cases.judge(cases.Case("", lambda: None, must="refuse"))[1] == "worked, and should refuse"
    assert cases.judge(cases.Case("", lambda: None, must="work"))[1] == ""


def test_a_link_is_where_it_leads(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    with file_access.only([tmp_path / "in"]) as touched:
        (tmp_path / "in" / "mine").write_text("x")
    assert not touched
    with file_access.only([tmp_path / "in"]) as touched:
        (tmp_path / "in" / "link").read_text()
    assert touched


def test_a_folder_may_be_flushed_for_what_is_in_it_and_not_listed(tmp_path):
    (tmp_path / "beside").write_text("x")
    with file_access.only([tmp_path / "mine"]) as touched:
        files.flush(tmp_path)
        assert not touched
        list(tmp_path.iterdir())
        (tmp_path / "beside").read_text()
    assert [line.partition(" ")[0] for line in touched] == ["os.listdir", "open"]
