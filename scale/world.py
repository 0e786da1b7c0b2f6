"""The processes of a run, and how they end together.

torchrun starts one process a GPU (or, on a laptop, on a CPU) and starts all of them again when one dies. What they do
together:

    mesh     the grid of ranks: `shard` of them share one copy of the model, the others hold more copies
    agree    a number must be the same everywhere (a step's plan, the data): checked by one collective, now and then
    one message   a rank that fails (a damaged picture, a full disk) writes that on the board; the first one to write is
             the one that prints, and all leave
    no silent wait   a rank that makes no progress for `timeout` seconds says where it stands, and all leave

The board is torch's key-value store. Each rank looks at it once a second from a thread of its own, because a rank that
waits in a collective for one that is gone cannot look up from it.
"""

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

from tinyspeed import UserError

from .meeting import meet

FAULT, MISTAKE, LOST = 1, 2, 3  # exit codes: of ours, of the user's, of the machines'
LOOK_EVERY = 1.0  # seconds
NOTE = "note"


@dataclass
class World:
    rank: int
    size: int
    device: torch.device
    board: dist.Store
    local: int = 0  # which of its machine's processes this is
    timeout: float = 600.0  # seconds without progress
    where: str = "starting"
    moved: float = math.inf  # when it last made progress
    over: threading.Event = field(default_factory=threading.Event)
    watcher: threading.Thread | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def first_here(self) -> bool:
        """Whether this rank does what is done once a machine."""
        return self.local == 0

    def at(self, where: str, *, patient: bool = False) -> None:
        """Progress: what this rank does now. `patient`: that may take as long as it takes."""
        self.where, self.moved = where, math.inf if patient else time.monotonic()

    def leave(self, code: int, message: str) -> NoReturn:
        """End all ranks; the first that asks for it prints why."""
        if self._claims(code):
            print(message, file=sys.stderr, flush=True)
            self.over.set()  # if the rank that holds the board leaves first, this one is not lost
            time.sleep(2 * LOOK_EVERY)  # the others leave by themselves; torchrun would tell of each that it stops
        sys.stdout.flush()
        os._exit(code)  # not through torch's exit handlers, which wait for the others

    def watch(self) -> None:
        """Start looking at the board, and at the clock."""
        board = self.board.clone()  # a client of its own: the other may be waiting

        def look() -> None:
            while not self.over.wait(LOOK_EVERY):
                try:
                    self._look(board)
                except RuntimeError:  # whoever held the board is gone
                    if not self.over.is_set():
                        os._exit(LOST)

        self.watcher = threading.Thread(target=look, daemon=True)
        self.watcher.start()

    def close(self) -> None:
        """Stop looking: a thread that asks the board while Python shuts down would abort a run that is done."""
        self.over.set()
        self.watcher.join()

    def _look(self, board: dist.Store) -> None:
        if time.monotonic() - self.moved > self.timeout and self._claims(LOST, board):
            said = f"rank {self.rank} has made no progress for {self.timeout:.0f} s, {self.where}"
            hint = "another rank is gone or far behind; scale.timeout says how long to wait"
            print(f"tinyspeed: {said}: {hint}", file=sys.stderr, flush=True)
            time.sleep(2 * LOOK_EVERY)  # for the others to say where they were
            os._exit(LOST)
        if board.check([NOTE]):
            code, by = map(int, board.get(NOTE).split())
            if by == self.rank:
                return
            if code == LOST:
                print(f"tinyspeed: and rank {self.rank} was {self.where}", file=sys.stderr, flush=True)
            os._exit(code)  # the main thread may be deep in a collective

    def _claims(self, code: int, board: dist.Store | None = None) -> bool:
        """Write on the board why the run ends, unless that is known; whether this rank was the first."""
        mine = f"{code} {self.rank}"
        return (board or self.board).compare_set(NOTE, "", mine).decode() == mine

    def agree(self, what: str, value: object) -> None:
        """An error on every rank if this differs between them. Values are compared by a hash."""
        number = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7])
        both = torch.tensor([number, -number], device=self.device)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        if both[0] != -both[1]:
            raise UserError(f"the ranks do not agree about {what}; rank {self.rank} has {str(value)[:200]}")

    def most(self, *numbers: int) -> list[int]:
        """The largest of all ranks' numbers, of each of these."""
        found = torch.tensor(numbers, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def gather(self, mine: list) -> list:
        """Every rank's list, end to end."""
        every: list = [None] * self.size
        dist.all_gather_object(every, mine)
        return [item for part in every for item in part]

    def wait(self) -> None:
        """Until every rank is here."""
        self.most(0)

    def sums(self, numbers: list[float | torch.Tensor]) -> list[torch.Tensor]:
        """Each number summed over all ranks, in float64."""
        total = torch.stack([torch.as_tensor(n, device=self.device).double() for n in numbers])
        dist.all_reduce(total)
        return list(total)

    def mesh(self, shard: int) -> DeviceMesh:
        """`shard` ranks share one copy of what is sharded; 0: all of them."""
        shard = shard or self.size
        if self.size % shard:
            raise UserError(f"scale.shard = {shard} does not divide the {self.size} ranks")
        kind = self.device.type
        if shard == self.size:
            return init_device_mesh(kind, (self.size,), mesh_dim_names=("shard",))
        return init_device_mesh(kind, (self.size // shard, shard), mesh_dim_names=("replicate", "shard"))


def lost(error: Exception) -> bool:
    """Whether it says that another rank is gone."""
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
def join() -> Iterator[World]:
    """The process group that torchrun's environment asks for; without it, a group of one."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    rank, size, local = (int(os.environ.get(name, value)) for name, value in alone.items())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= (there := torch.cuda.device_count()):
            raise UserError(
                f"process {local + 1} of this machine has no GPU, there are {there}: start no more, "
                "or train on the CPU, with CUDA_VISIBLE_DEVICES= in front of the command"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    world = World(rank, size, device, meet(_store(rank, size), rank, size), local)
    world.watch()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # The watch is better at noticing than the group's own timeout.
    dist.init_process_group(backend, store=world.board, rank=rank, world_size=size, timeout=timedelta(days=1))
    world.wait()  # NCCL connects at the first call, and would not wait long for a rank that is busy then
    yield world
    world.close()
    dist.destroy_process_group()  # not after an error: it would wait for the others
