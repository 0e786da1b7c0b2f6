"""What the paths that a user gives mean: a run, a model here or on the hub, an adapter, nothing. Nothing is loaded.

A slip in a path is the most common mistake of all. Here it is named without the seconds that transformers takes to
import, and a folder that is not where it was is never taken for a model of that name on the hub.
"""

import json
import re
from pathlib import Path

from .errors import UserError

NO_NAME = re.compile("[\0\ud800-\udfff]")  # what no file's name can have
CONTROL = re.compile("[\0-\x1f\x7f-\x9f]")
INDEX = "model.safetensors.index.json"
ISOLATOR = "isolator.safetensors"  # in the run's folder


def expanded(path: str | Path) -> Path:
    """The path, with what ~ stands for."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such user here, and ~ is a user's folder") from error


def absolute(path: str) -> str:
    """The whole path of what is there; anything else as it is: it may be a hub id, or a mistake that is named later."""
    found = expanded(path)
    try:
        return str(found.absolute()) if path and found.exists() else path
    except OSError as error:  # a name that is too long for any file
        raise UserError(f"{path}: {error.strerror}") from error


def is_run(path: str) -> bool:
    return (Path(path) / "recipe.toml").is_file()


def model(path: str) -> Path | str:
    """The model folder, or the hub id as it is; anything else is an error that says what it is."""
    folder = expanded(path)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is an adapter without its model, for peft to load: give the run that it is of, or export that run "
            f"without --adapter"
        )
    if folder.is_dir():
        raise UserError(f"{path} is not a model folder: it has no config.json")
    if path.startswith((".", "/", "~")) or path.count("/") != 1 or folder.parent.is_dir():
        raise UserError(
            f"there is no model folder {path}, and no run; give one that is there, or a hub id such as "
            f"llava-hf/llava-1.5-7b-hf"
        )
    return path


def weights(folder: Path) -> list[Path]:
    """The files of a model's weights. What an index names lies beside it, and nowhere else."""
    index = folder / INDEX
    if not index.is_file():
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        pickles = [name for name in names if not name.endswith(".safetensors")]
        strange = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is no index of weights: {error!r}") from error
    if pickles:
        raise UserError(
            f"{index} names {pickles[0]!r}. Only safetensors are read, since a pickle can run code: save the model "
            f"again with save_pretrained"
        )
    if strange:
        raise UserError(f"{index} names {strange[0]!r}, which is no file beside it")
    return [folder / name for name in names]


def isolator(path: str) -> Path:
    """What a finished run leaves for the next one, `dualspeed.isolator_from`."""
    file = expanded(path) / ISOLATOR
    if not file.is_file():
        raise UserError(f"dualspeed.isolator_from: there is no {file}: was that run finished?")
    return file


def conversations(file: str, images: str) -> None:
    """That the file of conversations is there, and the folder of its pictures."""
    if not expanded(file).exists():
        raise UserError(f"data.file: there is no file {file}")
    if images and not expanded(images).is_dir():
        raise UserError(f"data.images: there is no folder {images}")
