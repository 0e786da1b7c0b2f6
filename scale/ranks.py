"""The processes of a run (ranks), and how they end together.

torchrun starts one process per GPU (or, on a laptop, on a CPU) and starts all of them again when one dies. A rank that
fails (a damaged picture, a full disk) says so in torch's key-value store: the first one to do so prints its message,
and all leave. A rank without progress for `timeout` seconds says where it is, and all leave.

Each rank checks the store once a second from a thread of its own, because a rank that waits in a collective for one
that is gone cannot do so. It also leaves a sign there that it is alive, for which the rank before it looks: a host
without power or network closes no connection, and who waits for it, in a collective or for the store, waits forever.
"""

import gc
import hashlib
import math
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tinyspeed.util import UserError, require

from .rendezvous import read, rendezvous

FAULT, MISTAKE, LOST = 1, 2, 3  # exit codes: a bug of ours, a mistake of the user's, a machine that is gone
CHECK_EVERY = 1.0  # seconds
ABORTED = "aborted"  # the key in the store


@dataclass
class Ranks:
    """All ranks of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store
    local_rank: int = 0  # among the processes of this machine
    timeout: float = 600.0  # seconds without progress
    where: str = "starting"
    last_progress: float = math.inf
    lost: str = ""  # an error that says that another rank is gone
    heard: str = ""  # the last sign of the next rank
    unheard: float = 0.0  # seconds since that has changed
    done: threading.Event = field(default_factory=threading.Event)
    watcher: threading.Thread | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {platform.node()}"

    def progress(self, where: str, *, patient: bool = False) -> None:
        """Reports what this rank does now; with `patient`, without a time limit."""
        self.where, self.last_progress = where, math.inf if patient else time.monotonic()

    def abort(self, code: int, message: str) -> NoReturn:
        """Ends all ranks. The first one that asks for it prints why."""
        if self._aborts_first(code):
            print(message, file=sys.stderr, flush=True)
        self.done.set()  # if the rank that holds the store leaves first, this one does not count as lost
        time.sleep(2 * CHECK_EVERY)  # the others leave by themselves; torchrun would report each that it stops
        sys.stdout.flush()
        os._exit(code)  # not through torch's exit handlers, which wait for the others

    def watch(self) -> None:
        """Starts the thread that checks the store and the time since the last progress."""
        store = self.store.clone()  # a client of its own: the other one may be waiting
        asking = ThreadPoolExecutor(1)  # since the store may be behind a dead link, and never answer

        def check() -> None:
            while not self.done.wait(CHECK_EVERY):
                try:
                    asking.submit(self._check, store).result(self.timeout + 20 * CHECK_EVERY)
                except (RuntimeError, TimeoutError):
                    if not self.done.is_set():
                        self._leave(f"no answer from {os.environ.get('MASTER_ADDR')}, where rank 0 should be")

        self.watcher = threading.Thread(target=check, daemon=True)
        self.watcher.start()

    def _check(self, store: dist.Store) -> None:
        if store.check([ABORTED]):
            code, by = map(int, store.get(ABORTED).split())
            if by == self.rank:
                return
            if code == LOST:
                print(f"tinyspeed: and {self.name} was {self.where}", file=sys.stderr, flush=True)
            time.sleep(6 * CHECK_EVERY * self.is_main)  # the store may end with rank 0, and others must see it
            os._exit(code)  # the main thread may be inside a collective
        self._sign(store)
        before, self.heard = self.heard, read(store, f"alive/{(self.rank + 1) % self.size}")
        self.unheard = self.unheard + CHECK_EVERY if self.heard == before else 0.0
        late = self.lost or time.monotonic() - self.last_progress > self.timeout
        if late or self.unheard > self.timeout:
            behind = f"no progress for {self.timeout:.0f} s (scale.timeout), another rank is far behind"
            if ((gone := self._silent(store)) or late) and self._aborts_first(LOST, store):
                self._leave(f"no answer from {gone}" if gone else self.lost or behind)

    def _leave(self, problem: str) -> NoReturn:
        print("\n" * self.is_main + f"tinyspeed: {problem}; {self.name} was {self.where}", file=sys.stderr, flush=True)
        time.sleep(6 * CHECK_EVERY)  # so that the others can say where they were
        os._exit(LOST)

    def _sign(self, store: dist.Store) -> None:
        store.set(f"alive/{self.rank}", f"{self.name}/{time.monotonic()}")

    def _silent(self, store: dist.Store) -> str:
        """Names the ranks that give no sign for a few seconds."""
        before = [read(store, f"alive/{rank}") for rank in range(self.size)]
        for _ in range(4):
            time.sleep(CHECK_EVERY)
            self._sign(store)
        gone = [(was.partition("/")[0], r) for r, was in enumerate(before) if was == read(store, f"alive/{r}")]
        return ", ".join(name or f"rank {rank}" for name, rank in gone)

    def _aborts_first(self, code: int, store: dist.Store | None = None) -> bool:
        """Writes into the store why the run ends, unless another rank has. Returns whether this rank was the first."""
        mine = f"{code} {self.rank}"
        return (store or self.store).compare_set(ABORTED, "", mine).decode() == mine

    def require_same(self, what: str, value: object) -> None:
        """Raises an error on every rank if this value differs between them. Values are compared by a hash."""
        number = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7])
        largest, smallest = self.max(number, -number)
        require(largest == -smallest, f"the ranks do not agree about {what}; rank {self.rank} has {str(value)[:200]}")

    def max(self, *numbers: int) -> list[int]:
        """Returns the largest of all ranks' values, for each of these numbers."""
        found = torch.tensor(numbers, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def sum(self, numbers: list[float | torch.Tensor]) -> list[torch.Tensor]:
        """Returns the sum of all ranks' values, in float64, for each of these numbers."""
        total = torch.stack([torch.as_tensor(n, device=self.device).double() for n in numbers])
        dist.all_reduce(total)
        return list(total)

    def gather(self, mine: list) -> list:
        """Returns the lists of all ranks, concatenated."""
        every: list = [None] * self.size
        dist.all_gather_object(every, mine)
        return [item for part in every for item in part]

    def barrier(self) -> None:
        self.max(0)

    def device_mesh(self, shard: int) -> DeviceMesh:
        """The grid in which `shard` ranks (0: all) share one copy of the model."""
        shard = shard or self.size
        require(self.size % shard == 0, f"scale.shard = {shard} does not divide the {self.size} ranks")
        if shard == self.size:
            return init_device_mesh(self.device.type, (self.size,), mesh_dim_names=("shard",))
        return init_device_mesh(self.device.type, (self.size // shard, shard), mesh_dim_names=("replicate", "shard"))


def means_lost_rank(error: Exception) -> bool:
    """Whether this error says that another rank is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _store(rank: int, size: int) -> dist.Store:
    if "MASTER_ADDR" not in os.environ:  # without torchrun
        return dist.HashStore()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return dist.TCPStore(host, port, size, is_master=hosts, wait_for_workers=False)


@contextmanager
def join() -> Iterator[Ranks]:
    """Joins the process group that torchrun's environment describes; without torchrun, a group of one."""
    rank, size, local = (int(os.environ.get(*of)) for of in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        what = f"process {local + 1} of this machine has no GPU, there are {torch.cuda.device_count()}: start no more"
        mend = "or train on the CPU, with CUDA_VISIBLE_DEVICES= in front of the command"
        require(local < torch.cuda.device_count(), f"{what}, {mend}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        ranks = Ranks(rank, size, device, rendezvous(_store(rank, size), rank, size), local)
    except dist.DistError as error:
        said = f"rank {rank} on {platform.node()} cannot reach {os.environ['MASTER_ADDR']}, where rank 0 should be"
        raise UserError(f"{said}: {str(error).splitlines()[0]}; is that host up, and the port free?") from error
    ranks.watch()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        # The thread notices a lost rank better than the group's own timeout would.
        dist.init_process_group(backend, store=ranks.store, rank=rank, world_size=size, timeout=timedelta(days=1))
        ranks.barrier()  # NCCL connects at the first call, and would not wait long for a rank that is busy then
        yield ranks
        ranks.barrier()  # or one that leaves early would be missed
    except Exception as error:
        if means_lost_rank(error):
            ranks.lost = f"a connection to another rank is lost: {error}"
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from a torchrun that has lost its own connection as well
            ranks.watcher.join()  # the thread finds out which rank that is, and ends this process
        raise
    ranks.done.set()
    ranks.watcher.join()  # if it read the store while Python shuts down, it would abort a run that is done
    time.sleep(2 * CHECK_EVERY * (ranks.is_main and size > 1))  # others may be reading a store that ends with rank 0
    gc.collect()  # sharded models hold the group, in circles, and a group that outlives Python can abort the process
    dist.destroy_process_group()  # not after an error, since it would wait for the others
