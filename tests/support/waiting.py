"""Waiting for other processes and threads, however long a busy machine takes over them."""

import time
from collections.abc import Callable

HANGS = 600.0  # seconds after which whoever is waited for does not come any more; no test is about being faster


def until(happens: Callable[[], object], what: str) -> None:
    """Return as soon as it happens; `what` says for what it waited in vain."""
    deadline = time.monotonic() + HANGS
    while not happens():
        assert time.monotonic() < deadline, f"still waiting until {what}"
        time.sleep(0.01)
