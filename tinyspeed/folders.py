"""What the paths that a user gives mean: a run, a model here or on the hub, an adapter, nothing. Nothing is loaded.

A slip in a path is the most common mistake of all. Here it is named without the seconds that transformers takes to
import, and a folder that is not where it was is never taken for a model of that name on the hub.
"""

from pathlib import Path

from .errors import UserError


def is_run(path: str) -> bool:
    return (Path(path) / "recipe.toml").is_file()


def model(path: str) -> Path | str:
    """The model folder, or the hub id as it is; anything else is an error that says what it is."""
    folder = Path(path).expanduser()
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


def conversations(file: str, images: str) -> None:
    """That the file of conversations is there, and the folder of its pictures."""
    if not Path(file).expanduser().exists():
        raise UserError(f"data.file: there is no file {file}")
    if images and not Path(images).expanduser().is_dir():
        raise UserError(f"data.images: there is no folder {images}")
