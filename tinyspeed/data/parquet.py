"""Parquet, unpacked once into one JSON object a line, and into files for the pictures that are inside it."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ..util import UserError, files, require
from .record_formats import PICTURES, worth_reading

BAR_AFTER = 1  # seconds after which reading shows a progress bar


def unpack(given: Path, cache: Path | None, *, bar: bool = False) -> tuple[Path, Path | None]:
    """Unpacks a file, or a folder of files, into `cache`, unless it was done before: the name there depends on the
    files' paths, sizes and times. Returns the file of lines, and the folder of the pictures if any were inside."""
    sources = sorted(filter(Path.is_file, given.glob("*.parquet"))) if given.is_dir() else [given]
    require(bool(sources), f"{given} is a folder without .parquet files; give a file, or another folder")
    require(cache is not None, f"{given} is parquet, which must be unpacked first: give a cache folder")
    try:
        versions = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sources]
        key = hashlib.blake2b(json.dumps(versions).encode(), digest_size=8).hexdigest()
        folder = Path(cache).expanduser() / f"{given.stem}-{key}"
        if not folder.is_dir():  # otherwise nothing needs to be written, and the disk may be read-only
            with files.errors_about(folder):
                folder.parent.mkdir(parents=True, exist_ok=True)
                with files.locked(folder.with_name(f".{folder.name}.lock")):  # the first process unpacks
                    if not folder.is_dir():
                        with files.atomic(folder) as temporary:
                            (temporary / "images").mkdir(parents=True)
                            _write(_rows(sources, bar), temporary, given.name)
        return folder / "records.jsonl", folder / "images" if any((folder / "images").iterdir()) else None
    except OSError as error:
        raise UserError(f"cannot unpack {given} into {cache}: {error}") from error


def _rows(sources: list[Path], bar: bool) -> Iterator[dict]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install '.[parquet]'") from error
    for file in sources:
        try:
            with parquet.ParquetFile(file, page_checksum_verification=True) as table:
                columns, rows = worth_reading(table.schema_arrow.names, file.name), table.metadata.num_rows
                with tqdm(None, file.name, rows, disable=not bar, unit="row", delay=BAR_AFTER) as line:
                    for batch in table.iter_batches(64, columns=columns):
                        yield from batch.to_pylist()
                        line.update(len(batch))
        except (ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:  # OverflowError: a year 10,000
            raise UserError(f"cannot read {file}: {' '.join(str(error).split())}") from error


def _write(rows: Iterator[dict], folder: Path, name: str) -> None:
    with open(folder / "records.jsonl", "w", encoding="utf-8") as lines:
        for number, row in enumerate(rows, 1):
            where = f"{name}: record {number}"
            for key in PICTURES:
                if row.get(key) is not None:
                    values = row[key] if isinstance(row[key], list) else [row[key]]
                    row[key] = [_picture_file(value, folder / "images", where) for value in values]
            try:
                lines.write(json.dumps(row) + "\n")
            except TypeError as error:
                raise UserError(f"{where}: {error}") from error


def _picture_file(picture: object, folder: Path, where: str) -> str:
    """The file name of a picture. A picture that came as bytes is written to a file; equal ones share one file."""
    if not isinstance(picture, dict):
        picture = {"bytes" if isinstance(picture, bytes) else "path": picture}
    content, path = picture.get("bytes"), picture.get("path")
    if isinstance(path, str) and not content:
        return path
    require(bool(content) and isinstance(content, bytes), f"{where}: a picture has neither bytes nor a path")
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    name = f"{digest[:2]}/{digest[2:]}"  # in 256 folders: some file systems are slow with a million files in one
    if not (folder / name).exists():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return name
