"""Files of conversations with damaged bytes, tokens or structure. What tinyspeed reads is compared with a naive
reading.

The naive reading knows nothing of chunks, spans, templates or offsets: it takes the file's JSON as Python reads it, and
says, without white space, what the model must see of a record and what it must learn.
"""

import contextlib
import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet as pq
from slow.attacks.damaged_input import mutations
from slow.attacks.damaged_input.cases import Case
from support import tiny
from support.album import album

from tinyspeed.data.conversations import Conversations
from tinyspeed.recipe import DataSection
from tinyspeed.rows import IGNORE

TOKENS = (tiny.SIDE // tiny.PATCH) ** 2  # of a picture
ROLES = {"human": "user", "gpt": "assistant"}
SYSTEM = "Be brief."


@dataclass
class Written:
    """A file, and its records as plain JSON has them; None where it is not JSON."""

    name: str
    content: bytes
    records: list | None
    note: str


class Part:
    def __init__(self, home: Path):
        self.home, self.processor = home, tiny.processor("llava")
        file = Path(album(home, 4))
        self.raws = json.loads(file.read_text())
        file.unlink()
        self.chats = [as_messages(raw) for raw in self.raws]

    def case(self, draw: random.Random) -> Case:
        kind = draw.choice(("json", "jsonl", "chat", "parquet"))
        made = parquet(draw, self.raws, self.home) if kind == "parquet" else self.text(draw, kind)
        file = self.home / made.name
        file.write_bytes(made.content)
        skip, cut = draw.random() < 0.5, draw.random() < 0.2
        data = DataSection(
            kind="chat", file=str(file), images=str(self.home / "images"),
            template="plain" if draw.random() < 0.1 else "chat", system=SYSTEM if draw.random() < 0.2 else "",
            max_rows=400 if cut or draw.random() < 0.2 else 0, too_long="cut" if cut else "error", skip_bad=skip,
            workers=0,
        )  # fmt: skip
        looks = draw.random() < 0.2
        return Case(
            f"{kind} {'plain' if data.template == 'plain' else 'as chat'}",
            lambda: self.read(data, made, looks),
            names=(file.name,),
            opens=(file, self.home / "images", self.home / "cache"),
            note=f"{made.note}, {data.template}, skip {skip}",
        )

    def text(self, draw: random.Random, kind: str) -> Written:
        records = self.chats if kind == "chat" else self.raws
        note, faults = [], draw.choice((0, 1, 1, 1, 2, 4))
        for _ in range(faults):
            if draw.random() < 0.6:
                records, what = mutations.mutate_structure(draw, records)
                note.append(what)
        lines = kind == "jsonl" and isinstance(records, list) and records
        ascii_only = draw.random() < 0.5
        with_marks = [json.dumps(raw, ensure_ascii=ascii_only) for raw in (records if lines else [records])]
        text = draw.choice(("\n", "\r\n", "\n\n")).join(with_marks)
        while len(note) < faults and draw.random() < 0.6:
            text, what = mutations.mutate_tokens(draw, text)
            note.append(what)
        content = text.encode(errors="surrogatepass")
        if len(note) < faults:
            content, what = mutations.mutate_file(draw, text, 0.8)
            note.append(what)
        return Written(f"a.{'jsonl' if lines else 'json'}", content, plainly(content), "; ".join(note))

    def read(self, data: DataSection, made: Written, looks: bool) -> None:
        source = Conversations(data, self.processor, self.home / "cache", bar=False)
        count = len(source.records)
        assert len(source) + len(source.bad) == count > 0, "records are missing"
        assert data.skip_bad or not source.bad
        for message in source.bad:
            if not message.startswith(f"{made.name}: record "):
                raise AssertionError(f"skipped without saying which: {message!r:.300}")
        if made.records is not None:
            assert len(made.records) == count, f"{count} records, but the file has {len(made.records)}"
        for i, number in enumerate(source.good.tolist() if made.records is not None else []):
            self.compare(data, source, i, made.records[number])
        if looks:
            for i in range(len(source)):
                example = source.example(i)
                pictures = len(example.visual.get("pixel_values", ()))
                assert pictures == len(source.lengths(i)[1]), "a picture is lost"

    def compare(self, data: DataSection, source: Conversations, i: int, raw: object) -> None:
        assert raw is not None, "a record was read that is not JSON"
        assert not repeated(raw), "a key is there twice, and one value was lost"
        ids, labels = source.text(i)
        text, visual, learned = source.lengths(i)
        seen, learns, pictures = expected(data, raw)
        assert visual == [TOKENS] * pictures == [TOKENS] * (ids == tiny.IMAGE).sum().floor_divide(TOKENS).item()
        assert len(ids) == text + sum(visual)
        ends = 0 if data.template == "plain" else learns.count("</s>")
        control = [int((ids == token).sum()) for token in (tiny.BOS, tiny.EOS, tiny.PAD)]
        assert control[::2] == [1, 0], f"a record's text was read as control tokens: {control}"
        shorter = data.too_long == "cut" and control[1] < ends
        assert control[1] == ends or shorter, f"{control[1]} ends of {ends} answers"
        assert learned == (labels[1:] != IGNORE).sum() > 0
        assert (ids[labels != IGNORE] == labels[labels != IGNORE]).all()
        got = without_spaces(self.words(ids)).replace("<image>" * TOKENS, "<image>")
        taught = without_spaces(self.words(labels[labels != IGNORE]))
        if len(ids) == data.max_rows and data.too_long == "cut":
            got, taught = got.rstrip("\ufffd"), taught.rstrip("\ufffd")
            assert seen.startswith(got), f"{got!r} instead of {seen!r}"
            assert learns.startswith(taught), f"learns {taught!r} instead of {learns!r}"
            return
        assert got == seen, f"{got!r} instead of {seen!r}"
        assert taught == learns, f"learns {taught!r} instead of {learns!r}"

    def words(self, ids) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def plainly(content: bytes) -> list | None:
    """The records of a file as Python reads them all at once, from a list or from one object a line; None for what is
    not JSON."""
    text = content.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape").strip(" \t\r\n")
    if text.startswith("["):
        return loaded(text)
    return [loaded(line) for line in text.split("\n") if line.strip(" \t\r\n")]


class Repeated(dict):
    """An object that has a key twice, so that one of its values is lost."""


def repeated(value: object) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, Repeated) or any(map(repeated, inside))


def loaded(text: str) -> object:
    try:
        kind = lambda pairs: dict if len(dict(pairs)) == len(pairs) else Repeated
        return json.loads(text, object_pairs_hook=lambda pairs: kind(pairs)(pairs))
    except (ValueError, RecursionError):
        return None


def without_spaces(text: str) -> str:
    return "".join(text.split())


def expected(data: DataSection, raw: dict) -> tuple[str, str, int]:
    """What the model sees of a record and what it learns, without white space, and the number of pictures."""
    key = "conversations" if raw.get("conversations") is not None else "messages"
    given = raw["image"] if raw.get("image") is not None else raw.get("images")
    listed = len(given) if isinstance(given, list) else int(given is not None)
    turns, total = [], 0
    for turn in raw[key]:
        role, content = (turn["from"], turn["value"]) if key == "conversations" else (turn["role"], turn["content"])
        if isinstance(content, str):
            count, text = content.count("<image>"), content.replace("<image>", "")
        else:
            count = sum(part["type"] == "image" for part in content)
            text = "".join(part["text"] for part in content if part["type"] == "text")
        turns.append([ROLES.get(role, role), count, without_spaces(text)])
        total += count
    if not total and listed:
        next(turn for turn in turns if turn[0] == "user")[1] = total = listed
    answers = [text for role, _, text in turns if role == "assistant"]
    if data.template == "plain":
        return "<s>" + "<image>" * total + answers[0], answers[0], total
    if data.system and turns[0][0] != "system":
        turns.insert(0, ["system", 0, without_spaces(data.system)])
    names = {"user": "USER:", "assistant": "ASSISTANT:", "system": ""}
    seen = [names[role] + "<image>" * n + text + "</s>" * (role == "assistant") for role, n, text in turns]
    return "<s>" + "".join(seen), "".join(answer + "</s>" for answer in answers), total


def as_messages(raw: dict) -> dict:
    """The same record as chat messages, whose content is a string or a list of parts."""
    names = raw.get("image", [])
    names = names if isinstance(names, list) else [names]
    messages, rest, parts = [], iter(names), len(names) != 2
    for turn in raw["conversations"]:
        text, role = turn["value"], ROLES[turn["from"]]
        pictures = text.count("<image>")
        if parts or role == "assistant":
            text = text.replace("<image>\n", "")
            content = [{"type": "image", "image": next(rest)} for _ in range(pictures)]
            messages.append({"role": role, "content": [*content, {"type": "text", "text": text}]})
        else:
            messages.append({"role": role, "content": text})
    return {"id": raw["id"], "messages": messages} | ({} if parts else {"images": names})


def parquet(draw: random.Random, raws: list, home: Path) -> Written:
    """Pictures as bytes or as names, columns of unexpected types, or bytes that are not parquet any more."""
    rows, note = [dict(raw) for raw in raws], []
    inside = draw.random() < 0.5
    for row in rows:
        names = row.get("image", [])
        row["images"] = [
            {"bytes": (home / "images" / name).read_bytes(), "path": name} if inside else {"bytes": None, "path": name}
            for name in (names if isinstance(names, list) else [names])
        ]
        row.pop("image", None)
    if draw.random() < 0.5:
        rows, what = mutations.mutate_structure(draw, rows)
        note.append(what)
    columns = {}
    for key in dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row):
        values = [row.get(key) if isinstance(row, dict) else None for row in rows]
        try:
            columns[str(key)] = pa.array(values)
        except (pa.ArrowException, TypeError, UnicodeEncodeError, OverflowError):
            columns[str(key)] = pa.array([json.dumps(value, default=str) for value in values])
    if draw.random() < 0.3:
        column = draw.choice(("id", "image", "images", "conversations", "messages", "video"))
        strange = (
            pa.array([2**62] * len(rows), pa.timestamp("us")),
            pa.array([2**31 - 1] * len(rows), pa.date32()),
            pa.array([2**62] * len(rows), pa.duration("ns")),
            pa.array([1] * len(rows), pa.decimal128(5)),
            pa.array([b"\xff"] * len(rows), pa.binary()),
            pa.nulls(len(rows)),
            pa.Array.from_buffers(pa.string(), len(rows), [None, *pa.array([b"\xff"] * len(rows)).buffers()[1:]]),
            pa.array([[("a", 1)]] * len(rows), pa.map_(pa.string(), pa.int64())),
            pa.array([float("nan")] * len(rows)),
            pa.array(["x"] * len(rows)).dictionary_encode(),
            pa.array([[]] * len(rows), pa.list_(pa.null())),
        )
        columns[column] = draw.choice(strange)
        note.append(f"{column} is {columns[column].type}")
    keys = list(columns)
    if keys and draw.random() < 0.05:
        keys.append(draw.choice(keys))
        note.append(f"two columns {keys[-1]}")
    table = pa.Table.from_arrays(
        [columns[key] for key in keys], [key.encode(errors="replace").decode() for key in keys]
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression=draw.choice(("NONE", "SNAPPY", "ZSTD", "GZIP")), row_group_size=2)
    content, records = buffer.getvalue(), None
    if not note or draw.random() < 0.3:
        content, what = mutations.mutate_bytes(draw, content)
        note.append(what)
    with contextlib.suppress(pa.ArrowException, OSError, ValueError, OverflowError):
        records = unpacked(pq.read_table(io.BytesIO(content)).to_pylist())
    return Written("a.parquet", content, records, "; ".join(note))


def unpacked(rows: list[dict]) -> list[dict]:
    """Rows as the records of a JSON file: pictures have some name."""

    for row in rows:
        for key in ("image", "images"):
            if isinstance(row.get(key), list):
                row[key] = ["x"] * len(row[key])
    return rows
