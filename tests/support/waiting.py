"""Waiting for other processes and threads, however long a busy machine takes over them."""

import subprocess
import time
from collections.abc import Callable

HANGS = 600.0  # seconds after which whoever is waited for does not come any more; no test is about being faster


def until(happens: Callable[[], object], what: str, process: subprocess.Popen | None = None) -> None:
    """Return as soon as it happens; `what` says for what it waited in vain. A process that ends will not do it."""
    deadline = time.monotonic() + HANGS
    while not happens():
        assert process is None or process.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, f"still waiting until {what}"
        time.sleep(0.01)
