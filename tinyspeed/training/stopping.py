"""Ctrl-C, SIGTERM and SIGHUP (a closed terminal): the step is finished and saved before the process ends."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows lacks one


@contextmanager
def stop_requested(*, quiet: bool = False) -> Iterator[list[int]]:
    """Yields a list to which these signals append their number. A second SIGINT ends the process as usual; a second
    SIGTERM does not, since schedulers send it to a whole tree of processes, and parents pass it on."""
    stop: list[int] = []
    usual = signal.getsignal(signal.SIGINT)

    def ask(number, frame):
        stop.append(number)
        if not quiet and len(stop) == 1:  # print would fail if the signal came in the middle of another write
            more = "; once more to quit at once" if number == signal.SIGINT else ""
            with suppress(OSError):  # a log on a full disk, or a closed terminal
                os.write(2, f"\n{signal.Signals(number).name}: this step, then saving{more}\n".encode())
        signal.signal(signal.SIGINT, usual)

    with handled([signal.SIGINT, *ENDING], ask):
        yield stop


@contextmanager
def handled(numbers: list[int], handler: Callable) -> Iterator[None]:
    before = {}
    with suppress(ValueError):  # outside of the main thread signals are handled by somebody else
        for number in numbers:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, own in before.items():
            signal.signal(number, own)


def exit_code(stopped_by: int | None) -> int:
    """128 + the number of SIGTERM or SIGHUP, as shells and job schedulers expect; 0 after Ctrl-C, which is a wish."""
    return 128 + stopped_by if stopped_by in ENDING else 0
