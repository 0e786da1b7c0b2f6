"""Records: what a file says comes out, whatever its format, and what it cannot mean is an error that says where.

Conversations are drawn as plain outlines. From an outline each format is written one way, and the expected `Record`
another, so the two can only agree if the reading between them is right.
"""

import copy
import json
import multiprocessing
import pickle
import re
import sys
import threading
import tracemalloc

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tinyspeed.data import parquet as parquet_files
from tinyspeed.data import record_files, record_formats
from tinyspeed.data.record_files import RecordFile
from tinyspeed.data.record_formats import IMAGE, MARKER, Record, Turn, parse
from tinyspeed.util.errors import UserError

WHERE = "train.json: record 17"

# Outlines: (system or None, [(question, answer), ...]); a question is a list of texts and file names, as Pictures.


class Picture(str):
    """The file name of a picture, where it stands in a question."""


characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
texts = st.text(characters, min_size=1, max_size=12).filter(lambda t: t.strip() and MARKER not in t)
trimmed = texts.map(str.strip)
names = st.text("abcü猫😀 ./-", min_size=1, max_size=8).map(lambda name: name + ".png")
blanks = st.sampled_from(["", " ", "\n", " \n\t"])


@st.composite
def questions(draw):
    """No two texts side by side, so that a string with markers can say it; without pictures, text as it comes."""
    pictures = draw(st.lists(names, max_size=3))
    if not pictures:
        return [draw(texts)]
    parts = [draw(st.none() | trimmed)]
    for name in pictures:
        parts += [Picture(name), draw(st.none() | trimmed)]
    return [part for part in parts if part is not None]


outlines = st.tuples(st.none() | texts, st.lists(st.tuples(questions(), trimmed), min_size=1, max_size=3))
ids = st.none() | st.integers() | st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8)


def pictures_of(outline):
    return [str(part) for question, _ in outline[1] for part in question if isinstance(part, Picture)]


def expected(outline, where):
    system, rounds = outline
    turns = [Turn("system", (system,))] if system is not None else []
    for question, answer in rounds:
        turns.append(Turn("user", tuple(IMAGE if isinstance(part, Picture) else part for part in question)))
        turns.append(Turn("assistant", (answer,)))
    return Record(where, tuple(pictures_of(outline)), tuple(turns))


def said(outline):
    system, rounds = outline
    return ([("system", system)] if system is not None else []) + [
        turn for question, answer in rounds for turn in (("user", question), ("assistant", answer))
    ]


def with_markers(content, draw):
    """A question as one string; an answer with white space around it; a system text as it is."""
    if not isinstance(content, list):
        return content
    markers = draw(blanks) + MARKER + draw(blanks)
    return "".join(markers if isinstance(part, Picture) else part for part in content)


def speaker(role, draw):
    """A role, by one of its names."""
    others = {"system": "system", "user": "human", "assistant": "gpt"}
    return draw(st.sampled_from([role, others[role]])) or role


def llava(outline, draw):
    turns = [{"from": speaker(role, draw), "value": with_markers(content, draw)} for role, content in said(outline)]
    for turn in turns[-1::-2]:
        if turn["from"] in ("gpt", "assistant"):
            turn["value"] = draw(blanks) + turn["value"] + draw(blanks)
    pictures = pictures_of(outline)
    if not pictures:
        return {"conversations": turns}
    return {"conversations": turns, "image": pictures[0] if len(pictures) == 1 and draw(st.booleans()) else pictures}


def chat_strings(outline, draw):
    turns = [{"role": speaker(role, draw), "content": with_markers(content, draw)} for role, content in said(outline)]
    return {"images": pictures_of(outline), "messages": turns}


def chat_parts(outline, draw):
    """Content as lists, in which some image parts name their file, with the nulls that parquet leaves."""
    turns, listed = [], []
    for role, content in said(outline):
        parts = []
        for part in content if isinstance(content, list) else [content]:
            if not isinstance(part, Picture):
                parts.append({"type": "text", "text": part})
            elif draw(st.booleans()):
                parts.append({"type": "image", draw(st.sampled_from(["image", "path", "url"])): str(part)})
            else:
                parts.append({"type": "image"})
                listed.append(str(part))
        if draw(st.booleans()):
            parts = [{"image": None, "text": None, **part} for part in parts] + [{"type": "text", "text": ""}]
        turns.append({"role": role, "content": parts})
    return {"messages": turns, "images": listed or None, "conversations": None}


FORMATS = {"llava": llava, "strings": chat_strings, "parts": chat_parts}


@st.composite
def written(draw, kinds=tuple(FORMATS)):
    """(raw record, outline, id)"""
    outline, name = draw(outlines), draw(ids)
    raw = FORMATS[draw(st.sampled_from(kinds))](outline, draw)
    if name is not None:
        raw["id"] = name
    if draw(st.booleans()):
        raw |= {"source": "somewhere", "scores": [0.5, float("nan")], "imaged": 3}  # data about the data
        raw |= {"language": None, "system": "", "tools": []}  # and nothing at all
    return raw, outline, name


def located(where, name):
    return where if name is None else f"{where} (id {name})"


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    message.encode()  # it can be printed
    assert "\n" not in message
    assert len(message) < 1500
    return message


def outcome(raw):
    """The record, or the words of its refusal."""
    try:
        return parse(raw, WHERE)
    except UserError as error:
        return str(error)


# Reading


@given(written())
def test_every_format_means_the_same(case):
    raw, outline, name = case
    before = copy.deepcopy(raw)
    assert parse(raw, WHERE) == expected(outline, located(WHERE, name))
    assert str(raw) == str(before), "parse is pure"


@given(outlines, st.lists(names, min_size=1, max_size=3))
def test_pictures_of_strings_without_markers_go_before_the_first_question(outline, pictures):
    system, rounds = outline
    plain = (system, [([part for part in question if not isinstance(part, Picture)], a) for question, a in rounds])
    assume(all(question for question, _ in plain[1]))
    plain = (system, [([" ".join(question)], answer) for question, answer in plain[1]])
    raw = chat_strings(plain, lambda _: "") | {"images": pictures}
    first = [Picture(name) for name in pictures] + plain[1][0][0]
    assert parse(raw, WHERE) == expected((system, [(first, plain[1][0][1]), *plain[1][1:]]), WHERE)


def test_by_example():
    raw = {
        "id": 7,
        "image": ["a.jpg", "b/c.jpg"],
        "conversations": [
            {"from": "system", "value": " Be brief.\n"},
            {"from": "human", "value": "  First <image>\n<image> \n second?\n"},
            {"from": "gpt", "value": " A <b>cat</b>.\n"},
            {"from": "human", "value": "\nSure? "},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    turns = (
        Turn("system", (" Be brief.\n",)),
        Turn("user", ("  First", IMAGE, IMAGE, "second?\n")),
        Turn("assistant", ("A <b>cat</b>.",)),
        Turn("user", ("\nSure? ",)),
        Turn("assistant", ("Yes.",)),
    )
    assert parse(raw, WHERE) == Record(f"{WHERE} (id 7)", ("a.jpg", "b/c.jpg"), turns)


def test_a_captioning_record_needs_no_words():
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": "A cat."}]
    record = parse({"messages": turns, "image": "a.jpg"}, WHERE)
    assert record.turns[0] == Turn("user", (IMAGE,))


def test_an_answer_in_parts_is_one_text():
    parts = [{"type": "text", "text": text} for text in (" ", "A ", "cat. ")]
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": parts}]
    assert parse({"messages": turns}, WHERE).turns[1] == Turn("assistant", ("A cat.",))


@pytest.mark.parametrize(("name", "shown"), [("a b", "a b"), ("ü猫", "ü猫"), (0, "0"), ("a\nb", r"'a\nb'")])
def test_where_has_the_id(name, shown):
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    assert parse({"conversations": turns, "id": name}, WHERE).where == f"{WHERE} (id {shown})"


# Refusing

LLAVA = {
    "id": "x",
    "image": "a.jpg",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ],
}
CHAT = {
    "id": "x",
    "images": ["a.jpg"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ],
}


def at(raw, *path):
    for key in path:
        raw = raw[key]
    return raw


def put(*path):
    """put(..., key, value): a change that sets one thing."""

    def change(raw):
        at(raw, *path[:-2])[path[-2]] = path[-1]

    return change


def drop(*path):
    return lambda raw: at(raw, *path[:-1]).pop(path[-1])


def rename(old, new):
    return lambda raw: raw.update({new: raw.pop(old)})


def swap(i, j):
    def change(raw):
        turns = raw.get("conversations") or raw["messages"]
        turns[i], turns[j] = turns[j], turns[i]

    return change


C, M, PART = "conversations", "messages", (1, "content", 0)
WRONG = (None, 3, 0.5, True, [], {}, [3], [[]], "", " ")  # no content, role, or list of turns is any of these
MISTAKES = [
    ("only", LLAVA, drop(C)),
    ("'conversations'", LLAVA, rename(C, "conversation")),
    ("'messages'", CHAT, rename(M, "mesages")),
    ("both", LLAVA, put(M, CHAT[M])),
    ("both", LLAVA, put("images", ["b.jpg"])),
    ("'image'", LLAVA, rename("image", "imgage")),
    ("'images'", CHAT, rename("images", "imags")),
    *((C, LLAVA, put(C, value)) for value in WRONG[1:] if value != [3] and value != [[]]),
    *((M, CHAT, put(M, value)) for value in ("x", {"role": "user"})),
    *(("must be an object", LLAVA, put(C, 1, value)) for value in (None, 3, "x", [])),
    ("'human'", LLAVA, put(C, 1, "from", "humann")),
    ("assistant, gpt, human, system, user", LLAVA, put(C, 1, "from", "q")),
    *(("mean 'assistant'", raw, put(*path, "assistent")) for raw, path in [
        (LLAVA, (C, 2, "from")), (CHAT, (M, 2, "role")),
    ]),
    ("'user'", CHAT, put(M, 1, "role", "users")),
    ("role", CHAT, put(M, 4, "role", "tool")),
    *(("from", LLAVA, put(C, turn, "from", value)) for turn in range(5) for value in WRONG[:-2]),
    *(("value", LLAVA, put(C, turn, "value", value)) for turn in range(5) for value in WRONG[:-2]),
    *(("", CHAT, put(M, turn, "content", value)) for turn in range(5) for value in WRONG[: -2 if turn == 1 else None]),
    *(("empty", LLAVA, put(C, turn, "value", value)) for turn in (0, 2, 3, 4) for value in ("", " \n")),
    *(("", LLAVA, drop(C, turn, key)) for turn in range(5) for key in ("from", "value")),
    *(("", CHAT, drop(M, turn, key)) for turn in range(5) for key in ("role", "content")),
    *(("", LLAVA, drop(C, turn)) for turn in range(1, 5)),
    *(("out of turn", LLAVA, swap(i, j)) for i in range(5) for j in range(i) if (i - j) % 2 or j == 0),
    ("out of turn", CHAT, lambda raw: raw[M].insert(1, raw[M][0])),
    ("end with an answer", CHAT, lambda raw: raw[M].append(raw[M][3])),
    ("end with an answer", LLAVA, put(C, [LLAVA[C][0]])),
    ("0 places for 1", LLAVA, put(C, 1, "value", "What?")),
    ("2 places for 1 picture;", LLAVA, put(C, 1, "value", "<image><image> What?")),
    ("2 places for 1 picture;", LLAVA, put(C, 3, "value", "<image> What?")),
    ("1 place for 0 pictures", LLAVA, drop("image")),
    ("1 place for 2 pictures", LLAVA, put("image", ["a.jpg", "b.jpg"])),
    ("1 place for 2 pictures", CHAT, put("images", ["a.jpg", "b.jpg"])),
    ("0 places for 1", CHAT, drop(M, *PART)),
    ("0 places for 1", CHAT, put(M, *PART, "image", "b.jpg")),
    *((MARKER, raw, put(*path, "An <image>.")) for raw, path in [
        (LLAVA, (C, 0, "value")), (LLAVA, (C, 2, "value")), (CHAT, (M, 0, "content")), (CHAT, (M, 2, "content")),
        (CHAT, (M, 1, "content", 1, "text")), (CHAT, (M, 4, "content", 0, "text")),
    ]),
    ("picture", CHAT, put(M, 2, "content", [{"type": "image"}])),
    *(("", LLAVA, put("image", value)) for value in (3, True, {}, "", " ", [], [3], [None], ["a", "b"], [["a.jpg"]])),
    *(("not the name of a file", raw, change) for url in ("http://a.b/c.jpg", "file:///a.jpg", "data:image/png;base64,")
      for raw, change in [(LLAVA, put("image", url)), (CHAT, put(M, *PART, "url", url))]),
    *(("", CHAT, put(M, *PART, "path", value)) for value in (3, [], {}, "")),
    ("both", CHAT, put(M, *PART, {"type": "image", "image": "a.jpg", "path": "b.jpg"})),
    ("'text'", CHAT, put(M, *PART, "text", "lost")),
    ("'image'", CHAT, put(M, 1, "content", 1, "image", "lost.jpg")),
    ("'image_url'", CHAT, put(M, *PART, "image_url", {"url": "a.jpg"})),
    *(("type", CHAT, put(M, *PART, value)) for value in (3, None, "x", [], {}, {"type": "video"}, {"type": []})),
    ("type", CHAT, put(M, *PART, {"text": "x"})),
    ("'image'", CHAT, put(M, *PART, {"type": "image", "imge": "a.jpg"})),
    ("text must be", CHAT, put(M, 1, "content", 1, {"type": "text"})),
    ("text must be", CHAT, put(M, 1, "content", 1, "text", 5)),
    ("'content'", LLAVA, put(C, 1, "content", "lost")),
    ("'value'", CHAT, put(M, 1, "value", "lost")),
    ("'tool_calls'", CHAT, put(M, 2, "tool_calls", [{"name": "f"}])),
    *((repr(key), LLAVA, put(key, "lost")) for key in ("system", "tools", "video", "videos", "audio", "audios")),
    *((repr(key), LLAVA, put(C, 1, key, "lost")) for key in ("text", "content", "image", "images", "path", "url")),
    *((repr(bad)[1:-1], raw, put(*path, f"a{bad}b")) for bad in ("\0", "\ud800", "\udfff") for raw, path in [
        (LLAVA, (C, 0, "value")), (LLAVA, (C, 1, "value")), (LLAVA, (C, 4, "value")), (LLAVA, ("image",)),
        (CHAT, (M, 1, "content", 1, "text")), (CHAT, (M, 3, "content")), (CHAT, ("images", 0)),
    ]),
    *(("id must", LLAVA, put("id", value)) for value in (0.5, True, [], {}, [["x"]])),
]  # fmt: skip


@pytest.mark.parametrize("turn", range(5))
def test_a_mistake_in_a_turn_is_located(turn):
    for value in (3, ""):
        raw = copy.deepcopy(LLAVA | {"image": []})
        raw["conversations"][1]["value"] = "What?"
        raw["conversations"][turn]["value"] = value
        message = refusal(parse, raw, WHERE)
        assert message.startswith(WHERE)
        assert f"turn {turn + 1}" in message


def test_the_records_that_mistakes_are_made_in_are_good():
    assert parse(LLAVA, WHERE).turns[1:] == parse(CHAT, WHERE).turns[1:]


@pytest.mark.parametrize(("says", "good", "mistake"), MISTAKES)
def test_a_mistake_is_an_error_that_says_so(says, good, mistake):
    raw = copy.deepcopy(good)
    mistake(raw)
    message = refusal(parse, raw, WHERE)
    assert message.startswith(WHERE)
    assert says in message


@pytest.mark.parametrize("refuse", [parse, lambda raw, where: record_formats.worth_reading(list(raw), where)])
def test_a_record_of_no_known_format_is_answered_with_one_that_can_be_read(refuse):
    message = refusal(refuse, {"image": "b.jpg", "question": "What is it?", "answer": "A dog."}, WHERE)
    assert "['image', 'question', 'answer']" in message
    shown = parse(json.loads(message[message.index("{") :]), WHERE)
    assert shown.images == ("a.jpg",)
    assert [turn.role for turn in shown.turns] == ["user", "assistant"]
    assert IMAGE in shown.turns[0].parts


@pytest.mark.parametrize("raw", [None, 3, "x", [], [LLAVA], {}, True])
def test_what_is_no_record_is_refused(raw):
    assert refusal(parse, raw, WHERE).startswith(WHERE)


@given(case=written(kinds=("llava", "strings")), data=st.data())
def test_no_mistake_in_any_record_passes(case, data):
    raw, outline, _ = case
    key = "messages" if "messages" in raw else "conversations"
    role, content = {"messages": ("role", "content"), "conversations": ("from", "value")}[key]
    turns, i = raw[key], data.draw(st.integers(0, len(raw[key]) - 1))
    turn, question, answer, names = turns[i], turns[-2], turns[-1], pictures_of(outline)
    mistakes = {
        "one key less": lambda: turn.pop(data.draw(st.sampled_from([role, content]))),
        "one turn twice": lambda: turns.insert(i, turn),
        "no last turn": lambda: turns.pop(),
        "another role": lambda: turn.update({role: data.draw(st.sampled_from(["", "User", "bot", "tool"]))}),
        "another type": lambda: turn.update({content: data.draw(st.none() | st.integers() | st.booleans())}),
        "blank answer": lambda: answer.update({content: data.draw(blanks)}),
        "picture in an answer": lambda: answer.update({content: answer[content] + MARKER}),
        "a marker more": lambda: question.update({content: MARKER + question[content] + MARKER * len(names)}),
        "a NUL": lambda: turn.update({content: turn[content] + "\0"}),
        "half a character": lambda: turn.update({content: "\udc80" + turn[content]}),
        "both kinds": lambda: raw.update({"messages": turns, "conversations": turns}),
        "both keys": lambda: raw.update({"image": "a.jpg", "images": ["a.jpg"]}),
    }
    if key == "conversations":  # by TRL's convention this can mean something in a chat
        mistakes["a picture more"] = lambda: raw.update(image=[*names, "a.jpg"])
    mistakes[data.draw(st.sampled_from(sorted(mistakes)))]()
    assert refusal(parse, raw, WHERE).startswith(WHERE)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
WORDS = [
    *record_formats.UNREAD,
    *record_formats.UNREAD_INSIDE,
    *record_formats.FORMATS,
    *record_formats.PICTURES,
    "id",
    "type",
    "role",
    "from",
]
SAYINGS = ["user", "assistant", "system", "human", "gpt", "text", "image", "a.jpg", "What?", "<image>\nWhat?", ""]
anything = st.recursive(
    leaves | st.sampled_from(SAYINGS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(), inner, max_size=4),
    max_leaves=20,
)


def broken(raw, record):
    """The laws of records that pass which this one breaks."""
    spoken = [turn.role for turn in record.turns]
    parts = [part for turn in record.turns for part in turn.parts]
    given = []
    for turn in raw.get("messages") or raw["conversations"]:
        content = turn.get("content", turn.get("value"))
        given += [content.replace(MARKER, "")] if isinstance(content, str) else [p.get("text") or "" for p in content]
    got = "".join(part for part in parts if part is not IMAGE)
    laws = {
        "questions and answers take turns": spoken[spoken[0] == "system" :]
        == ["user", "assistant"] * (len(spoken) // 2),
        "no turn is empty": all(turn.parts for turn in record.turns),
        "every picture has its place": len(record.images) == parts.count(IMAGE),
        "no text is lost": "".join(got.split()) == "".join("".join(given).split()),
    }
    return [law for law, holds in laws.items() if not holds]


@given(anything)
def test_any_json_is_a_record_or_an_error(raw):
    made = outcome(raw)
    assert made.startswith(WHERE) if isinstance(made, str) else not broken(raw, made)


@given(good=st.sampled_from([LLAVA, CHAT]), changes=st.lists(st.tuples(st.integers(0, 99), anything), max_size=2))
@example(good=LLAVA, changes=[])
@example(good=CHAT, changes=[])
def test_a_record_with_anything_in_any_place_is_a_record_or_an_error(good, changes):
    raw = copy.deepcopy(good)
    for place, value in changes:
        spots, stack = [], [raw]
        while stack:
            inside = stack.pop()
            if isinstance(inside, dict | list):
                keys = inside if isinstance(inside, dict) else range(len(inside))
                spots += [(inside, key) for key in keys]
                stack += [inside[key] for key in keys]
        inside, key = spots[place % len(spots)]
        inside[key] = value
    made = outcome(raw)
    assert made.startswith(WHERE) if isinstance(made, str) else not broken(raw, made)


# Files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


JSONISH = [b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\\u", b"1", b"e5", b".", b"-", b"\xf0\x9f", b"NaN", b" "]


def dumped(raws, kind, draw):
    """A file's text, in one of the many ways that JSON can be written."""
    how = {"ensure_ascii": draw(st.booleans())}
    if kind == "jsonl":
        ends = st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"])
        lines = [json.dumps(raw, **how) + draw(ends) for raw in raws]
        return draw(blanks) + "".join(lines[:-1]) + lines[-1].rstrip() + draw(blanks)
    how["indent"] = draw(st.sampled_from([None, 0, 2]))
    how["separators"] = draw(st.sampled_from([(",", ":"), (" , ", " : ")]))
    return draw(blanks) + json.dumps(raws, **how) + draw(blanks)


@given(
    cases=st.lists(written(), min_size=1, max_size=4),
    kind=st.sampled_from(["json", "jsonl"]),
    chunk=st.integers(1, 70) | st.just(1 << 20),
    data=st.data(),
)
def test_a_file_gives_back_what_was_written(folder, cases, kind, chunk, data):
    file = folder / f"data.{kind}"
    bom = data.draw(st.sampled_from(["utf-8", "utf-8-sig"]))
    file.write_bytes(dumped([raw for raw, _, _ in cases], kind, data.draw).encode(bom))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "CHUNK", chunk)
        read = RecordFile(file)
    want = [expected(o, located(f"data.{kind}: record {n}", name)) for n, (_, o, name) in enumerate(cases, 1)]
    assert len(read) == len(want)
    assert list(read) == want
    assert read[-1] == want[-1]
    assert pickle.loads(pickle.dumps(read))[0] == want[0]
    assert read.folder == folder


def attempt(file):
    """How many records a file has, or None if it is refused; and every error, of reading each, that is not as it should
    be: printable, and of a record with its place."""
    try:
        read = RecordFile(file)
    except UserError as error:
        return None, [] if str(error).isprintable() else [error]
    amiss = []
    for i in range(len(read)):
        try:
            read[i]
        except UserError as error:
            amiss += [] if str(error).startswith(f"{file.name}: record {i + 1}") else [error]
    return len(read), amiss


def oracle(content):
    try:
        return json.loads(content.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return None


@given(data=st.data(), chunk=st.integers(1, 40))
def test_a_list_is_read_just_when_it_is_json(folder, data, chunk):
    """Anything in a list, damaged or not: what Python's json reads whole, the sliding window reads in pieces."""
    values = data.draw(st.lists(anything, max_size=4))
    content = bytearray(dumped(values, "json", data.draw).encode(errors="surrogatepass"))
    for _ in range(data.draw(st.integers(0, 2))):
        place = data.draw(st.integers(0, len(content)))
        new = data.draw(st.sampled_from(JSONISH) | st.binary(max_size=2))
        content[place : place + data.draw(st.integers(0, 2))] = new
    file = folder / "list.json"
    file.write_bytes(content)
    want = oracle(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "CHUNK", chunk)
        got, amiss = attempt(file)
    assert not amiss
    if content.lstrip(b" \t\r\n").startswith((b"[", b"\xef\xbb\xbf[")):
        assert got == (len(want) if want else None)


@given(
    pieces=st.lists(st.sampled_from(JSONISH) | st.binary(max_size=4), max_size=12),
    start=st.sampled_from([b"", b"[", b"{", b"\xef\xbb\xbf"]),
)
def test_any_bytes_are_records_or_errors(folder, pieces, start):
    (folder / "bytes.json").write_bytes(start + b"".join(pieces))
    count, amiss = attempt(folder / "bytes.json")
    assert not amiss
    assert count != 0, "a file without records is refused"


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_list_cut_anywhere_is_refused(folder, monkeypatch, chunk):
    monkeypatch.setattr(record_files, "CHUNK", chunk)
    content = json.dumps([LLAVA, 12345, {"猫": "😀"}, CHAT], ensure_ascii=False).encode()
    for end in {*range(len(content))[::5], *range(len(content))[400:470], len(content) - 1}:
        (folder / "cut.json").write_bytes(content[:end])
        assert attempt(folder / "cut.json") == (None, [])


def test_of_lines_cut_anywhere_the_whole_ones_are_left(folder):
    lines = [json.dumps(LLAVA).encode() + b"\n", json.dumps(CHAT).encode() + b"\n"]
    content, good = b"".join(lines), parse(LLAVA, "cut.jsonl: record 1")
    for end in range(0, len(content), 7):
        (folder / "cut.jsonl").write_bytes(content[:end])
        if end < len(lines[0]) - 1:
            assert "cut.jsonl" in refusal(lambda: RecordFile(folder / "cut.jsonl")[0])
        else:
            read = RecordFile(folder / "cut.jsonl")
            assert read[0] == good
            if len(read) > 1:
                assert "record 2: cannot read the JSON at byte" in refusal(lambda read=read: read[1])


@pytest.mark.parametrize(
    ("content", "number", "byte"),
    [
        (b'[{"a": 1}, {"b": ]', 1, 17),
        ('[{"ü猫😀": 1}, {"b" 2}, 3]'.encode(), 1, 24),
        (b"[1, 2,, 3]", 2, 6),
        (b"[1, 2, ]", 2, 7),
        (b"[1 2]", 0, 3),
        (b"[1, 2", 1, 5),
        (b"[", 0, 1),
        (b'\xef\xbb\xbf [1, "\xff" 2]', 1, 12),
        (b"\xef\xbb\xbf [1, \xff]", 1, 8),
        (b"[1, 2\xf0\x9f", 1, 5),
        (b"[1, " + b"9" * 5000 + b"]", 1, 4),
        (b"[1, " + b"[" * 100_000, 1, 4),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 20, 3])
def test_broken_json_is_located(folder, monkeypatch, content, number, byte, chunk):
    monkeypatch.setattr(record_files, "CHUNK", chunk)
    (folder / "broken.json").write_bytes(content)
    message = refusal(RecordFile, folder / "broken.json")
    assert message.startswith(f"broken.json: broken JSON after record {number}, at byte {byte}: ")


def test_what_follows_the_list_is_an_error(folder):
    (folder / "two.json").write_bytes(b"[1, 2]\n [3]")
    assert "its list of 2 records, at byte 6" in refusal(RecordFile, folder / "two.json")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"[ ]", "empty list"),
        (b"hello", "neither"),
        (b'"hello"', "neither"),
        (b"\xff\xfe[\0", "neither"),
        (json.dumps({"version": 1, "data": [LLAVA]}).encode(), "list of 'data'"),
        (json.dumps({"data": [LLAVA]}, indent=1).encode(), "list of 'data'"),
        (json.dumps(LLAVA, indent=1).encode(), "one JSON object"),
        (json.dumps({"a": [1], "b": [2]}).encode(), "one record a line$"),
    ],
)
def test_files_that_hold_no_records(folder, content, says):
    (folder / "none.json").write_bytes(content)
    assert re.search(f"^none.json .*{says}", refusal(RecordFile, folder / "none.json"))


def test_one_line_is_a_file_of_one_record(folder):
    (folder / "one.json").write_text(json.dumps(LLAVA))
    assert RecordFile(folder / "one.json")[0] == parse(LLAVA, "one.json: record 1")


def test_files_that_are_not_there(folder):
    assert "no file" in refusal(RecordFile, folder / "gone.json")
    assert "no file" in refusal(RecordFile, folder / "gone" / "gone.json")


def test_the_pictures_folder(folder):
    (folder / "one.jsonl").write_text(json.dumps(LLAVA))
    assert RecordFile(str(folder / "one.jsonl")).folder == folder
    assert RecordFile(folder / "one.jsonl", str(folder / "pics")).folder == folder / "pics"


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("3", "object"),
        ("null", "object"),
        ('{"id": "x"}', "neither"),
        ('{"messages": [], "a": {"k": 1, "b": 2, "k": 3}}', "'k' is there twice"),
        ('{"messages": 1, "id": 2, "messages": 3}', "'messages' is there twice"),
    ],
)
def test_a_bad_record_leaves_the_others_alone(folder, kind, entry, says):
    entries = [json.dumps(LLAVA), entry, json.dumps(CHAT)]
    (folder / f"some.{kind}").write_text(f"[{','.join(entries)}]" if kind == "json" else "\n".join(entries))
    read = RecordFile(folder / f"some.{kind}")
    assert len(read) == 3
    assert read[0].images == read[2].images == ("a.jpg",)
    message = refusal(lambda: read[1])
    assert message.startswith(f"some.{kind}: record 2")
    assert says in message


SPOILT = {  # a record with something in it that a file can have, and a record cannot
    "bytes": b'{"id": "\xff\xfe"}',
    "half bytes": b'{"id": "\xe7\x8c"}',
    "surrogate": b'{"id": "\xed\xa0\x80"}',
}
BROKEN = {"nesting": b'{"a": ' + b"[" * 100_000, "digits": b'{"a": %s}' % (b"9" * 5000), "quotes": b"{'a': 1}"}


@pytest.mark.parametrize(
    ("kind", "entry"), [*(("json", entry) for entry in SPOILT), *(("jsonl", entry) for entry in SPOILT | BROKEN)]
)
def test_a_broken_record_leaves_the_others_alone(folder, monkeypatch, kind, entry):
    monkeypatch.setattr(record_files, "CHUNK", 300)
    entries = [json.dumps(LLAVA).encode(), (SPOILT | BROKEN)[entry], json.dumps(CHAT).encode()]
    (folder / f"some.{kind}").write_bytes(b"[%s]" % b",".join(entries) if kind == "json" else b"\n".join(entries))
    read = RecordFile(folder / f"some.{kind}")
    assert read[0].images == read[2].images == ("a.jpg",)
    start = len(entries[0]) + 1 + (kind == "json")
    assert refusal(lambda: read[1]).startswith(
        f"some.{kind}: record 2: cannot read the JSON at byte {start} of the file: "
    )


def test_numbers_outside_are_index_errors(folder):
    (folder / "two.jsonl").write_text(f"{json.dumps(LLAVA)}\n{json.dumps(CHAT)}")
    read = RecordFile(folder / "two.jsonl")
    assert read[-2] == read[0]
    for i in (2, -3):
        with pytest.raises(IndexError):
            read[i]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_records_have_a_largest_size(folder, monkeypatch, kind):
    monkeypatch.setattr(record_files, "LARGEST", 1000)
    monkeypatch.setattr(record_files, "CHUNK", 100)
    file = folder / f"large.{kind}"
    for size in (1000, 1001, 5000):
        entries = [json.dumps(LLAVA), json.dumps(LLAVA | {"notes": ""}), json.dumps(CHAT)]
        entries[1] = json.dumps(LLAVA | {"notes": "x" * (size - len(entries[1]))})
        assert len(entries[1]) == size
        file.write_text(f"[{', '.join(entries)}]" if kind == "json" else "\n".join(entries) + "\n")
        if size + (kind == "jsonl") <= 1000:
            assert len(RecordFile(file)) == 3
        elif size > 1001 or kind == "json":
            message = refusal(RecordFile, file)
            assert "longer than 1,000 bytes" in message
            assert "record 2" in message or "after record 1" in message


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_memory_is_bounded(folder, monkeypatch, kind):
    monkeypatch.setattr(record_files, "LARGEST", 1 << 16)
    monkeypatch.setattr(record_files, "CHUNK", 1 << 14)
    entries = [json.dumps(LLAVA | {"notes": "x" * 2000})] * 1000
    (folder / f"long.{kind}").write_text(f"[{', '.join(entries)}]" if kind == "json" else "\n".join(entries))
    tracemalloc.start()
    read = RecordFile(folder / f"long.{kind}")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(read) == 1000
    assert peak < 600_000, "the file has 2,400,000 bytes"
    assert len(pickle.dumps(read)) < 1000 * 16 + 2000


def test_a_file_that_changes_is_noticed(folder):
    (folder / "live.jsonl").write_text(json.dumps(LLAVA))
    read = RecordFile(folder / "live.jsonl")
    (folder / "live.jsonl").write_text(json.dumps(CHAT) + " " * 100)
    assert "changed" in refusal(lambda: read[0])
    (folder / "live.jsonl").unlink()
    assert "cannot read" in refusal(lambda: read[0])


def test_processes_read_side_by_side(folder):
    raws = [LLAVA | {"id": n} for n in range(300)]
    (folder / "many.json").write_text(json.dumps(raws))
    read = RecordFile(folder / "many.json")
    want = list(read)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(read.__getitem__, range(300), chunksize=10) == want


@pytest.mark.parametrize("bar", [False, True])
def test_the_bar(parquet, tmp_path, capsys, monkeypatch, bar):
    monkeypatch.setattr(parquet_files, "BAR_AFTER", 0)
    store(parquet, tmp_path / "x.parquet", [{"messages": messages(), "image": "a.jpg"}] * 70)
    RecordFile(tmp_path / "x.parquet", cache=tmp_path, bar=bar)
    shown = capsys.readouterr().err
    assert shown.count("100%") == 2 * bar
    assert bar or not shown


def test_what_is_read_at_once_flashes_no_bar(parquet, tmp_path, capsys):
    store(parquet, tmp_path / "x.parquet", [{"messages": messages(), "image": "a.jpg"}] * 70)
    assert len(RecordFile(tmp_path / "x.parquet", cache=tmp_path, bar=True)) == 70
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match="empty list"):
        RecordFile(tmp_path / "x.json", bar=True)
    assert not capsys.readouterr().err


# Parquet


@pytest.fixture
def parquet():
    return pytest.importorskip("pyarrow.parquet")


def store(parquet, file, rows, **how):
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(rows), file, **how)
    return file


def messages(text="What?"):
    return [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]


def test_pictures_inside_parquet_become_files(parquet, tmp_path):
    kinds = {
        "structs": lambda data: {"images": [{"bytes": data, "path": "x/../ignored.png"}]},
        "struct": lambda data: {"image": {"bytes": data, "path": None}},
        "bytes": lambda data: {"image": data},
    }
    for name, picture in kinds.items():
        rows = [{"id": n, "messages": messages(str(n)), **picture(b"picture %d" % (n % 3))} for n in range(200)]
        read = RecordFile(store(parquet, tmp_path / f"{name}.parquet", rows), cache=tmp_path / "cache")
        assert len(read) == 200
        for n in range(200):
            assert read[n].where == f"{name}.parquet: record {n + 1} (id {n})"
            assert read[n].turns[0] == Turn("user", (IMAGE, str(n)))
            assert (read.folder / read[n].images[0]).read_bytes() == b"picture %d" % (n % 3)
        assert sum(file.is_file() for file in read.folder.rglob("*")) == 3, "the same picture is kept once"


def test_parquet_with_paths_uses_the_pictures_folder(parquet, tmp_path):
    rows = [{"conversations": LLAVA["conversations"], "image": "a.jpg"}, {"conversations": LLAVA["conversations"][3:]}]
    file = store(parquet, tmp_path / "x.parquet", rows)
    read = RecordFile(file, cache=tmp_path / "cache")
    assert [record.images for record in read] == [("a.jpg",), ()]
    assert read.folder == tmp_path
    assert RecordFile(file, tmp_path / "pics", cache=tmp_path / "cache").folder == tmp_path / "pics"
    rows = [{"conversations": LLAVA["conversations"], "image": {"path": "a.jpg", "bytes": None}}]
    assert RecordFile(store(parquet, tmp_path / "y.parquet", rows), cache=tmp_path)[0].images == ("a.jpg",)


def test_a_repeated_key_among_many_is_found_at_once(tmp_path):
    """Looked for by counting each of them, it would take hours: this would hang."""
    keys = ", ".join(f'"k{i}": 0' for i in range(100_000))
    (tmp_path / "x.jsonl").write_text('{"messages": [], ' + keys + ', "k7": 1}\n{}\n')
    read = RecordFile(tmp_path / "x.jsonl")
    assert "'k7' is there twice" in refusal(lambda: read[0])


@pytest.mark.parametrize("kind", ["timestamp", "date32"])
def test_a_date_beyond_the_calendar_is_an_error(parquet, tmp_path, kind):
    import pyarrow as pa

    days = {"timestamp": pa.array([2**62], pa.timestamp("us")), "date32": pa.array([2**31 - 1], pa.date32())}
    table = pa.Table.from_pylist([{"messages": messages()}]).append_column("id", days[kind])
    parquet.write_table(table, tmp_path / "x.parquet")
    assert "cannot read" in refusal(lambda: RecordFile(tmp_path / "x.parquet", cache=tmp_path))


@pytest.mark.parametrize("content", ["text", [1, 2], 7, True])
def test_a_pictures_bytes_must_be_bytes(parquet, tmp_path, content):
    store(parquet, tmp_path / "x.parquet", [{"messages": messages(), "image": {"bytes": content, "path": "a.jpg"}}])
    assert "x.parquet: record 1" in refusal(lambda: RecordFile(tmp_path / "x.parquet", cache=tmp_path))


def test_a_page_with_a_wrong_checksum_is_refused(parquet, tmp_path):
    file = store(
        parquet, tmp_path / "x.parquet", [{"messages": messages(), "id": "abcdefgh"}],
        write_page_checksum=True, write_statistics=False, compression="NONE", use_dictionary=False,
    )  # fmt: skip
    file.write_bytes(file.read_bytes().replace(b"abcdefgh", b"abcdefgX", 1))
    assert "cannot read" in refusal(lambda: RecordFile(file, cache=tmp_path))


def test_a_folder_of_parquet_is_read_in_order(parquet, tmp_path):
    (tmp_path / "set").mkdir()
    for n in (2, 0, 1):
        rows = [{"messages": messages(f"{n}.{k}"), "image": b"x"} for k in range(2)]
        store(parquet, tmp_path / "set" / f"part-{n}.parquet", rows)
    read = RecordFile(tmp_path / "set", cache=tmp_path / "cache")
    assert [record.turns[0].parts[1] for record in read] == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
    assert read[5].where == "set: record 6"


def test_names_in_a_folder_of_parquet_start_from_it(parquet, tmp_path):
    store(parquet, tmp_path / "x.parquet", [{"messages": messages(), "image": "a.jpg"}])
    assert RecordFile(tmp_path, cache=tmp_path / "cache").folder == tmp_path


def test_parquet_is_unpacked_once_and_again_when_it_changes(parquet, tmp_path, monkeypatch):
    calls, write = [], parquet_files._write
    monkeypatch.setattr(parquet_files, "_write", lambda *arguments: calls.append(1) or write(*arguments))
    file = store(parquet, tmp_path / "x.parquet", [{"messages": messages("old"), "image": b"x"}])
    for _ in range(2):
        assert RecordFile(file, cache=tmp_path / "cache")[0].turns[0].parts[1] == "old"
    assert len(calls) == 1
    store(parquet, file, [{"messages": messages("new, and longer"), "image": b"x"}])
    assert RecordFile(file, cache=tmp_path / "cache")[0].turns[0].parts[1] == "new, and longer"
    assert len(calls) == 2


def test_ranks_that_ask_at_once_unpack_once(parquet, tmp_path, monkeypatch):
    calls, write = [], parquet_files._write
    monkeypatch.setattr(parquet_files, "_write", lambda *arguments: calls.append(1) or write(*arguments))
    file = store(parquet, tmp_path / "x.parquet", [{"messages": messages(), "image": b"x"}] * 500)
    got = []
    ranks = [threading.Thread(target=lambda: got.append(len(RecordFile(file, cache=tmp_path)))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert got == [500] * 4
    assert len(calls) == 1


def test_unpacking_that_is_interrupted_leaves_nothing_behind_that_counts(parquet, tmp_path, monkeypatch):
    file = store(parquet, tmp_path / "x.parquet", [{"messages": messages(), "image": b"%d" % n} for n in range(9)])
    keep, seen = parquet_files._picture_file, []

    def interrupted(*arguments):
        seen.append(1)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return keep(*arguments)

    monkeypatch.setattr(parquet_files, "_picture_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        RecordFile(file, cache=tmp_path / "cache")
    read = RecordFile(file, cache=tmp_path / "cache")
    assert len(read) == 9
    assert sum(path.is_file() for path in read.folder.rglob("*")) == 9
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x"}, "neither"),
        ({"message": messages()}, "'messages'"),
        ({"messages": messages(), "image": 3}, "record 1: a picture has neither bytes nor a path"),
        ({"messages": messages(), "image": {"path": None, "bytes": None, "x": 1}}, "record 1: a picture has neither"),
        ({"messages": [{"role": "user", "content": b"x"}], "image": "x"}, "record 1: "),
        ({"messages": messages(), "imges": [b"x"]}, "record 1: "),
        ({"messages": messages(), "imges": ["x.jpg"]}, "record 1: unknown key 'imges'; did you mean 'images'?"),
        ({"messages": messages(), "image": "a.jpg", "system": "lost"}, "'system'"),
    ],
)
def test_parquet_without_records_is_refused(parquet, tmp_path, row, says):
    file = store(parquet, tmp_path / "x.parquet", [row])
    assert says in refusal(lambda: RecordFile(file, cache=tmp_path)[0])


def test_parquet_that_cannot_be_read_is_refused(parquet, tmp_path, monkeypatch):
    file = store(parquet, tmp_path / "x.parquet", [{"messages": messages(), "image": b"x"}])
    assert "cache" in refusal(RecordFile, file)
    assert "x.parquet" in refusal(lambda: RecordFile(tmp_path / "gone" / "x.parquet", cache=tmp_path))
    content = file.read_bytes()
    for broken in (b"", b"PAR1", content[: len(content) // 2], content[:-1], b"x" * 100):
        file.write_bytes(broken)
        assert "x.parquet" in refusal(lambda: RecordFile(file, cache=tmp_path / "cache"))
    file.write_bytes(content)
    (tmp_path / "file").write_bytes(b"")
    assert "cannot unpack" in refusal(lambda: RecordFile(file, cache=tmp_path / "file" / "cache"))
    (tmp_path / "empty").mkdir()
    assert "without .parquet files" in refusal(lambda: RecordFile(tmp_path / "empty", cache=tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install '.[parquet]'" in refusal(lambda: RecordFile(file, cache=tmp_path / "cache"))
