"""Rooms import in one order, what is installed is all of it, and tests import no other test and read no clock."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
METHOD = {"scheduler", "adaptive", "rows", "isolator", "distill", "sts", "regate"}
# A file imports from its own room and from those before it.
ROOMS = (
    {"util"}, {"pruning", *METHOD}, {"recipe"}, {"models"}, {"dualspeed"}, {"data"}, {"training"}, {"evaluation"},
    {"bench"}, {"cli"}, {"scale"},
)  # fmt: skip
PLACE = {name: place for place, names in enumerate(ROOMS) for name in names}
CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time"}


def files(*folders: str) -> dict[Path, ast.Module]:
    """Every Python file in these folders, parsed."""
    found = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    return {file.relative_to(ROOT): ast.parse(file.read_text(encoding="utf-8")) for file in found}


def room(module: str) -> str:
    """The room of a module: `tinyspeed.util.files` is in util, `tinyspeed.rows` in rows, `scale.ranks` in scale."""
    package, _, inside = module.partition(".")
    return inside.partition(".")[0] if package == "tinyspeed" else package


def imported(file: Path, tree: ast.AST) -> Iterator[str]:
    """The modules of this project that a file imports, anywhere in it; what is there for type checkers alone is not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = file.parts[:-1][: len(file.parts) - node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            names = [f"{module}.{alias.name}" for alias in node.names] if module in ("tinyspeed", "scale") else [module]
        else:
            yield from imported(file, node)
            continue
        yield from (name for name in names if name.partition(".")[0] in ("tinyspeed", "scale"))


def test_a_room_imports_only_from_those_before_it():
    for file, tree in files("tinyspeed", "scale").items():
        mine = room(".".join(file.with_suffix("").parts))
        if mine in ("__init__", "__main__"):  # of tinyspeed itself
            continue
        for module in imported(file, tree):
            place = PLACE.get(room(module), PLACE["cli"])  # what is no room is exported by `tinyspeed`
            assert place <= PLACE[mine] or module == "tinyspeed.__version__", f"{file} imports {module}"


def test_every_file_opens_with_its_idea():
    for file, tree in files("tinyspeed", "scale").items():
        if tree.body and file.name != "__main__.py":  # most rooms have nothing in their __init__.py
            assert len(ast.get_docstring(tree) or "") > 40, file


def test_what_is_installed_is_all_of_it():
    said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(said) == sorted({".".join(file.parts[:-1]) for file in files("tinyspeed", "scale")})


def test_no_file_is_read_that_may_be_a_pipe():
    """Opening a pipe waits for ever, so what reads says how files are opened, or has asked `is_file` before."""
    for file, tree in files("tinyspeed", "scale").items():
        text = (ROOT / file).read_text(encoding="utf-8")
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, given = ast.unparse(call.func), ast.unparse(call)
            if name == "open":
                assert "opener=" in given or "'w'" in given or name == "Image.open", f"{file}: {given}"
            assert not name.endswith(".read_bytes"), f"{file}: {given}: files.read refuses pipes"
            if name.endswith(".read_text") and "is_file()" not in text:
                known = {"compare.md", "config.json", "/proc/"}  # of the same process, looked at before, the system
                assert any(word in given for word in known), f"{file}: {given}"


def test_no_test_imports_another_test():
    for file, tree in files("tests").items():
        names = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in names if "test_" in name or name.split(".")[-1] == "conftest"], file


def test_no_test_reads_a_clock():
    """Waiting is for tests/support, and measuring for benchmarks: what a busy machine does must decide no test."""
    for file, tree in files("tests").items():
        if file.name.startswith("test_"):
            calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
            assert not [call for call in calls if call in {*CLOCKS, *(f"time.{name}" for name in CLOCKS)}], file
