"""The README and the guide tell the truth about the project around them. What their commands and their Python do is
executed in `tests/slow/docs`."""

import dataclasses
import json
import re
import shlex
import subprocess
import tomllib

import pytest
from support import pages
from support.pages import GUIDE, PAGES, README, ROOT

from tinyspeed import cli, recipe
from tinyspeed.evaluation import compare
from tinyspeed.recipe import comparison
from tutorials import options

RESULTS = ROOT / "tutorials" / "results"
COMPARISON = RESULTS / "comparison.md"
PACKAGE = ROOT / "tinyspeed"
EVERY_PAGE = [*PAGES, *sorted(RESULTS.glob("*.md"))]
COMMANDS = [(page, command) for page in PAGES for command in pages.commands(page)]


def name(of) -> str:
    return of.stem if hasattr(of, "stem") else str(of)


def test_the_readme_is_short():
    assert len(pages.read(README).splitlines()) <= 200


def test_the_readme_leads_to_every_page_of_the_guide():
    linked = {(ROOT / target).resolve() for target, _ in pages.targets(README)}
    assert {*GUIDE, *RESULTS.glob("*.md")} <= linked


@pytest.mark.parametrize("page", EVERY_PAGE, ids=name)
def test_links_lead_somewhere(page):
    for target, anchor in pages.targets(page):
        there = (page.parent / target.replace("\\", "")).resolve() if target else page
        assert there.exists(), target
        assert not anchor or anchor in pages.anchors(there), f"{target}#{anchor}"


def test_the_page_of_options_is_what_the_dataclasses_say():
    assert pages.read(options.PAGE) == options.page(), "run `make options`"


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "your-own-loop"], ids=name)
def test_keys_exist(page):  # in a loop of one's own, `model.step` is an attribute
    sections = {section.name: section.type for section in dataclasses.fields(recipe.Recipe)}
    for section, key in re.findall(r"`(?:--set )?(\w+)\.(\w+)(?: ?= ?[^`]*)?`", pages.read(page)):
        if section in sections and key != "py":
            assert key in {field.name for field in dataclasses.fields(sections[section])}, f"{section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_compiles(page):
    for block in pages.blocks(page, "python"):
        assert compile(block, str(page), "exec").co_names, "a block that names nothing shows nothing"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_toml_is_a_recipe_or_a_file_of_arms(page, tmp_path):
    for block in pages.blocks(page, "toml"):
        (tmp_path / "my.toml").write_text(block, encoding="utf-8")
        if "data" in tomllib.loads(block):
            assert recipe.read(str(tmp_path / "my.toml")).stages()
        else:
            assert "full" in comparison.read(recipe.read("digits"), str(tmp_path / "my.toml"))


def test_json_is_the_same_record_everywhere():
    found = [json.loads(block) for page in PAGES for block in pages.blocks(page, "json")]
    assert len(found) == 2
    assert found[0] == found[1]


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=name)
def test_a_command_is_one_that_the_program_knows(page, command):
    program, *words = shlex.split(command)
    if program == "tinyspeed":
        known = cli._parser().parse_args(words)
        for one in getattr(known, "recipes", [getattr(known, "recipe", None)]):
            if one not in (None, "my.toml"):
                recipe.read(one, known.set)
    elif program == "make":
        subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        assert set(re.findall(r"\[(\w+)\]", command)) <= set(extras)
    elif program.startswith("scale/"):
        assert (ROOT / program).is_file()
        assert recipe.read(words[0]).stages()
    else:
        assert program == "lmms-eval"
    assert program in ("tinyspeed", "make") or pages.commands(page)[command], "nobody executes it: mark it"


def test_the_page_of_commands_has_them_all(capsys):
    page = pages.read(ROOT / "tutorials" / "guide" / "commands.md")
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    known = re.findall(r"^    (\w+) ", capsys.readouterr().out, flags=re.MULTILINE)
    assert set(re.findall(r"^\| `tinyspeed (\w+)", page, flags=re.MULTILINE)) == set(known)
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)[1]
    assert set(re.findall(r"^make ([\w-]+)", page, flags=re.MULTILINE)) == set(targets.split())


def test_the_comparison_is_what_was_measured():
    runs = json.loads((RESULTS / "compare-digits.json").read_text(encoding="utf-8"))["runs"]
    table = compare.summary(runs)
    assert f"\n\n{table}\n\n" in pages.read(COMPARISON)
    assert list(dict.fromkeys(run["arm"] for run in runs)) == list(comparison.read(recipe.read("digits"), "paper"))
    headers, *measured = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    shown = pages.read(README).split("## What was measured")[1].split("![")[0]
    names, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line.startswith("|")
    ]
    assert [row[0] for row in rows] == ["full", "pruned-only", "dualspeed", "original r=0.02"]
    for row in rows:
        cells = dict(zip(headers, next(found for found in measured if found[0] == row[0]), strict=True))
        assert [cells[header] for header in names[2:]] == row[2:]


def test_the_readme_says_what_the_benchmark_of_a_step_measured():
    step = json.loads((RESULTS / "bench-step.json").read_text(encoding="utf-8"))["texts"]["128"]["contestants"]
    ours, plain = (step[contestant]["speedup"] for contestant in ("DualSpeed, r = 0.1", "hf, nothing recomputed"))
    said = re.sub(r"\s+", " ", pages.read(README))
    assert f"{ours:.2f}x as fast as transformers' own" in said
    assert f"{ours / plain:.1f}x as fast as one that recomputes nothing" in said


def test_the_six_files_are_as_long_as_the_readme_says():
    rows = re.findall(r"^\| \[\w+\.py\]\((\S+)\) \| (\d+) \|", pages.read(README), flags=re.MULTILINE)
    assert len(rows) == 6
    for file, lines in rows:
        assert abs(len((ROOT / file).read_text(encoding="utf-8").splitlines()) - int(lines)) <= 15, file


def test_the_readme_names_every_room():
    rooms = {folder.name for folder in PACKAGE.iterdir() if folder.is_dir() and not folder.name.startswith("__")}
    said = pages.read(README).split("## The rooms")[1].split("\n## ")[0]
    assert rooms <= set(re.findall(r"`(\w+)`", said))
