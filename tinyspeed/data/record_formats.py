"""A record is one conversation about pictures. Two formats are read:

    LLaVA   {"id": "7", "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                            {"from": "gpt", "value": "A cat."}]}
    chat    {"images": ["a.jpg"], "messages": [{"role": "user", "content": "What is it?"},
                                               {"role": "assistant", "content": "A cat."}]}

Both become the same `Record`, with roles by either's names. Another format is one more function in `FORMATS`. Whatever
a record says is either read or refused with an error that says where it is; nothing is dropped silently.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from reprlib import repr as short
from typing import NamedTuple, NoReturn

from ..util import UserError, counted, unknown
from ..util.paths import UNENCODABLE

IMAGE = None  # stands for a picture among the parts of a turn; the other parts are text
MARKER = "<image>"  # stands for a picture inside a text
PICTURES = ("image", "images")  # the keys of a record that name its picture files
EXAMPLE = (
    '{"image": "a.jpg", "messages": [{"role": "user", "content": "What is it?"}, '
    '{"role": "assistant", "content": "A cat."}]}'
)
# Keys that would change what is taught, but are not read here. All other keys are taken for notes about the record.
UNREAD = {"audio", "audios", "system", "tools", "video", "videos"}
UNREAD_INSIDE = {"content", "image", "image_url", "images", "path", "text", "tool_calls", "url", "value"}
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
FOLLOWS = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}


@dataclass(frozen=True)
class Turn:
    role: str  # "system", "user" or "assistant"
    parts: tuple[str | None, ...]  # text, and IMAGE where a picture stands


@dataclass(frozen=True)
class Record:
    where: str  # "FILE: record N (id X)"
    images: tuple[str, ...]  # a file name for each IMAGE of the turns, in their order
    turns: tuple[Turn, ...]


class Picture(NamedTuple):
    """A picture in a turn that is being read; `file` is its name if the turn itself says it."""

    file: str | None = None


Turns = Iterable[tuple[str, list[str | Picture]]]  # who speaks, and what is said


def llava(record: dict, images: int, where: str) -> Turns:
    """LLaVA's own format: each turn is a text in which <image> stands for a picture."""
    for at, role, text in _turns(record, "conversations", "from", "value", str, where):
        yield role, _split(text, at)


def chat(record: dict, images: int, where: str) -> Turns:
    """The chat format of the OpenAI API and of TRL: a turn is such a text, or a list of text parts and image parts."""
    turns, questions = [], []
    for at, role, content in _turns(record, "messages", "role", "content", str | list, where):
        parts = _split(content, at) if isinstance(content, str) else [_part(part, at) for part in content]
        turns.append((role, parts))
        if role == "user":
            questions.append((content, parts))
    unmarked = not any(isinstance(part, Picture) for _, parts in turns for part in parts)
    if unmarked and questions and isinstance(questions[0][0], str):  # TRL puts the pictures before the first question
        questions[0][1][:0] = [Picture()] * images
    return turns


# Each format is known by the key that only its records have. Its function gets the record, the number of its pictures
# and its place in the file for errors, and returns the turns.
FORMATS = {"conversations": llava, "messages": chat}


def parse(raw: object, where: str) -> Record:
    """One record of any format. Every mistake in it is an error that begins with `where`."""
    raw = _object(raw, UNREAD, where)
    if "id" in raw:
        if type(raw["id"]) not in (str, int):
            _refuse(where, f"its id must be a string or a whole number, not {short(raw['id'])}")
        shown = str(raw["id"])
        where += f" (id {shown if shown.isprintable() else short(shown)})"
    key = _one_of(FORMATS, raw, where)
    if not key:
        _refuse(where, f"has neither {' nor '.join(FORMATS)}, only {short(list(raw))}; write it as {EXAMPLE}")
    given = raw.get(_one_of(PICTURES, raw, where), [])
    given = [_file_name(name, where) for name in (given if isinstance(given, list) else [given])]
    said, before = [], None
    for number, (role, parts) in enumerate(FORMATS[key](raw, len(given), where), 1):
        at = f"{where}, turn {number}"
        if role not in FOLLOWS[before]:
            _refuse(at, f"{role!r} is out of turn; questions and answers alternate, after at most one system turn")
        if role != "user" and any(isinstance(part, Picture) for part in parts):
            _refuse(at, f"has a picture ({MARKER}), which only questions can have")
        if role == "assistant":
            parts = ["".join(parts).strip()]
        if all(isinstance(part, str) and not part.strip() for part in parts):
            _refuse(at, "is empty; write its text, or delete the record")
        said.append((role, [part for part in parts if part != ""]))
        before = role
    if before != "assistant":
        _refuse(where, f"{key} must end with an answer")
    pictures = [part for _, parts in said for part in parts if isinstance(part, Picture)]
    if (places := pictures.count(Picture())) != len(given):
        found = f"{counted(places, 'place')} for {counted(len(given), 'picture')}"
        _refuse(where, f"has {found}; write {MARKER} once for each picture, where it belongs in a question")
    rest = iter(given)
    images = tuple(picture.file or next(rest) for picture in pictures)
    turns = (Turn(role, tuple(IMAGE if isinstance(p, Picture) else p for p in parts)) for role, parts in said)
    return Record(where, images, tuple(turns))


def worth_reading(columns: list[str], where: str) -> list[str]:
    """The columns of a table that `parse` looks at, and those with nearly such a name, for `parse` to report them."""
    if not _one_of(FORMATS, dict.fromkeys(columns, ""), where):
        _refuse(where, f"has neither {' nor '.join(FORMATS)} among its columns {short(columns)}; write it as {EXAMPLE}")
    known = ("id", *FORMATS, *PICTURES, *UNREAD)
    return [name for name in columns if difflib.get_close_matches(name, known, cutoff=0.8)]


def _turns(
    record: dict, key: str, role_key: str, content_key: str, kind: type, where: str
) -> Iterator[tuple[str, str, str | list]]:
    """The place of each turn for errors, its role by our name, and its content as it stands there."""
    if not isinstance(record[key], list) or not record[key]:
        _refuse(where, f"{key} must be a list of turns, the last one an answer")
    for number, turn in enumerate(record[key], 1):
        at = f"{where}, turn {number}"
        turn = _object(turn, UNREAD_INSIDE - {content_key}, at)
        if role_key not in turn or content_key not in turn:
            _refuse(at, f"needs {role_key!r} and {content_key!r}, and has {short(list(turn))}")
        name, content = turn[role_key], turn[content_key]
        if not isinstance(name, str) or not isinstance(content, kind):
            _refuse(at, f"{role_key!r} and {content_key!r} must be strings, not {short(name)} and {short(content)}")
        if name not in ROLES:
            _refuse(at, unknown("role", name[:80], ROLES))
        yield at, ROLES[name], content


def _split(text: str, where: str) -> list[str | Picture]:
    """A text, cut at its markers. White space next to a marker is there for human eyes only, and is dropped."""
    first, *others = _text(text, where).split(MARKER)
    if not others:
        return [first]
    parts = [first.rstrip()]
    for text in others:
        parts += [Picture(), text.strip()]
    return [*parts[:-1], others[-1].lstrip()]


def _part(part: object, where: str) -> str | Picture:
    """A text part or an image part of a chat turn."""
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
        return Picture(_file_name(part[key], where)) if key else Picture()
    _refuse(where, f'a part must be {{"type": "text", "text": ...}} or {{"type": "image"}}, not {short(part)}')


def _one_of(keys: Collection[str], raw: dict, where: str) -> str | None:
    """Which of these keys is there, or None. Two are an error, and so is a misspelt one, whose value would be lost."""
    found = [key for key in keys if key in raw]
    if len(found) > 1:
        _refuse(where, f"has both {found[0]!r} and {found[1]!r}; keep one")
    for key, value in raw.items() if not found else ():
        if isinstance(value, str | list) and difflib.get_close_matches(key, keys, cutoff=0.8):
            _refuse(where, unknown("key", key, keys))
    return found[0] if found else None


def _object(raw: object, unread: set[str], where: str) -> dict:
    """A JSON object without its nulls, which parquet writes for everything that is not there."""
    if not isinstance(raw, dict):
        _refuse(where, f"must be an object, not {short(raw)}")
    raw = {key: value for key, value in raw.items() if value is not None}
    if lost := [key for key in raw.keys() & unread if raw[key] not in ("", [])]:
        _refuse(where, f"has {lost[0]!r}, which is not read here and would be lost; make a turn of it, or delete it")
    return raw


def _file_name(name: object, where: str) -> str:
    if not isinstance(name, str) or not name.strip() or "://" in name or name.startswith("data:"):
        _refuse(where, f"{short(name)} is not the name of a file; pictures must be files in one folder")
    return _text(name, where)


def _text(text: object, where: str) -> str:
    if not isinstance(text, str):
        _refuse(where, f"a text must be a string, not {short(text)}")
    if bad := UNENCODABLE.search(text):
        _refuse(where, f"contains {bad[0]!r} in {short(text)}, which no tokenizer can read; delete it")
    return text


def _refuse(where: str, what: object) -> NoReturn:
    raise UserError(f"{where}: {what}")
