"""A key-value store of this attempt's own.

When a rank dies torchrun starts all of them again, and gives them the store that the dead ones wrote into. Whatever is
read there may be of the attempt before: gloo, for one, connects to addresses of processes that are gone. (Its restart
count would tell attempts apart, but each node counts for itself.) So ranks first agree on a name for their attempt, and
everything they write is below that name.

    rank r   writes  hello/r = a number of its own          rank 0   writes  answer/r = that number, and the name
                     has/r   = the name it was answered              go/name, when all have it

What an earlier attempt has left is never mistaken for this one's: it answers numbers that nobody has now, and a name
counts only when the rank that gave it says go.
"""

import secrets
import time

import torch.distributed as dist

from tinyspeed import UserError

PAUSE = 0.02  # seconds between two looks
PATIENCE = 1800.0


def meet(store: dist.Store, rank: int, size: int, patience: float = PATIENCE) -> dist.Store:
    """The part of the store that is this attempt's."""
    own, deadline = secrets.token_hex(8), time.monotonic() + patience
    name = _invite(store, own, size, deadline) if rank == 0 else _join(store, own, rank, deadline)
    return dist.PrefixStore(f"tinyspeed/{name}", store)


def _invite(store: dist.Store, name: str, size: int, deadline: float) -> str:
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            if hello := _read(store, f"hello/{rank}"):
                store.set(f"answer/{rank}", f"{hello} {name}")
            if _read(store, f"has/{rank}") == name:
                missing.discard(rank)
        _wait(deadline, f"ranks {sorted(missing)} of {size} have not come")
    store.set(f"go/{name}", "")
    return name


def _join(store: dist.Store, own: str, rank: int, deadline: float) -> str:
    store.set(f"hello/{rank}", own)
    name = ""
    while not (name and store.check([f"go/{name}"])):
        number, _, given = _read(store, f"answer/{rank}").partition(" ")
        if number == own and given != name:
            name = given
            store.set(f"has/{rank}", name)
        _wait(deadline, "rank 0 has not come")
    return name


def _read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(deadline: float, why: str) -> None:
    if time.monotonic() > deadline:
        raise UserError(f"{why}; are all nodes started, with the same number of them and the same endpoint?")
    time.sleep(PAUSE)
