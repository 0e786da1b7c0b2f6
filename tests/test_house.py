"""The house keeps its rules: imports go down, rooms stay small, and the README tells the truth about both."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from tinyspeed import cli, recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tinyspeed"
FLOORS = [
    {"errors"},
    {"pruning", "isolator", "scheduler", "distill", "rows", "finite"},
    {"attention", "drop_in", "layers", "gating", "adaptive"},
    {"vlm"},
    {"signals"},
    {"choosing"},
    {"dualspeed"},
    {"data", "batching", "precision", "memory", "disk", "folders", "shapes", "sts", "heap"},
    {"checkpoint"},
    {"loading", "loader", "images", "callback", "labels"},
    {"records", "recipe", "record", "report", "merge"},
    {"optimizer", "chat", "runs", "digits", "schedules", "reference", "ablations"},
    {"conversations", "questions", "vqa", "features", "regate", "blame"},
    {"evaluate", "stage"},
    {"train", "look"},
    {"compare", "demo", "ask", "benchmarks", "estimate"},
    {"lengths"},
    {"bench"},
    {"cli"},
]
SCALE_FLOORS = [  # above all of those
    {"dealing", "fleet", "model", "meeting"},
    {"world", "simulate", "plan", "measure", "shard"},
    {"stage"},
    {"run"},
]
ROOMS = {  # with floors of their own
    "pruning": [
        {"registry", "cosine"},
        {"attended", "controls", "coverage", "divprune", "dpp", "tome"},
        {"dynamicvit", "pool", "tokenlearner", "visionzip"},
        {"__init__"},
    ],
    "bench": [
        {"__init__", "timing", "bars", "noise", "live", "rivals"},
        {"step", "loss", "growth", "feed", "selection", "savings", "peaks"},
        {"levers"},
        {"commands"},
    ],
}
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
ROOM_FLOOR = {room: {name: i for i, names in enumerate(ROOMS[room]) for name in names} for room in ROOMS}
SCALE_FLOOR = {name: floor for floor, names in enumerate(SCALE_FLOORS) for name in names}
CORE = [name for floor in FLOORS[:7] for name in sorted(floor)]
FILES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("__"))
ROOM_FILES = sorted((room, p.stem) for room in ROOMS for p in (PACKAGE / room).glob("*.py"))
SCALE_FILES = sorted(p.stem for p in (ROOT / "scale").glob("*.py") if not p.stem.startswith("__"))
PATHS = [PACKAGE / f"{name}.py" for name in FILES] + [ROOT / "scale" / f"{name}.py" for name in SCALE_FILES]
PATHS += [PACKAGE / room / f"{name}.py" for room, name in ROOM_FILES]


def imports(file):
    """Modules of this project that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("tinyspeed", "scale"):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in ("tinyspeed", "scale"))


def test_what_is_installed_is_all_of_it():
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    rooms = {file.parent for top in (PACKAGE, ROOT / "scale") for file in top.glob("**/*.py")}
    assert sorted(said) == sorted(".".join(room.relative_to(ROOT).parts) for room in rooms)


def test_every_file_has_a_floor():
    assert {*FILES, *ROOMS} == set(FLOOR)
    assert sorted((room, name) for room in ROOMS for name in ROOM_FLOOR[room]) == ROOM_FILES
    assert set(SCALE_FILES) == set(SCALE_FLOOR)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_from_floors_below_it(name):
    for module in imports(PACKAGE / f"{name}.py"):
        if module in FLOOR:
            assert FLOOR[module] < FLOOR[name], f"{name} imports {module}"
        else:
            assert module == "__version__", f"{name} imports {module}"


@pytest.mark.parametrize(("room", "name"), ROOM_FILES)
def test_a_file_in_a_room_imports_only_from_floors_below_it(room, name):
    floors = ROOM_FLOOR[room]
    for node in ast.walk(ast.parse((PACKAGE / room / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            for module in [node.module] if node.module else [alias.name for alias in node.names]:
                below = FLOOR[module] < FLOOR[room] if node.level == 2 else floors[module] < floors[name]
                assert below, f"{room}.{name} imports {module}"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {module.split(".")[0] for module in modules} & {"tinyspeed", "scale"}, f"{room}.{name}"


@pytest.mark.parametrize("name", SCALE_FILES)
def test_scale_is_the_top_floor(name):
    for module in imports(ROOT / "scale" / f"{name}.py"):
        package, _, of_core = module.partition(".")
        if package == "tinyspeed":
            assert not of_core or of_core.split(".")[0] in FLOOR, f"{name} imports {module}"
        else:
            assert SCALE_FLOOR[module.removeprefix("scale.")] < SCALE_FLOOR[name], f"{name} imports {module}"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_rooms_are_small(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines < (250 if path.stem in CORE or path.parent.name == "pruning" else 400)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_file_opens_with_its_idea(path):
    assert len(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))) > 60


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_names_every_file_and_no_other(readme):
    tree = readme.split("## The house")[1]
    named = set(re.findall(r"^\s+(\w+)\.py\s", tree, flags=re.MULTILINE))
    assert named == {*FILES, *SCALE_FILES, *(name for _, name in ROOM_FILES if name != "__init__")}


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
