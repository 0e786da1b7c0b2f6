"""The manifest of a base model that a run has built for itself: what it was built from, and its files' checksums.

It is verified on each use. Frozen weights are in no checkpoint, so a resumed run must find the files it began with.
"""

import json
from pathlib import Path

from ..util import UserError, require
from ..util.files import UNREADABLE, fingerprint, read

_verified: set[tuple] = set()  # by this process, which asks several times, and the files may be large


def write(folder: Path, name: str, how: dict) -> None:
    """Writes the manifest of all files in the folder. `how` says what the model was built from."""
    files = {path.name: [*fingerprint(path)] for path in sorted(folder.iterdir())}
    (folder / name).write_text(json.dumps({"how": how, "files": files}), encoding="utf-8")


def verify(folder: Path, name: str, how: dict) -> None:
    """Refuses a base model that was built in another way, or whose files are not what was written."""
    try:
        manifest = json.loads(read(folder / name).decode())
        require(manifest["how"] == how, f"{folder} was not built with {how}: delete it, or choose another run.name")
        for file, (size, crc) in manifest["files"].items():
            found = (folder / file).stat()
            seen = (str(folder / file), found.st_mtime_ns, found.st_ino, found.st_size, size, crc)
            if Path(file).name != file or (seen not in _verified and fingerprint(folder / file) != (size, crc)):
                raise ValueError(f"{file} is not what was written")
            _verified.add(seen)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{folder} is damaged ({error}): delete it to build it anew") from error
