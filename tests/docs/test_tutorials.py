"""The course as it is committed: executed from top to bottom, and true about the project around it. `make tutorials` is
what executes it again."""

import re
from pathlib import Path

import nbformat
import pytest

from tinyspeed import cli

ROOT = Path(__file__).parents[2]
COURSE = ROOT / "tutorials"
CHAPTERS = sorted(COURSE.glob("[0-9]*.ipynb"))
PAGES = [*CHAPTERS, COURSE / "README.md", COURSE / "results" / "ablations.md"]


def read(file: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    return notebook


def prose(file: Path) -> str:
    if file.suffix == ".md":
        return file.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in read(file).cells if cell.cell_type == "markdown")


def code(file: Path) -> str:
    return "\n\n".join(cell.source for cell in read(file).cells if cell.cell_type == "code")


def printed(file: Path) -> str:
    outputs = [output for cell in read(file).cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def numbers(text: str) -> set[str]:
    """1,234 and 1_234 are 1234; the 1.5 of LLaVA-1.5 and a 7B are names."""
    found = re.findall(r"(?<![\w.\-])\d(?:[\d,_]*\d)?(?:\.\d+)?(?![\dB])", text)
    return {re.sub("[,_]", "", number) for number in found}


def anchors(file: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(file), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_chapters_are_numbered_and_the_index_has_them_all():
    assert [int(file.stem.split("-")[0]) for file in CHAPTERS] == list(range(1, len(CHAPTERS) + 1))
    index = (COURSE / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d[^)]*\.ipynb)\)", index) == [file.name for file in CHAPTERS]
    for file in CHAPTERS:
        title = prose(file).split("\n")[0].removeprefix("# ")
        assert title.split(". ")[0] == file.stem.split("-")[0]
        assert title.split(". ", 1)[1].split(":")[0].split(",")[0] in index


@pytest.mark.parametrize("file", CHAPTERS, ids=lambda file: file.stem)
def test_every_cell_was_executed_in_order_and_none_failed(file):
    cells = [cell for cell in read(file).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "assert " in code(file)


@pytest.mark.parametrize("file", CHAPTERS, ids=lambda file: file.stem)
def test_numbers_in_prose_come_from_a_cell(file):
    text = re.sub(r"^```.*?^```$", "", prose(file), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\]\([^)]*\)|`[^`]*`", "", text)  # where links lead, and code
    text = re.sub(r"^#* ?\d+\. |[Cc]hapters? \d(?: and \d)?|[Ee]xercise \d|\[\d\]", "", text, flags=re.MULTILINE)
    known = numbers(code(file)) | numbers(printed(file))
    assert not numbers(text) - known


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_links_lead_somewhere(file):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", prose(file)):
        there = (file.parent / target).resolve() if target else file
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.stem)
def test_commands_exist(file, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    known = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, flags=re.MULTILINE))
    shells = [*re.findall(r"^```sh\n(.*?)^```", prose(file), flags=re.DOTALL | re.MULTILINE)]
    shells += re.findall(r"`([^`\n]+)`", prose(file))
    if file.suffix == ".ipynb":
        shells += re.findall(r"^\$ (.*)$", printed(file), flags=re.MULTILINE)
    commands = [line.removeprefix(".venv/bin/").split() for shell in shells for line in shell.splitlines()]
    assert {words[1] for words in commands if words[:1] == ["tinyspeed"] and words[1:]} <= known
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {words[1] for words in commands if words[:1] == ["make"]} <= targets


@pytest.mark.parametrize("file", CHAPTERS, ids=lambda file: file.stem)
def test_nothing_of_the_machine_is_kept(file):
    assert not re.search(
        r"/(home|root|tmp|usr|opt|var|Users|mnt|work)/|0x[0-9a-f]{6}", prose(file) + code(file) + printed(file)
    )
    assert all(not cell.metadata for cell in read(file).cells)
