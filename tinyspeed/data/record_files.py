"""Files of records, read one record at a time: of a file, only the place and the length of each record are in memory.

A file is one JSON list, or has one JSON object on each line; parquet is first unpacked into such lines (parquet.py).
"""

import codecs
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from ..util import UserError, counted, files, require
from . import parquet
from .record_formats import FORMATS, Record, parse

CHUNK = 1 << 20  # bytes read at a time
LARGEST = 64 << 20  # bytes of one record
_BLANK = b" \t\r\n"
_SPACE = re.compile(r"[ \t\r\n]*")


class RecordFile:
    """The records of a file, by number. The file is opened for each one, so any process may have a copy of this."""

    def __init__(self, file: str | Path, images: str | Path | None = None, *, cache: Path | None = None, bar=False):
        """`images` is the folder that picture names start from, by default the file's own. `cache` is for parquet."""
        given = Path(file).expanduser()
        self.name, self.path, unpacked = given.name, given, None
        require(given.is_file() or given.is_dir(), f"there is no file {file}")
        if given.is_dir() or given.suffix.lower() == ".parquet":
            self.path, unpacked = parquet.unpack(given, cache, bar=bar)
        beside = given if given.is_dir() else given.parent
        self.folder = unpacked or (beside if images is None else Path(images).expanduser())
        spans, size = array("q"), self.path.stat().st_size
        line = tqdm(None, self.name, size, disable=not bar, unit="B", unit_scale=True, delay=parquet.BAR_AFTER)
        with line, _opened(self.path) as (opened, self._version):
            for start, length in _spans(opened, self.name):
                if length > LARGEST:
                    raise UserError(f"{self.name}: record {len(spans) // 2 + 1} is longer than {LARGEST:,} bytes")
                spans.extend((start, length))
                line.update(start + length - line.n)
        self._spans = np.frombuffer(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, i: int) -> Record:
        i = range(len(self))[i]
        where = f"{self.name}: record {i + 1}"
        start, length = self._spans[i].tolist()
        with _opened(self.path) as (file, version):
            require(version == self._version, f"{self.path} was changed while it was in use; start again")
            file.seek(start)
            entry = file.read(length)
        try:
            raw = json.loads(entry.decode(), object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: cannot read the JSON at byte {start} of the file: {error}") from error
        return parse(raw, where)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, tuple[int, int]]]:
    """An open file, and its size and time, which differ once it has been changed."""
    try:
        with open(path, "rb", opener=files.regular) as file:
            found = os.fstat(file.fileno())
            yield file, (found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    made = dict(pairs)
    if len(made) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {short(key)} is there twice")
    return made


def _spans(file: BinaryIO, name: str) -> Iterator[tuple[int, int]]:
    """The first byte of each record in the file, and its length in bytes."""
    head = file.read(LARGEST)
    text = head.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)
    file.seek(len(head) - len(text))
    if text.startswith(b"["):
        return _entries(file, name)
    if text.startswith(b"{"):
        if len(head) < LARGEST:  # a longer file cannot be one record
            _refuse_one_object(text, name)
        return _lines(file)
    raise UserError(f"{name} {'is neither a JSON list of records nor one JSON object a line' if text else 'is empty'}")


def _refuse_one_object(content: bytes, name: str) -> None:
    """Refuses {"data": [...]}, which is no record, and a record that is spread over many lines, which is not JSONL."""
    try:
        whole = json.loads(content.decode())
    except (ValueError, RecursionError):
        return  # more than one object, or a broken line, which is reported when it is read
    if b"\n" in content.strip(_BLANK) or not FORMATS.keys() & whole.keys():
        lists = [key for key, value in whole.items() if isinstance(value, list)]
        mend = f"; save the list of {short(lists[0])} alone" if len(lists) == 1 else ""
        raise UserError(f"{name} holds one JSON object; it must be a list of records, or one record a line{mend}")


def _lines(file: BinaryIO) -> Iterator[tuple[int, int]]:
    start = file.tell()
    while line := file.readline(LARGEST + 1):
        if line.strip(_BLANK):
            yield start, len(line)
        start += len(line)


def _entries(file: BinaryIO, name: str) -> Iterator[tuple[int, int]]:
    """The entries of a JSON list, decoded one after the other in a window that slides over the file."""
    # Bytes that are not UTF-8 are escaped and counted like others: they spoil their own record, not the whole file.
    decode, utf8 = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8")("surrogateescape")
    start, number, separator = file.tell() + 1, 0, ","  # after the bracket
    file.seek(start)
    window, at = "", 0  # window[at:] begins at byte `start` of the file
    while separator == ",":
        begin, broken = _SPACE.match(window, at).end(), f"{name}: broken JSON after record {number}, at byte"
        require(number > 0 or not window.startswith("]", begin), f"{name} is an empty list")
        try:
            _, end = decode(window, begin)
            after = _SPACE.match(window, end).end()
            if not window.startswith((",", "]"), after):  # the rest of a number may be outside the window
                raise json.JSONDecodeError("Expecting ',' or ']'", window, after)
        except json.JSONDecodeError as error:  # broken, or not all of it is in the window
            too_long = len(window) - at > LARGEST
            block = b"" if too_long else file.read(max(CHUNK, len(window) - at))
            if not block:
                what = f"{error.msg}, or it is longer than {LARGEST:,} bytes" if too_long else error.msg
                raise UserError(f"{broken} {start + _bytes(window[at : error.pos])}: {what}") from error
            window, at = window[at:] + utf8.decode(block), 0
            continue
        except (ValueError, RecursionError) as error:  # a number of too many digits, or lists nested too deep
            raise UserError(f"{broken} {start + begin - at}: {error}") from error
        start, length = start + begin - at, _bytes(window[begin:end])
        yield start, length
        separator, number = window[after], number + 1
        start, at = start + length + after + 1 - end, after + 1
    file.seek(start)
    while block := file.read(CHUNK):
        if block.strip(_BLANK):
            raise UserError(f"{name}: something follows its list of {counted(number, 'record')}, at byte {start}")


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogateescape"))
