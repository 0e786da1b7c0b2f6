"""The one exception a user is meant to see.

A mistake in a recipe, a record or an argument raises `UserError` with what is wrong, where, and how to mend it.
The command line prints it in one line and exits with code 2; everything else that escapes is a bug of ours and
keeps its traceback.
"""

import difflib
import math
from collections.abc import Iterable

LONGEST = 1000  # characters of a line of a message


class UserError(ValueError):
    """Something the user can mend. The message says what, where and how.

    Names and texts of files are in it, and files come from strangers: what a terminal would obey, and not print, is
    escaped, and what nobody would read is left out. Lines begin with two spaces; there is one for each of a list."""

    def __init__(self, what: object):
        super().__init__("\n  ".join(map(_printable, str(what).split("\n  "))))


def _printable(line: str) -> str:
    line = "".join(
        c if c.isprintable() else repr(c)[1:-1] for c in line[: 2 * LONGEST] + line[2 * LONGEST :][-LONGEST:]
    )
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} ... {line[-LONGEST // 4 :]}"


class NotFinite(UserError):
    """A number that a step goes by is NaN or infinite. Whoever runs the step adds which step it was. `image`: whose
    features, by its place in the batch."""

    def __init__(self, said: str, image: int | None = None):
        super().__init__(said)
        self.image = image


def counted(count: int, thing: str) -> str:
    """1 record, 2,000 records."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def unknown(kind: str, name: str, known: Iterable[str], before: str = "") -> UserError:
    """An error for a name that is not in `known`, offering the nearest one that is. `before`: what stands before all of
    them. It makes none nearer: train.weight_decay is not what train.learning_rate was meant to be."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {before + near[0]!r}?" if near else f"known: {', '.join(before + name for name in known)}"
    return UserError(f"unknown {kind} {before + str(name)!r}; {hint}")


def require(good: bool, what: str) -> None:
    if not good:
        raise UserError(what)


def require_known(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise unknown(kind, name, known)


def require_range(settings: object, section: str, **bounds: tuple[float, float]) -> None:
    """That these numbers are such as a machine could do, both ends included."""
    for name, (least, most) in bounds.items():
        value = getattr(settings, name)
        require(not value < 0, f"{section}{name} = {value}: must not be negative")
        require(value < math.inf, f"{section}{name} = {value}: must not be infinite, nor no number")
        require(least <= value, f"{section}{name} = {value}: must be at least {least:,}")
        require(value <= most, f"{section}{name} = {value}: must be at most {most:,}")
