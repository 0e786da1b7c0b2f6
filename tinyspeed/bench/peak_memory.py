"""Measures what a step allocates at its peak, to the byte, on any device.

A GPU's allocator knows its own peak. On a CPU every operation is watched: a storage counts from the operation that
makes it until the last tensor on it is gone. Weights, gradients and moments exist before the step and are not counted.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and that are still alive, now and at their peak.
    `known` are the addresses of storages that do not count."""

    def __init__(self, known: set[int]):
        super().__init__()
        self.known, self.now, self.peak = known, 0, 0
        self.made: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.made or storage.data_ptr() in self.known:
            return

        def freed(_):
            del self.made[key]
            self.now -= size

        self.made[key] = weakref.ref(storage, freed)
        self.now += size


def storages(model: nn.Module, more: Iterable[Tensor] = ()) -> dict[int, int]:
    """Returns address and bytes of the weights, their gradients, the scales of 4-bit weights, and `more`."""
    found = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None), *more]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            found += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    kept = [tensor.untyped_storage() for tensor in found]
    return {storage.data_ptr(): storage.nbytes() for storage in kept}


def peak_bytes(step: Callable, device: torch.device, known: dict[int, int]) -> int:
    """Returns the bytes that a step takes at its peak, beside the known storages."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveStorages(set(known)) as live:
        step()
    return live.peak
