"""One case: something broken, what is done with it, and whether it ended as it may."""

import random
import re
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from slow.attacks.damaged_input import file_access

from tinyspeed import UserError

LONGEST = 2000  # characters of a refusal
GROWTH = 2 << 20  # KiB by which the process may grow over all cases


@dataclass
class Case:
    kind: str
    act: Callable[
        [], object
    ]  # works and finds what it should, or raises; an AssertionError says what is not as it should
    names: tuple[str, ...] = ()  # what a refusal says: the file, the record, the key
    opens: tuple[str | Path, ...] = ()  # files and folders that may be opened
    programs: tuple[str, ...] = ()  # that may be started
    note: str = ""  # what was done to it, for people
    seconds: float = 20.0
    must: str = ""  # "work" or "refuse", where it is known which


class Hung(BaseException):
    """Not an Exception: nothing may swallow it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def late(number, frame):
        raise Hung(f"still not done after {seconds:g} s, in {frame.f_code.co_qualname}, line {frame.f_lineno}")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(case: Case) -> tuple[str, str]:
    """How it ended, "worked" or "refused"; and what is wrong with that, or nothing."""
    how, wrong = "worked", ""
    with file_access.only(case.opens, case.programs) as touched:
        try:
            with limited(case.seconds):
                case.act()
        except UserError as error:
            how, wrong = "refused", amiss(str(error), case.names)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            wrong = f"{type(error).__name__}: {str(error)!r:.400} ({Path(at.filename).name}:{at.lineno})"
    if touched:
        wrong = f"{wrong} also touched: {touched[:3]}".strip()
    if not wrong and case.must and {"worked": "work", "refused": "refuse"}[how] != case.must:
        wrong = f"{how}, and should {case.must}"
    return how, wrong


def amiss(message: str, names: Iterable[str] = ()) -> str:
    """What is wrong with the words of a refusal."""
    if not re.sub(r"\n  (?=\S)", "", message).isprintable():  # a list of bad records has a line for each
        return f"refused in words that cannot be printed: {message!r:.300}"
    if len(message) > LONGEST:
        return f"refused in {len(message):,} characters: {message[:200]!r}"
    if missing := [name for name in names if name not in message]:
        return f"refused without saying {missing}: {message!r:.300}"
    return ""


@dataclass
class Tally:
    seen: Counter = field(default_factory=Counter)  # (kind, how)
    lost: list[str] = field(default_factory=list)

    def tried(self) -> dict[str, int]:
        kinds = sorted({kind for kind, _ in self.seen})
        return {f"{kind}: {how}": self.seen[kind, how] for kind in kinds for how in ("worked", "refused")}


def _again(error: Exception) -> None:
    raise error


def run(name: str, part, home: Path, numbers: Iterable[int], seed: int, tally: Tally) -> None:
    """The cases of these numbers of one part. Each is drawn by its own number, so that any can be seen again."""
    made = part.Part(home)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        try:
            case = made.case(random.Random(f"{seed} {name} {number}"))
        except Exception as error:  # the torture's own fault; the other cases are worth as much as before
            case = Case("not made", partial(_again, error))
        how, wrong = judge(case)
        tally.seen[f"{name}, {case.kind}", how] += 1
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > GROWTH:
            wrong, before = f"{wrong} memory grew by {grown >> 10:,} MiB".strip(), before + grown
        if wrong:
            again = f"--parts {name} --first {number} --count 1 --seed {seed}"
            tally.lost.append(f"{case.kind} [{again}] {case.note!r:.300}: {wrong}")
