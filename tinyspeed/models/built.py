"""A base model that a run has built for itself (from parts, or the digits' own): labelled, and checked on each use.

What is frozen in a base model is in no checkpoint, so a resumed run must find the very files that it began with.
"""

import json
import stat
from pathlib import Path

from ..util.errors import UserError
from ..util.files import UNREADABLE, fingerprint


def label(folder: Path, label: str, how: dict) -> None:
    """Label a base model that a run has built for itself: how, and what its files are."""
    files = {path.name: [*fingerprint(path)] for path in sorted(folder.iterdir())}
    (folder / label).write_text(json.dumps({"how": how, "files": files}), encoding="utf-8")


_sound: set[tuple] = set()  # what this process has looked at: it is asked for several times, and may be large


def check(folder: Path, label: str, how: dict) -> None:
    """That a base model is the one that was built, whole. What is frozen in it is in no checkpoint."""
    try:
        if not (folder / label).is_file():
            raise ValueError(f"{label} is not there, or no file")
        label = json.loads((folder / label).read_text(encoding="utf-8"))
        if label["how"] != how:
            raise UserError(f"{folder} was not built with {how}: delete it, or choose another run.name")
        for name, (size, crc) in label["files"].items():
            found = (folder / name).stat()
            if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
                raise ValueError(f"{name} is no file")
            seen = (str(folder / name), found.st_mtime_ns, found.st_ino, found.st_size, size, crc)
            if Path(name).name != name or (seen not in _sound and fingerprint(folder / name) != (size, crc)):
                raise ValueError(f"{name} is not what was written")
            _sound.add(seen)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{folder} is damaged ({error}): delete it to build it anew") from error
