"""The processes of a run (ranks), and how they end together.

torchrun starts one process per GPU (or, on a laptop, on a CPU) and starts all of them again when one dies. A rank that
fails (a damaged picture, a full disk) says so in torch's key-value store: the first one to do so prints its message,
and all leave. A rank without progress for `timeout` seconds says where it is, and all leave.

Each rank checks the store once a second from a thread of its own, because a rank that waits in a collective for one
that is gone cannot do so.
"""

import gc
import hashlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tinyspeed.util import UserError, require

from .rendezvous import rendezvous

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
    done: threading.Event = field(default_factory=threading.Event)
    watcher: threading.Thread | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

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

        def check() -> None:
            while not self.done.wait(CHECK_EVERY):
                try:
                    self._check(store)
                except RuntimeError:  # the rank that held the store is gone
                    if not self.done.is_set():
                        os._exit(LOST)

        self.watcher = threading.Thread(target=check, daemon=True)
        self.watcher.start()

    def _check(self, store: dist.Store) -> None:
        if time.monotonic() - self.last_progress > self.timeout and self._aborts_first(LOST, store):
            said = f"rank {self.rank} has made no progress for {self.timeout:.0f} s, {self.where}"
            hint = "another rank is gone or far behind; scale.timeout says how long to wait"
            print(f"tinyspeed: {said}: {hint}", file=sys.stderr, flush=True)
            time.sleep(2 * CHECK_EVERY)  # so that the others can say where they were
            os._exit(LOST)
        if store.check([ABORTED]):
            code, by = map(int, store.get(ABORTED).split())
            if by == self.rank:
                return
            if code == LOST:
                print(f"tinyspeed: and rank {self.rank} was {self.where}", file=sys.stderr, flush=True)
            os._exit(code)  # the main thread may be inside a collective

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
    try:
        return dist.TCPStore(host, port, size, is_master=hosts, wait_for_workers=False)
    except dist.DistError as error:
        raise UserError(f"rank {rank} cannot reach {host}:{port}, where rank 0 should be") from error


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
    ranks = Ranks(rank, size, device, rendezvous(_store(rank, size), rank, size), local)
    ranks.watch()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # The thread notices a lost rank better than the group's own timeout would.
    dist.init_process_group(backend, store=ranks.store, rank=rank, world_size=size, timeout=timedelta(days=1))
    ranks.barrier()  # NCCL connects at the first call, and would not wait long for a rank that is busy then
    yield ranks
    ranks.done.set()
    ranks.watcher.join()  # if it read the store while Python shuts down, it would abort a run that is done
    gc.collect()  # sharded models hold the group, in circles, and a group that outlives Python can abort the process
    dist.destroy_process_group()  # not after an error, since it would wait for the others
