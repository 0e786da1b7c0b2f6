"""Files of conversations about pictures, read one record at a time: of a file, two numbers a record are held.

    LLaVA   {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                            {"from": "gpt", "value": "A cat."}]}
    chat    {"images": ["a.jpg"], "messages": [{"role": "user", "content": "What is it?"},
                                               {"role": "assistant", "content": "A cat."}]}

Either as one JSON list, as one JSON object a line, or as parquet, which is first unpacked into lines and pictures.
Both become the same `Record`. A record is taken as it is meant or refused: nothing it says is left out in silence.
"""

import codecs
import difflib
import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import BinaryIO, NoReturn

import numpy as np
from tqdm import tqdm

from ..util import files
from ..util.errors import UserError, counted, unknown
from ..util.paths import NO_NAME

IMAGE = None  # the part of a turn where a picture stands; the other parts are text
MARKER = "<image>"
CHUNK, SOON = 1 << 20, 1  # bytes read at a time; seconds after which reading shows a bar
LARGEST = 64 << 20  # bytes of one record
FORMATS = {  # the key of the turns: the keys of a turn, and the names of the roles
    "conversations": ("from", "value", {"system": "system", "human": "user", "gpt": "assistant"}),
    "messages": ("role", "content", {"system": "system", "user": "user", "assistant": "assistant"}),
}
PICTURES = ("image", "images")
# Keys that change what is taught, and that nothing here reads. All others are taken for data about the data.
UNREAD = {"audio", "audios", "system", "tools", "video", "videos"}
UNREAD_INSIDE = {"content", "image", "image_url", "images", "path", "text", "tool_calls", "url", "value"}
_BLANK = b" \t\r\n"
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Turn:
    role: str  # "system", "user" or "assistant"
    parts: tuple[str | None, ...]  # text, and IMAGE where a picture stands


@dataclass(frozen=True)
class Record:
    where: str  # "FILE: record N (id X)"
    images: tuple[str, ...]  # a file name for each IMAGE of the turns, in their order
    turns: tuple[Turn, ...]


def parse(raw: object, where: str) -> Record:
    """One record of either kind. Every mistake in it is an error that begins with `where`."""
    raw = _object(raw, UNREAD, where)
    if "id" in raw:
        if type(raw["id"]) not in (str, int):
            _refuse(where, f"its id must be a string or a whole number, not {short(raw['id'])}")
        shown = str(raw["id"])
        where += f" (id {shown if shown.isprintable() else short(shown)})"
    key = _one_of(FORMATS, raw, where)
    if not key:
        _refuse(where, f"has neither conversations nor messages, only {short(list(raw))}")
    if not isinstance(raw[key], list) or not raw[key]:
        _refuse(where, f"{key} must be a list of turns, the last one an answer")
    given = raw.get(_one_of(PICTURES, raw, where), [])
    given = [_file_name(name, where) for name in (given if isinstance(given, list) else [given])]
    turns = []
    for number, item in enumerate(raw[key], 1):
        turns.append(_turn(item, key, turns[-1][0] if turns else "", f"{where}, turn {number}"))
    if turns[-1][0] != "assistant":
        _refuse(where, f"{key} must end with an answer")
    pictures = [part for _, parts in turns for part in parts if not isinstance(part, str)]
    first = int(turns[0][0] == "system")
    if key == "messages" and not pictures and isinstance(raw[key][first]["content"], str):
        # Strings without any marker: by TRL's convention the pictures stand before the first question.
        turns[first][1][:0] = pictures = [IMAGE] * len(given)
    for number, (_, parts) in enumerate(turns, 1):
        if all(isinstance(part, str) and not part.strip() for part in parts):
            _refuse(where, f"turn {number} is empty; write its text, or delete the record")
    if pictures.count(IMAGE) != len(given):
        places = f"{counted(pictures.count(IMAGE), 'place')} for {counted(len(given), 'picture')}"
        _refuse(where, f"has {places}; write {MARKER} once for each, where it belongs in a question")
    rest = iter(given)
    return Record(
        where,
        tuple(next(rest) if picture is IMAGE else picture[0] for picture in pictures),
        tuple(Turn(role, tuple(p if isinstance(p, str) else IMAGE for p in parts)) for role, parts in turns),
    )


def _one_of(keys: Collection[str], raw: dict, where: str) -> str | None:
    """The only one of these keys that is there; None where none is, unless one is nearly: its value would be lost."""
    found = [key for key in keys if key in raw]
    if len(found) > 1:
        _refuse(where, f"has both {found[0]!r} and {found[1]!r}; keep one")
    for key, value in raw.items() if not found else ():
        if isinstance(value, str | list) and difflib.get_close_matches(key, keys, cutoff=0.8):
            _refuse(where, unknown("key", key, keys))
    return found[0] if found else None


def _turn(item: object, key: str, before: str, where: str) -> tuple[str, list[str | tuple | None]]:
    """Who speaks, and the parts of what is said: text, IMAGE, and (file name,) for a picture that names its file."""
    role_key, content_key, roles = FORMATS[key]
    item = _object(item, UNREAD_INSIDE - {content_key}, where)
    if role_key not in item or content_key not in item:
        _refuse(where, f"needs {role_key!r} and {content_key!r}, and has {short(list(item))}")
    name, content = item[role_key], item[content_key]
    if not isinstance(name, str) or not isinstance(content, str if key == "conversations" else str | list):
        _refuse(where, f"{role_key!r} and {content_key!r} must be strings, not {short(name)} and {short(content)}")
    if name not in roles:
        _refuse(where, unknown("role", name[:80], roles))
    role = roles[name]
    if role not in {"": ("system", "user"), "user": ("assistant",)}.get(before, ("user",)):
        _refuse(where, f"{name!r} is out of turn; questions and answers alternate, behind at most one system turn")
    if isinstance(content, list):
        parts = [_part(part, where) for part in content]
    else:
        parts = _text(content, where).split(MARKER)
        if len(parts) > 1:  # white space next to a marker was there for human eyes
            parts = [parts[0].rstrip(), *(text.strip() for text in parts[1:-1]), parts[-1].lstrip()]
        parts = [part for text in parts for part in (IMAGE, text)][1:]
    if role != "user" and not all(isinstance(part, str) for part in parts):
        _refuse(where, f"has a picture ({MARKER}), which only questions can have")
    if role == "assistant":
        parts = ["".join(parts).strip()]
    return role, [part for part in parts if part != ""]


def _part(part: object, where: str) -> str | tuple | None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        text = _text(_object(part, UNREAD_INSIDE - {"text"}, where).get("text"), where)
        if MARKER in text:
            _refuse(where, f"a text part contains {MARKER}, which stands for a picture; make an image part of it")
        return text
    if kind == "image":
        keys = ("image", "path", "url")
        part = _object(part, UNREAD_INSIDE.difference(keys), where)
        key = _one_of(keys, part, where)
        return (_file_name(part[key], where),) if key else IMAGE
    _refuse(where, f'a part must be {{"type": "text", "text": ...}} or {{"type": "image"}}, not {short(part)}')


def _object(raw: object, unread: set[str], where: str) -> dict:
    """An object without its nulls: parquet has them for everything that is not there."""
    if not isinstance(raw, dict):
        _refuse(where, f"must be an object, not {short(raw)}")
    raw = {key: value for key, value in raw.items() if value is not None}
    if lost := [key for key in raw.keys() & unread if raw[key] not in ("", [])]:
        _refuse(where, f"has {lost[0]!r}, which is not read here and would be lost; make a turn of it, or delete it")
    return raw


def _file_name(name: object, where: str) -> str:
    name = _text(name, where)
    if not name.strip() or "://" in name or name.startswith("data:"):
        _refuse(where, f"{short(name)} is not the name of a file; pictures are files in one folder")
    return name


def _text(text: object, where: str) -> str:
    if not isinstance(text, str):
        _refuse(where, f"{short(text)} stands where text must be")
    if bad := NO_NAME.search(text):
        _refuse(where, f"there is {bad[0]!r} in {short(text)}, which no tokeniser can read; delete it")
    return text


def _refuse(where: str, what: object) -> NoReturn:
    raise UserError(f"{where}: {what}")


class Records:
    """The records of a file, by number. Nothing is kept open: any process may have a copy, and ask."""

    def __init__(self, file: str | Path, images: str | Path | None = None, *, cache: Path | None = None, bar=False):
        """`images`: the folder that picture names start from; without it the file's own. `cache`: for parquet."""
        given = Path(file).expanduser()
        self.name, self.path, inside = given.name, given, None
        if given.is_dir() or given.suffix.lower() == ".parquet":
            self.path, inside = unpack(given, cache, bar=bar)
        elif not given.is_file():
            raise UserError(f"there is no file {file}")
        beside = given if given.is_dir() else given.parent
        self.folder = inside or (beside if images is None else Path(images).expanduser())
        spans = array("q")
        line = tqdm(None, self.name, self.path.stat().st_size, disable=not bar, unit="B", unit_scale=True, delay=SOON)
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
            if version != self._version:
                raise UserError(f"{self.path} was changed while it was in use; start again")
            file.seek(start)
            entry = file.read(length)
        try:
            raw = json.loads(entry.decode(), object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: cannot read the JSON at byte {start} of the file: {error}") from error
        return parse(raw, where)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, tuple[int, int]]]:
    """A file, and what changes when it is changed."""
    try:
        with open(path, "rb") as file:
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
    """Of each record its first byte in the file, and how many it has."""
    head = file.read(LARGEST)
    text = head.removeprefix(codecs.BOM_UTF8).lstrip(_BLANK)
    file.seek(len(head) - len(text))
    if text.startswith(b"["):
        return _entries(file, name)
    if text.startswith(b"{"):
        if len(head) < LARGEST:  # a file that goes on cannot be one record
            _refuse_one_object(text, name)
        return _lines(file)
    raise UserError(f"{name} {'is neither a JSON list of records nor one JSON object a line' if text else 'is empty'}")


def _refuse_one_object(head: bytes, name: str) -> None:
    """{"data": [...]} is not a file of one record, and a record on many lines is not JSONL."""
    try:
        whole = json.loads(head.decode())
    except (ValueError, RecursionError):
        return  # more than one object; or broken, and its line will tell
    if b"\n" in head.strip(_BLANK) or not FORMATS.keys() & whole.keys():
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
    # Bytes that are not UTF-8 are escaped, and counted like others: they spoil their own record, not the file.
    decode, utf8 = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8")("surrogateescape")
    start, number, separator = file.tell() + 1, 0, ","  # behind the bracket
    file.seek(start)
    window, at = "", 0  # window[at:] begins at byte `start` of the file
    while separator == ",":
        begin, after = _SPACE.match(window, at).end(), f"{name}: broken JSON after record {number}, at byte"
        if number == 0 and window.startswith("]", begin):
            raise UserError(f"{name} is an empty list")
        try:
            _, end = decode(window, begin)
            behind = _SPACE.match(window, end).end()
            if not window.startswith((",", "]"), behind):  # a number may go on behind the window
                raise json.JSONDecodeError("Expecting ',' or ']'", window, behind)
        except json.JSONDecodeError as error:  # broken, or not all of it is in the window
            too_long = len(window) - at > LARGEST
            block = b"" if too_long else file.read(max(CHUNK, len(window) - at))
            if not block:
                what = f"{error.msg}, or it is longer than {LARGEST:,} bytes" if too_long else error.msg
                _refuse(f"{after} {start + _bytes(window[at : error.pos])}", what)
            window, at = window[at:] + utf8.decode(block), 0
            continue
        except (ValueError, RecursionError) as error:  # a number of too many digits, lists in lists in lists
            _refuse(f"{after} {start + begin - at}", error)
        start, length = start + begin - at, _bytes(window[begin:end])
        yield start, length
        separator, number = window[behind], number + 1
        start, at = start + length + behind + 1 - end, behind + 1
    file.seek(start)
    while block := file.read(CHUNK):
        if block.strip(_BLANK):
            raise UserError(f"{name}: something follows its list of {counted(number, 'record')}, at byte {start}")


def _bytes(text: str) -> int:
    return len(text.encode(errors="surrogateescape"))


def unpack(file: Path, cache: Path | None, *, bar: bool = False) -> tuple[Path, Path | None]:
    """Parquet, or a folder of it, as lines of JSON; and the folder of the pictures that were inside, if any were.

    Done once: in `cache` it goes under a name made of the files' paths, sizes and times."""
    sources = sorted(file.glob("*.parquet")) if file.is_dir() else [file]
    if not sources:
        raise UserError(f"{file} is a folder without .parquet files; give a file, or another folder")
    if cache is None:
        raise UserError(f"{file} is parquet, which must be unpacked first: give a cache folder")
    try:
        versions = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in sources]
        key = hashlib.blake2b(json.dumps(versions).encode(), digest_size=8).hexdigest()
        final = Path(cache).expanduser() / f"{file.stem}-{key}"
        if not final.is_dir():  # or nothing needs to be written, and the disk may be read-only
            with files.about(final):
                final.parent.mkdir(parents=True, exist_ok=True)
                with open(final.with_name(f".{final.name}.lock"), "w") as lock:
                    with suppress(ImportError):  # Windows has no such locks; elsewhere the first rank unpacks
                        import fcntl

                        fcntl.flock(lock, fcntl.LOCK_EX)
                    if not final.is_dir():
                        with files.atomic(final) as temporary:
                            (temporary / "images").mkdir(parents=True)
                            _write(_rows(sources, bar), temporary, file.name)
        return final / "records.jsonl", final / "images" if any((final / "images").iterdir()) else None
    except OSError as error:
        raise UserError(f"cannot unpack {file} into {cache}: {error}") from error


def _rows(files: list[Path], bar: bool) -> Iterator[dict]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install 'tinyspeed[parquet]'") from error
    for file in files:
        try:
            with parquet.ParquetFile(file, page_checksum_verification=True) as table:
                names = table.schema_arrow.names
                if not _one_of(FORMATS, dict.fromkeys(names, ""), file.name):
                    _refuse(file.name, f"has neither a column conversations nor messages, only {short(names)}")
                # Columns that are only nearly right are read too: `parse` will name them.
                known = ("id", *FORMATS, *PICTURES, *UNREAD)
                columns = [name for name in names if difflib.get_close_matches(name, known, cutoff=0.8)]
                with tqdm(None, file.name, table.metadata.num_rows, disable=not bar, unit="row", delay=SOON) as line:
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
                    row[key] = [_keep(value, folder / "images", where) for value in values]
            try:
                lines.write(json.dumps(row) + "\n")
            except TypeError as error:
                raise UserError(f"{where}: {error}") from error


def _keep(picture: object, folder: Path, where: str) -> str:
    """The file name of a picture. One that came as bytes is a file then; equal ones are one file."""
    if not isinstance(picture, dict):
        picture = {"bytes" if isinstance(picture, bytes) else "path": picture}
    content, path = picture.get("bytes"), picture.get("path")
    if not content or not isinstance(content, bytes):
        named = isinstance(path, str) and not content
        return path if named else _refuse(where, "a picture has neither bytes nor a path")
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    file = folder / digest[:2] / digest[2:]  # in 256 folders: some file systems are slow with a million files in one
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    return f"{digest[:2]}/{digest[2:]}"
