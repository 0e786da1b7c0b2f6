"""What a step takes beside what is there anyway, to the byte, on any device.

A GPU's allocator knows its own peak. On a CPU every operation is watched: a storage that it makes counts until the last
tensor on it is gone. Weights, moments and the like are known beforehand and count apart.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still alive, now and at their peak. `known` are the
    addresses of those that do not count."""

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

        def gone(_):
            del self.made[key]
            self.now -= size

        self.made[key] = weakref.ref(storage, gone)
        self.now += size


def storages(model: nn.Module, more: Iterable[Tensor] = ()) -> dict[int, int]:
    """Address and bytes of the weights, their gradients, the scales of 4-bit weights, and `more`."""
    found = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None), *more]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            found += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    kept = [tensor.untyped_storage() for tensor in found]
    return {storage.data_ptr(): storage.nbytes() for storage in kept}


def peak(step: Callable, device: torch.device, known: dict[int, int]) -> int:
    """Bytes of a step, beside those that are known."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with Live(set(known)) as live:
        step()
    return live.peak
