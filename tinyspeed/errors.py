"""The one exception a user is meant to see.

A mistake in a recipe, a record or an argument raises `UserError` with what is wrong, where, and how to mend it.
The command line prints it in one line and exits with code 2; everything else that escapes is a bug of ours and
keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. The message says what, where and how."""


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


def check(good: bool, what: str) -> None:
    if not good:
        raise UserError(what)


def among(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise unknown(kind, name, known)
