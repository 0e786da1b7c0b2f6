"""How files are damaged: their bytes, as a disk or a network damages them; their tokens, as a typing error does; their
structure, as a script with a bug does."""

import copy
import json
import random
import re
from collections.abc import Sequence

# Values in the place of others.
ODD: tuple = (
    None, True, False, 0, -1, 7, 10**30, -(10**400), 0.5, 1e308, float("nan"), float("inf"), "", " ", "\n", "x", "7",
    "\0", "a\0b", "\ud800", "\udfff", "\ufeff", "\u2028", "\x85", "\x1b[31m", "\u202e", "a" * 20_000, "😀",
    "</s>", "<s>", "<pad>", "<image>", "<image><image>", "<IMAGE>", "< image >", "<im", "age>", "\ue0000\ue001",
    "\ue000", "{{ 7 * 7 }}", "{% raw %}", "{{ messages }}", "{#", "{% for a in range(9) %}", "%s %d {0} ${HOME}",
    "ASSISTANT:", "USER: <image>\nWhat? ASSISTANT:", [], {}, [None], [[]], {"": ""}, {"type": "image"},
    {"type": "text", "text": "lost"},
)  # fmt: skip
TOKENS = (
    "NaN", "Infinity", "-", "1e999", "9" * 5000, '"\\u0000"', '"\\ud800"', '"\\uD83D"', "null", "true", "'x'", "//",
    ",,", "[" * 3000, '{"a":' * 3000, "[", "]", "{", "}", '"', "\\", ":", '"\t"', "\x00", "0x10", "01", "1_000",
    "undefined",
)  # fmt: skip
ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "utf-7", "cp1252")
_PAIR = re.compile(r'"(?:[^"\\]|\\.)*"\s*:\s*"(?:[^"\\]|\\.)*"\s*,\s*')
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{},:]|[^][{},:"\s]+')


def mutate_bytes(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """Returns the file's bytes with one fault, and what it is."""
    n, what = len(content), draw.randrange(11)
    at = draw.randrange(n) if n else 0
    if what == 0:
        return content[:at], f"cut at {at}"
    if what == 1:
        return content[:at] + bytes(n - at), f"zeros from {at}"
    if what == 2:
        made = bytearray(content)
        for _ in range(draw.choice((1, 1, 3, 30))):
            if n:
                made[draw.randrange(n)] ^= 1 << draw.randrange(8)
        return bytes(made), "flipped bits"
    if what == 3:
        size = draw.choice((1, 2, 16, 512))
        return content[:at] + content[at + size :], f"{size} bytes missing at {at}"
    if what == 4:
        return content[:at] + draw.randbytes(draw.choice((1, 2, 8, 64))) + content[at:], f"noise at {at}"
    if what == 5:
        return content[:at] + content, f"started again after {at}"
    if what == 6:
        return content + content, "the whole file twice"
    if what == 7:
        mark = draw.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\0", b"\xef\xbb\xbf" * 2))
        return mark + content, "a byte order mark"
    if what == 8:
        size = draw.choice((1, 16, 512))
        return content[:at] + bytes(size) + content[at + size :], f"{size} zeros at {at}"
    if what == 9:
        other = (b"", b"\0", b" ", b"\n" * 9, b"\x1f\x8b\x08", b"PK\x03\x04", draw.randbytes(200))
        return draw.choice(other), "another file"
    other = draw.randrange(n) if n else 0
    low, high = sorted((at, other))
    return content[high:] + content[low:high] + content[:low], "blocks in another order"


def mutate_file(draw: random.Random, text: str, share: float) -> tuple[bytes, str]:
    """Returns the text as a file: with a fault in its bytes in this share of all cases, else in another encoding."""
    if draw.random() < share:
        return mutate_bytes(draw, text.encode(errors="surrogatepass"))
    kind = draw.choice(ENCODINGS)
    return text.encode(kind, errors="replace"), kind


def mutate_tokens(draw: random.Random, text: str) -> tuple[str, str]:
    """Returns a text of JSON or TOML with one typing error, and what it is."""
    found = list(_TOKEN.finditer(text))
    if not found:
        return draw.choice(TOKENS), "only a token"
    one, other = draw.choice(found), draw.choice(found)
    what = draw.randrange(5)
    if what == 4 and (pairs := list(_PAIR.finditer(text))):
        pair = draw.choice(pairs)
        return text[: pair.start()] + pair[0] + pair[0] + text[pair.end() :], f"{pair[0]:.30} twice"
    if what == 0:
        return text[: one.start()] + text[one.end() :], f"without {one[0]:.30}"
    if what == 1:
        return text[: one.end()] + one[0] + text[one.end() :], f"{one[0]:.30} twice"
    if what == 2:
        return text[: one.start()] + other[0] + text[one.end() :], f"{other[0]:.30} instead of {one[0]:.30}"
    new = draw.choice(TOKENS)
    return text[: one.start()] + new + text[one.end() :], f"{new:.30} instead of {one[0]:.30}"


def places(value: object) -> list[tuple]:
    """Every place inside a value, as (container, key)."""
    found, rest = [], [value]
    while rest:
        inside = rest.pop()
        if isinstance(inside, dict | list):
            mine = [(inside, key) for key in (inside if isinstance(inside, dict) else range(len(inside)))]
            found += mine
            rest += [inside[key] for _, key in mine]
    return found


def mutate_structure(draw: random.Random, value: object, odd: Sequence = ODD) -> tuple[object, str]:
    """Returns a copy of what a file means with one fault, and what it is."""
    value = copy.deepcopy(value)
    spots = places(value)
    if not spots:
        return draw.choice(odd), "another value"
    inside, key = draw.choice(spots)
    here, what = inside[key], draw.randrange(8)
    if what <= 2:
        inside[key] = new = copy.deepcopy(draw.choice(odd))
        return value, f"{new!r:.30} at {key!r}"
    if what == 3:
        del inside[key]
        return value, f"without {key!r}"
    if what == 4:
        other, where = draw.choice(spots)
        inside[key], other[where] = copy.deepcopy(other[where]), copy.deepcopy(here)
        return value, f"{key!r} and {where!r} swapped"
    if what == 5 and isinstance(inside, dict):
        name = draw.choice([*odd, key + "s", key[:-1], key.upper(), key + " ", key[::-1], "_" + key])
        inside[name if isinstance(name, str) else json.dumps(name, default=str)] = inside.pop(key)
        return value, f"the key {name!r:.30} instead of {key!r}"
    if what == 5:
        inside.insert(key, copy.deepcopy(here))
        return value, f"item {key} twice"
    if what == 6 and isinstance(here, str):
        place, new = draw.randrange(len(here) + 1), draw.choice([item for item in odd if isinstance(item, str)])
        inside[key] = here[:place] + new + here[place:]
        return value, f"{new!r:.30} inside {key!r}"
    depth = draw.choice((1, 1, 2, 90))
    for _ in range(depth):
        here = draw.choice(([here], {"a": here})) if depth < 3 else [here]
    inside[key] = here
    return value, f"{key!r} nested {depth} times"
