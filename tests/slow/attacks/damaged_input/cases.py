"""One case: something damaged, what is done with it, and whether it ended as it may."""

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
from support.waiting import HANGS

from tinyspeed import UserError

LONGEST = 2000  # characters of a refusal
GROWTH = 2 << 20  # KiB by which the process may grow over all cases


@dataclass
class Case:
    kind: str
    act: Callable[[], object]  # works and finds what it should find, or raises; an AssertionError says what is wrong
    names: tuple[str, ...] = ()  # what a refusal must say: the file, the record, the key
    opens: tuple[str | Path, ...] = ()  # files and folders that may be opened
    programs: tuple[str, ...] = ()  # that may be started
    note: str = ""  # what was done to the file, for people
    seconds: float = 20.0  # of processor time
    waits: float = HANGS  # seconds of any time: it waits for something that never comes
    must: str = ""  # "work" or "refuse", where it is known which


class Hung(BaseException):
    """Not an Exception, so that nothing swallows it."""


@contextmanager
def limited(seconds: float, waits: float) -> Iterator[None]:
    """Raise `Hung` after so many seconds of processor time, or of waiting."""

    def late(number, frame):
        raise Hung(f"still not done, in {frame.f_code.co_qualname}, line {frame.f_lineno}")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, seconds), (signal.SIGALRM, signal.ITIMER_REAL, waits))
    before = [signal.signal(number, late) for number, _, _ in timers]
    for _, timer, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def run_case(case: Case) -> tuple[str, str]:
    """Returns how the case ended, "worked" or "refused", and what is wrong with that ("" if nothing is)."""
    how, wrong = "worked", ""
    with file_access.allowing(case.opens, case.programs) as touched:
        try:
            with limited(case.seconds, case.waits):
                case.act()
        except UserError as error:
            how, wrong = "refused", wrong_words(str(error), case.names)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            wrong = f"{type(error).__name__}: {str(error)!r:.400} ({Path(at.filename).name}:{at.lineno})"
    if touched:
        wrong = f"{wrong} also touched: {touched[:3]}".strip()
    if not wrong and case.must and {"worked": "work", "refused": "refuse"}[how] != case.must:
        wrong = f"{how}, but should {case.must}"
    return how, wrong


def wrong_words(message: str, names: Iterable[str] = ()) -> str:
    """Returns what is wrong with the words of a refusal; "" if nothing is."""
    if not re.sub(r"\n  (?=\S)", "", message).isprintable():  # a list of bad records has a line for each
        return f"refused in words that cannot be printed: {message!r:.300}"
    if len(message) > LONGEST:
        return f"refused in {len(message):,} characters: {message[:200]!r}"
    if missing := [name for name in names if name not in message]:
        return f"refused without saying {missing}: {message!r:.300}"
    return ""


@dataclass
class Tally:
    seen: Counter = field(default_factory=Counter)  # of (kind, how it ended)
    failures: list[str] = field(default_factory=list)

    def tried(self) -> dict[str, int]:
        kinds = sorted({kind for kind, _ in self.seen})
        return {f"{kind}: {how}": self.seen[kind, how] for kind in kinds for how in ("worked", "refused")}


def _raise(error: Exception) -> None:
    raise error


def run_cases(name: str, part, home: Path, numbers: Iterable[int], seed: int, tally: Tally) -> None:
    """Run the cases of these numbers. Each is drawn from its own number, so that any of them can be repeated."""
    made = part.Part(home)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in numbers:
        try:
            case = made.case(random.Random(f"{seed} {name} {number}"))
        except Exception as error:  # a fault of the attack itself, which must not stop the other cases
            case = Case("not made", partial(_raise, error))
        how, wrong = run_case(case)
        tally.seen[f"{name.replace('_', ' ')}, {case.kind}", how] += 1
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > GROWTH:
            wrong, before = f"{wrong} memory grew by {grown >> 10:,} MiB".strip(), before + grown
        if wrong:
            again = f"--parts {name} --first {number} --count 1 --seed {seed}"
            tally.failures.append(f"{case.kind} [{again}] {case.note!r:.300}: {wrong}")
