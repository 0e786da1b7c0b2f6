"""Micro-batches made ahead of their step, in worker processes: decoding pictures must not keep a GPU waiting.

Which samples make up which micro-batch is decided before (`batching.py`), so workers change nothing but the time it
takes: the same batches come out in the same order, from any number of them. They draw nothing from anybody's random
numbers, leave signals to the main process, and hand a bad picture over as the UserError that it is.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.queues import Queue

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..util.errors import UserError
from .examples import Source, collate

PREFETCH = 2  # batches that each worker is ahead


def batches(
    source: Source, parts: Iterable[list[int]], pad: int, *, workers: int = 0, pin: bool = False
) -> Iterator[dict[str, Tensor]]:
    """The batches of these lists of samples, in order."""
    workers = at_most(workers)
    if workers == 0:
        yield from (collate([source.example(i) for i in part], pad) for part in parts)
        return
    ahead = DataLoader(
        _Made(source, pad),
        batch_size=None,
        sampler=parts,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        pin_memory=pin,
        worker_init_fn=_begin,
        generator=torch.Generator(),  # its own: the default one belongs to dropout
    )
    for batch in ahead:
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch


@contextmanager
def explaining_crashes() -> Iterator[None]:
    """A worker that the system kills becomes advice. torch raises this wherever the main process happens to be."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        with suppress(RuntimeError):  # it says so twice: when it misses a batch, and when the signal arrives
            time.sleep(0.5)
        raise UserError(
            "a process that decodes pictures was killed, most likely for want of (shared) memory, or for what it said "
            "above: set data.workers lower, or to 0, and go on with --resume"
        ) from error


class _Made(Dataset):
    def __init__(self, source: Source, pad: int):
        self.source, self.pad = source, pad

    def __getitem__(self, part: list[int]) -> dict[str, Tensor] | str:
        try:
            return collate([self.source.example(i) for i in part], self.pad)
        except UserError as error:  # raised here, it would arrive wrapped in a traceback
            return str(error)


def at_most(workers: int) -> int:
    """More workers than cores only wait for each other."""
    return min(workers, os.cpu_count() or 1)


def _begin(worker: int) -> None:
    ignore_signals(worker)
    # Python would drop a batch that cannot be sent, say so, and go on; the main process would wait for it for ever.
    Queue._on_queue_feeder_error = staticmethod(_lost)


def _lost(error: Exception, batch: object) -> None:
    """A batch goes by way of shared memory, and of a socket in the folder for temporary files."""
    where = f"through shared memory and a socket in {tempfile.gettempdir()}"
    print(f"tinyspeed: a batch cannot be handed over {where}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def ignore_signals(worker: int) -> None:
    # A scheduler signals every process of a job, and the main one must find its workers alive to finish the step. They
    # leave when it tells them to, or is gone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
