"""`scale` on a host, as torchrun starts it, with what a case adds to it.

MOMENT='of step 5' RELEASE=FOLDER     stand still there: make FOLDER/reached, and wait for FOLDER/go
AHEAD=86400                           a clock that is so many seconds ahead
PATIENCE=20                           how long a rank waits for others when it starts, instead of 30 minutes, and for
                                      an answer of the store, instead of the kernel's 15 minutes
"""

import os
import re
import runpy
import socket
import time
from contextlib import suppress
from pathlib import Path

AHEAD, PATIENCE = (float(os.environ.get(name, 0)) for name in ("AHEAD", "PATIENCE"))
if AHEAD:
    now = time.time
    time.time = lambda: now() + AHEAD

from scale import ranks  # noqa: E402 (with that clock)

MEETING = "meeting the others"


def stand_still(where: str) -> None:
    """Stands still if this is the moment, and nobody has stood still before."""
    folder = Path(os.environ["RELEASE"])
    if re.search(os.environ["MOMENT"], where) and not (folder / "reached").exists():
        (folder / "reached").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)


def impatient(store):
    """This store, whose connection ends when the other side has confirmed nothing for a while."""
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(number))) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * PATIENCE))
    return store


def main() -> None:
    progress, meet = ranks.Ranks.progress, ranks.rendezvous

    def reported(self, where: str, **how) -> None:
        stand_still(where)
        progress(self, where, **how)

    def met(store, *given):
        if "MOMENT" in os.environ:
            stand_still(MEETING)
        return meet(impatient(store), *given, PATIENCE) if PATIENCE else meet(store, *given)

    ranks.rendezvous = met
    if "MOMENT" in os.environ:
        ranks.Ranks.progress = reported
    runpy.run_module("scale", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
