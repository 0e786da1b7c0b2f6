"""The README tells the truth: its files, commands, code, recipes and links exist."""

import re
from pathlib import Path

import pytest

from tinyspeed import cli, recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_every_file_and_no_other(readme):
    tree = readme.split("## The house")[1]
    named = set(re.findall(r"^\s+(\w+)\.py\s", tree, flags=re.MULTILINE))
    files = [file for top in ("tinyspeed", "scale") for file in (ROOT / top).rglob("*.py")]
    assert named == {file.stem for file in files if not file.stem.startswith("__")}


def test_the_readmes_commands_exist(readme, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    known = set(re.findall(r"^    (\w+) ", capsys.readouterr().out, flags=re.MULTILINE))
    used = set(re.findall(r"^\.venv/bin/tinyspeed (\w+)", readme, flags=re.MULTILINE))
    assert used
    assert used <= known
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", readme, flags=re.MULTILINE)) <= targets


def test_the_readmes_python_compiles(readme):
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_readmes_recipes_are_recipes(readme, tmp_path):
    blocks = re.findall(r"```toml\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "my.toml").write_text(block, encoding="utf-8")
        made = recipe.read(str(tmp_path / "my.toml"))
        assert (made.data.kind, made.model.quantise) == ("chat", "nf4")
        assert made.stages()


def test_links_inside_the_project_lead_somewhere(readme):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / target).exists(), target
