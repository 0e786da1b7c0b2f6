"""`UserError`, the one exception that a user is meant to see.

A mistake in a recipe, a record or an argument raises it with what is wrong, where, and how to mend it. The command line
prints it in one line and exits with code 2. Any other exception that escapes is our bug and keeps its traceback.
"""

import difflib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 1000  # characters of a line of a message


class UserError(ValueError):
    """Something that the user can mend. The message says what, where and how.

    Messages quote names and texts from files, and files come from strangers: characters that a terminal would obey
    instead of printing are escaped, and long lines are shortened. A list's entries are lines indented by two spaces."""

    def __init__(self, what: object):
        super().__init__("\n  ".join(map(_printable, str(what).split("\n  "))))


def _printable(line: str) -> str:
    shown = line[: 2 * LONGEST] + line[2 * LONGEST :][-LONGEST:]
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    return line if len(line) <= LONGEST else f"{line[: LONGEST * 2 // 3]} ... {line[-LONGEST // 4 :]}"


class NotFinite(UserError):
    """A number that a step depends on is NaN or infinite. Whoever runs the step adds the number of the step. `image` is
    the place in the batch of the image whose features it is in."""

    def __init__(self, said: str, image: int | None = None):
        super().__init__(said)
        self.image = image


def counted(count: int, thing: str) -> str:
    """1 record, 2,000 records."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def unknown(kind: str, name: str, known: Iterable[str], before: str = "", says: str = "unknown") -> UserError:
    """An error for a name that is not in `known`, which suggests the nearest one. `before` is what all full names begin
    with. It is left out when names are compared, or all keys of a section would look alike."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {before + near[0]!r}?" if near else f"known: {', '.join(before + name for name in known)}"
    return UserError(f"{says} {kind} {before + str(name)!r}; {hint}")


@contextmanager
def located(where: str) -> Iterator[None]:
    """Begins every error with the place of the mistake, unless it is said there already."""
    try:
        yield
    except MemoryError as error:
        raise UserError(f"{where}: the memory of this machine is too small for it") from error
    except UserError as error:
        if str(error).startswith(where):
            raise
        raise UserError(f"{where}: {error}") from error


def no_memory(error: BaseException) -> bool:
    """Whether memory ran out: for Python and NumPy, for torch on a GPU, or for torch on the CPU."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "DefaultCPUAllocator" in str(error)


def memory_ran_out(error: BaseException, where: str) -> str:
    said = next(iter(str(error).splitlines()), "") or "of this machine"
    return f"memory ran out {where} ({said}); `tinyspeed estimate` says what a recipe needs"


def require(good: bool, what: str) -> None:
    if not good:
        raise UserError(what)


def require_known(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise unknown(kind, name, known)


def require_range(settings: object, section: str, **bounds: tuple[float, float]) -> None:
    """Refuses settings outside their bounds, both ends included."""
    for name, (least, most) in bounds.items():
        value = getattr(settings, name)
        require(not value < 0, f"{section}{name} = {value}: must not be negative")
        require(value < math.inf, f"{section}{name} = {value}: must be a finite number")
        require(least <= value, f"{section}{name} = {value}: must be at least {least:,}")
        require(value <= most, f"{section}{name} = {value}: must be at most {most:,}")
