"""What the paths that a user gives mean: a run, a model here or on the hub, an adapter, or nothing. Nothing is loaded.

A slip in a path is the most common mistake of all. Here it is found without the seconds that importing transformers
takes, and a folder that has moved is never taken for a model of that name on the hub.
"""

import json
import os
import re
from pathlib import Path

from .errors import UserError, require
from .files import special

UNENCODABLE = re.compile("[\0\ud800-\udfff]")  # characters that neither the name of a file nor UTF-8 text can have
CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")
INDEX = "model.safetensors.index.json"
ISOLATOR = "isolator.safetensors"  # in a run's folder


def expanded(path: str | Path) -> Path:
    """The path, with ~ replaced by the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: ~ stands for a user's home folder, and there is no such user here") from error


def absolute(path: str) -> str:
    """The absolute path of what exists. Anything else stays: a hub id, or a mistake that is reported later."""
    found = expanded(path)
    try:
        return str(found.absolute()) if path and found.exists() else path
    except OSError as error:  # a name that is too long for any file
        raise UserError(f"{path}: {error.strerror}") from error


def is_run(path: str) -> bool:
    return (Path(path) / "recipe.toml").is_file()


def require_plain(folder: Path | str, own: bool = False) -> None:
    """Refuses a folder with a pipe or a device in it, before a library waits for it. A run's `own` folder may be a link
    but has none in it that leads out: whoever made it must not choose what else is read here, or overwritten."""
    home = os.path.realpath(folder)
    for inside, folders, names in os.walk(folder):
        for path in (Path(inside, name) for name in (*folders, *names)):
            leads = os.path.realpath(path) if own and path.is_symlink() else home
            require(os.path.commonpath([home, leads]) == home, f"{path} is a link out of its run, to {leads}: copy it")
            require(not special(path), f"{path} is a pipe or a device: delete it")


def model_folder_or_hub_id(path: str) -> Path | str:
    """The model folder as a Path, or the hub id as it is. Anything else is an error that says what it is."""
    folder = expanded(path)
    if (folder / "config.json").is_file():
        require_plain(folder)
        return folder
    if (folder / "adapter_config.json").is_file():
        mend = "give the run that it comes from, or export that run without --adapter"
        raise UserError(f"{path} is an adapter without its model, to be loaded by peft: {mend}")
    require(not folder.is_dir(), f"{path} is not a model folder: it has no config.json")
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir():
        mend = "give one that exists, or a hub id such as llava-hf/llava-1.5-7b-hf"
        raise UserError(f"there is no model folder {path}, and no run; {mend}")
    return path


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights."""
    index = folder / INDEX
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        bad = [name for name in names if not name.endswith(".safetensors") or Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of weights: {error!r}") from error
    if bad:
        why = "Only safetensors are read, since a pickle can run code, and only from the same folder"
        raise UserError(f"{index} names {bad[0]!r}. {why}: save the model again with save_pretrained")
    whole = folder / "model.safetensors"  # which transformers prefers
    return [whole] if whole.is_file() else [folder / name for name in names]


def require_isolator(path: str) -> Path:
    """The file that a finished run leaves for the next one, `dualspeed.isolator_from`."""
    file = expanded(path) / ISOLATOR
    require_plain(file.parent, own=True)
    require(file.is_file(), f"dualspeed.isolator_from: there is no {file}: was that run finished?")
    return file


def require_conversations(file: str, images: str) -> None:
    """Refuses a file of conversations, or a folder of their pictures, that does not exist."""
    require(expanded(file).exists(), f"data.file: there is no file {file}; give yours with --set data.file=FILE")
    require(not images or expanded(images).is_dir(), f"data.images: there is no folder {images}")
