"""Ctrl-C and SIGTERM: the step is finished and saved before the process ends."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def stop_requested(*, quiet: bool = False) -> Iterator[list[int]]:
    """Yields a list to which SIGINT and SIGTERM append their number. A second SIGINT ends the process as usual; a
    second SIGTERM does not, since schedulers send it to a whole tree of processes, and parents pass it on."""
    stop: list[int] = []
    before = {}

    def ask(number, frame):
        stop.append(number)
        if not quiet and len(stop) == 1:  # print would fail if the signal came in the middle of another write
            more = "; once more to quit at once" if number == signal.SIGINT else ""
            with suppress(OSError):  # a log on a full disk
                os.write(2, f"\n{signal.Signals(number).name}: this step, then saving{more}\n".encode())
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    with suppress(ValueError):  # outside of the main thread signals are handled by somebody else
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
