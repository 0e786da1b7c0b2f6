"""The arms of a comparison: the recipes that are trained side by side.

A file of arms is TOML. Each table at its top level is an arm, and holds sections of a recipe with its changes:

    [full.dualspeed]
    schedule = "full"

    ["dpp 25 %".dualspeed]
    plugin = "dpp"
    keep = 0.25

`vary` makes an arm of every combination of some values, and names it by them. It adds the arm `full`, which the tables
measure the others against. All arms of a seed share a base model and see the same pictures: no arm may change these.
"""

import itertools
from pathlib import Path

from ..util import UserError, require, require_known
from .reading import changed, setting, tables_of, value_of
from .sections import Recipe

BUILT_IN = Path(__file__).parent / "comparisons"
FULL = {"full": {"dualspeed": {"schedule": "full"}}}
# What all arms share: whole sections (None), or keys of a section.
SHARED = {"run": None, "digits": None, "model": ("path", "tower", "llm"), "data": ("kind",)}


def read(recipe: Recipe, file: str, only: str | None = None) -> dict[str, Recipe]:
    """The arms of a file (or of a built-in one, by its name). `only` names some of them, separated by commas."""
    tables, where = tables_of(file, BUILT_IN, "file of arms")
    return _made(recipe, tables, where, only)


def vary(recipe: Recipe, changes: list[str], only: str | None = None) -> dict[str, Recipe]:
    """`full`, and an arm for every combination of the values of `section.key=v1,v2,v3`."""
    axes, keys = [], []
    for change in changes:
        section, key, values = setting("--vary", change)
        require((section, key) not in keys, f"--vary {section}.{key} is given twice; give all its values at once")
        axes.append([(section, key, value.strip()) for value in values.split(",")])
        keys.append((section, key))
    short = [key for _, key in keys]
    arms: dict[str, dict] = dict(FULL)
    for chosen in itertools.product(*axes):
        tables: dict[str, dict] = {}
        for section, key, value in chosen:
            tables.setdefault(section, {})[key] = value_of(section, key, value)
        names = [f"{key if short.count(key) == 1 else f'{section}.{key}'}={value}" for section, key, value in chosen]
        arms[" ".join(names)] = tables
    return _made(recipe, arms, "--vary", only)


def folder_of(arm: str) -> str:
    return arm.replace(" ", "-")


def _made(recipe: Recipe, arms: dict, where: str, only: str | None) -> dict[str, Recipe]:
    if recipe.data.kind != "digits":
        raise UserError(f'compare asks about digits: data.kind = "{recipe.data.kind}" has no such questions')
    names = list(dict.fromkeys(name.strip() for name in only.split(","))) if only else list(arms)
    for name in names:
        require_known("arm", name, arms)
    require(bool(names), f"{where} holds no arm: each is a table, for example [full.dualspeed]")
    folders: dict[str, str] = {}
    for name in names:
        if not name or name.startswith(".") or set(name) & set("/\\,") or folder_of(name) == "base":
            raise UserError(f"{where}: {name!r} cannot be an arm's name: a plain folder name without commas, not base")
        other = folders.setdefault(folder_of(name), name)
        require(other == name, f"{where}: the arms {other!r} and {name!r} would share a folder")
    return {name: _arm(recipe, arms[name], f"{where}, arm {name!r}") for name in names}


def _arm(recipe: Recipe, tables: dict, where: str) -> Recipe:
    require(isinstance(tables, dict), f"{where}: an arm must be a table of recipe sections")
    made = changed(recipe, tables, where)  # first, since it names keys that no recipe has
    for section, values in tables.items():
        keys = SHARED.get(section, ())
        for key in values:
            alike = keys is None or key in keys
            require(not alike, f"{where}: {section}.{key} is the same for all arms; change it with --set")
    return made
