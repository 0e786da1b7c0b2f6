"""From a TOML file to a recipe. An unknown key is an error that names the key that was probably meant.

`--set section.key=value` on the command line changes a value before the sections check theirs: all are checked alike.
"""

import dataclasses
import tomllib
from pathlib import Path
from reprlib import repr as short

from ..util import UserError, located, paths, require, unknown
from .sections import INPUTS, LARGEST, LAST, Recipe

BUILT_IN = Path(__file__).parent / "presets"
SYNONYMS = {  # what transformers, peft and LLaVA's own scripts call our keys
    "learning_rate": "train.lr", "lr_rate": "train.lr", "warmup_ratio": "train.warmup", "max_steps": "train.steps",
    "batch_size": "train.batch", "per_device_train_batch_size": "train.batch", "num_train_epochs": "train.epochs",
    "gradient_accumulation_steps": "train.row_budget", "gradient_checkpointing": "train.checkpointing",
    "lora_r": "lora.rank", "lora_alpha": "lora.alpha", "load_in_4bit": "model.quantise", "bf16": "model.precision",
    "fp16": "model.precision", "model_name_or_path": "model.path", "data_path": "data.file", "output_dir": "run.folder",
    "image_folder": "data.images", "max_length": "data.max_rows", "max_seq_length": "data.max_rows", "r": "lora.rank",
}  # fmt: skip


def read(path: str, changes: list[str] = ()) -> Recipe:
    """The recipe in a TOML file (or a built-in one, by name), with `section.key=value` changes."""
    require(not paths.is_run(path), f"{path} is a run, and its recipe is {path}/recipe.toml: give that file")
    tables, file = tables_of(path, BUILT_IN, "recipe file")
    for change in changes:
        section, key, value = setting("--set", change)
        require(isinstance(tables.setdefault(section, {}), dict), f"{file}: {section} must be a table, [{section}]")
        tables[section][key] = value_of(section, key, value)
    return _absolute(from_tables(tables, f"{file}, with --set" if changes else file))


def changed(recipe: Recipe, tables: dict, where: str) -> Recipe:
    """The recipe with the changes in these tables."""
    every = dataclasses.asdict(recipe)
    for section, values in tables.items():
        every[section] = {**every.get(section, {}), **values} if isinstance(values, dict) else values
    return _absolute(from_tables(every, where))


def tables_of(path: str, built_in: Path, kind: str) -> tuple[dict, str]:
    """The tables of a TOML file, or of the built-in one of this name, and the path of that file."""
    file = Path(path) if Path(path).is_file() else built_in / f"{path}.toml"
    if not file.is_file():
        raise unknown(kind, path, (p.stem for p in built_in.glob("*.toml")), says="there is no")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")), str(file)
    except (ValueError, RecursionError) as error:  # ValueError also for bytes that are not text, or 5,000 digits
        raise UserError(f"{file} is not valid TOML, as a {kind} must be: {error}") from error


def setting(flag: str, text: str) -> tuple[str, str, str]:
    """Splits a flag's section.key=value."""
    key, equals, value = text.partition("=")
    section, _, name = key.strip().partition(".")
    example = "dualspeed.keep=0.1,0.25" if flag == "--vary" else "train.lr=1e-4"
    require(bool(equals), f"{flag} {text}: write it as section.key=value, for example {example}")
    return section, name, value


def value_of(section: str, key: str, text: str):
    """Reads a value as a TOML file would. Text that is not TOML is a string."""
    kind = next((f.type for f in dataclasses.fields(Recipe) if f.name == section), None)
    try:
        value, *more = tomllib.loads(f"value = {text}").values()
    except (ValueError, RecursionError):
        return text.strip()
    is_text = kind and any(f.name == key and f.type is str for f in dataclasses.fields(kind))
    # `more`: the text had a line break and further keys. And run.name=2026-11-20 is a name, not a date.
    return text.strip() if more or (is_text and not isinstance(value, str)) else value


def _absolute(recipe: Recipe) -> Recipe:
    """Makes paths absolute: a run can be exported from any folder, and a moved folder is not taken for a hub id."""
    for path in (recipe.run.folder, recipe.run.cache):
        paths.expanded(path)
    changes = {}
    for name, keys in INPUTS.items():
        section = getattr(recipe, name)
        changes[name] = {key: paths.absolute(getattr(section, key)) for key in keys}
    return recipe.replaced(**changes)


def from_tables(tables: dict, where: str) -> Recipe:
    with located(where):
        kinds = {f.name: f.type for f in dataclasses.fields(Recipe)}
        typed = {section: _typed(kinds, section, values) for section, values in tables.items()}
        made = {}
        for section, values in sorted(typed.items(), key=lambda item: item[0] in LAST):
            try:
                made[section] = kinds[section](**values)
            except UserError as error:
                raise UserError(f"[{section}] {error}") from error
        return Recipe(**made)


def _typed(kinds: dict[str, type], section: str, values: object) -> dict:
    """The values of a section, in which whole numbers are floats where the section wants them so."""
    if section not in kinds:
        raise _unknown("section", section, kinds)
    require(isinstance(values, dict), f"{section} must be a table, [{section}]")
    types = {f.name: f.type for f in dataclasses.fields(kinds[section])}
    found = {}
    for key, value in values.items():
        if key not in types:
            raise _unknown("key", key, types, f"{section}.")
        wanted, at = types[key], f"{section}.{key} = {short(value)}"
        most = 2**32 if key == "seed" else LARGEST
        require(type(value) is not int or -LARGEST <= value <= most, f"{at} is too large a number")
        found[key] = float(value) if wanted is float and type(value) is int else value
        require(type(found[key]) is wanted, f"{at} must be of type {wanted.__name__}")
        fine = wanted is not str or not paths.UNENCODABLE.search(value)
        require(fine, f"{at} has a character that no recipe can have: rename it, or set LC_ALL=C.UTF-8")
    return found


def _unknown(kind: str, name: str, known: dict[str, type], section: str = "") -> UserError:
    """Also suggests keys of other sections, and those that other programs call so."""
    keys = [f"{s.name}.{f.name}" for s in dataclasses.fields(Recipe) for f in dataclasses.fields(s.type)]
    home, dot, key = SYNONYMS.get(name, name).rpartition(".")
    for start in (section or home + dot, home + dot):
        if found := [repr(k) for k in keys if k.startswith(start) and k.endswith(f".{key}")]:
            return UserError(f"unknown {kind} {section + name!r}; did you mean {' or '.join(found)}?")
    return unknown(kind, name, known, section)


def of_run(folder: str) -> Recipe:
    """The recipe that a run was made with, with the folder in which the run is now."""
    file = Path(folder) / "recipe.toml"
    require(file.is_file(), f"{folder} is not a run: it has no recipe.toml")
    here = Path(folder).resolve()
    paths.require_plain(here, own=True)
    return read(str(file)).replaced(run={"folder": str(here.parent), "name": here.name})
