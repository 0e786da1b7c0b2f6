"""Micro-batches made ahead of their step, in worker processes: a GPU must not wait while pictures are decoded.

Which samples make up which micro-batch is decided beforehand (`batching.py`), so workers change nothing but the time:
any number of them makes the same batches in the same order. They use none of the run's random numbers and leave
signals to the main process, and a bad picture reaches the main process as a UserError.
"""

import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..util import UserError, files
from .examples import Source, collate

PREFETCH = 2  # batches that each worker is ahead
PATIENCE = 60.0  # seconds without a batch, after which one line says what the workers do


def batches(source: Source, parts: Iterable[list[int]], pad: int, workers=0, pin=False) -> Iterator[dict[str, Tensor]]:
    """The batches of these lists of samples, in order."""
    return in_workers(partial(_batch, source, pad), parts, at_most(workers), pin)


def _batch(source: Source, pad: int, part: list[int]) -> dict[str, Tensor]:
    return collate([source.example(i) for i in part], pad)


def in_workers(make: Callable[[Any], Any], parts: Iterable, workers: int, pin: bool = False) -> Iterator:
    """What `make` returns for each part, in order, made by so many worker processes; with 0 of them, by this one."""
    if workers == 0:
        yield from map(make, parts)
        return
    how = {"batch_size": None, "num_workers": workers, "prefetch_factor": PREFETCH, "worker_init_fn": _begin}
    generator = torch.Generator()  # its own: the default one belongs to dropout
    made = DataLoader(_Made(make), sampler=parts, pin_memory=pin, generator=generator, timeout=PATIENCE, **how)
    for found in _patiently(made):
        if isinstance(found, str):
            raise UserError(found)
        yield found


def _patiently(loader: DataLoader) -> Iterator:
    """Its batches, however long they take. If one takes long, a line says what the workers do."""
    with files.errors_about("/dev/shm (data.workers = 0 does without it)"):  # where semaphores are files
        multiprocessing.Lock()  # fails if torch's would, but without the traceback of a half-made iterator
        made = iter(loader)
    while True:
        try:
            yield next(made)
            continue
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
        status = [file for one in multiprocessing.active_children() for file in Path("/proc").glob(f"{one.pid}/status")]
        told = {file.parent.name: re.search(r"State:\s*(.*)", files.read(file).decode()) for file in status}
        states = [f"{pid} is {found[1]}" for pid, found in told.items()]
        what = f"no batch for {PATIENCE:.0f} s, from the processes that decode pictures: {', '.join(states)}"
        print(f"{what}. Waiting on; `kill -CONT PID` wakes one that is stopped", file=sys.stderr)


class _Made(Dataset):
    def __init__(self, make: Callable[[Any], Any]):
        self.make = make

    def __getitem__(self, part: Any) -> Any:
        try:
            return self.make(part)
        except UserError as error:  # raised here, it would arrive wrapped in a traceback
            return str(error)


@contextmanager
def explaining_crashes() -> Iterator[None]:
    """Turns the death of a worker into advice. torch raises it wherever the main process happens to be."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        with suppress(RuntimeError):  # it comes twice: when a batch is missing, and when the signal arrives
            time.sleep(0.5)
        why = "most likely because (shared) memory ran out, or for the reason that it printed above"
        mend = "set data.workers lower, or to 0, and continue with --resume"
        raise UserError(f"a process that decodes pictures was killed, {why}: {mend}") from error


def at_most(workers: int) -> int:
    """No more workers than cores: more would only wait for each other."""
    return min(workers, os.cpu_count() or 1)


def _begin(worker: int) -> None:
    # A job's scheduler signals all its processes, and the main one needs its workers to finish the step. They end when
    # it tells them to, or when it is gone.
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # not on Windows
        signal.signal(number, signal.SIG_IGN)
    # Python would drop a batch that cannot be sent, print a message and go on; the main process would wait for ever.
    Queue._on_queue_feeder_error = staticmethod(_cannot_send)


def _cannot_send(error: Exception, batch: object) -> None:
    """A batch is sent through shared memory, and through a socket in the folder for temporary files."""
    where = f"through shared memory and a socket in {tempfile.gettempdir()}"
    print(f"tinyspeed: a batch cannot be sent {where}: {error}", file=sys.stderr, flush=True)
    os._exit(1)
