"""How the ranks of one attempt find each other in a key-value store that earlier attempts have written into.

When a rank dies, torchrun starts all of them again and gives them the store that the dead ones used. Anything read
there may be left over from the attempt before: gloo, for one, connects to addresses of processes that are gone.
(torchrun's restart count could tell attempts apart, but each node counts for itself.) So ranks first agree on a name
for their attempt and then write everything below that name.

    rank r   writes  request/r   = a random token of its own        rank 0   writes  reply/r = that token, and the name
                     confirmed/r = the name it was given                     start/name, when all have confirmed

What an earlier attempt has left is never mistaken for this one's: its replies hold tokens that nobody has now, and a
name counts only once the rank that gave it has written start.
"""

import secrets
import time

import torch.distributed as dist

from tinyspeed import UserError

PAUSE = 0.02  # seconds between two reads
PATIENCE = 1800.0  # seconds to wait for the others


def rendezvous(store: dist.Store, rank: int, size: int, patience: float = PATIENCE) -> dist.Store:
    """Waits for all ranks and returns the part of the store that belongs to this attempt."""
    token, deadline = secrets.token_hex(8), time.monotonic() + patience
    name = _collect(store, token, size, deadline) if rank == 0 else _request(store, token, rank, deadline)
    return dist.PrefixStore(f"tinyspeed/{name}", store)


def _collect(store: dist.Store, name: str, size: int, deadline: float) -> str:
    """Rank 0 gives every other rank the name and waits until all have it."""
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            if token := read(store, f"request/{rank}"):
                store.set(f"reply/{rank}", f"{token} {name}")
            if read(store, f"confirmed/{rank}") == name:
                missing.discard(rank)
        _pause(deadline, f"ranks {sorted(missing)} of {size} have not come")
    store.set(f"start/{name}", "")
    return name


def _request(store: dist.Store, token: str, rank: int, deadline: float) -> str:
    """Every other rank asks rank 0 for the name."""
    store.set(f"request/{rank}", token)
    name = ""
    while not (name and store.check([f"start/{name}"])):
        replied_to, _, given = read(store, f"reply/{rank}").partition(" ")
        if replied_to == token and given != name:
            name = given
            store.set(f"confirmed/{rank}", name)
        _pause(deadline, "rank 0 has not come")
    return name


def read(store: dist.Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _pause(deadline: float, problem: str) -> None:
    if time.monotonic() > deadline:
        raise UserError(f"{problem}; are all nodes started, with the same number of them and the same endpoint?")
    time.sleep(PAUSE)
