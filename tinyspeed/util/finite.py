"""Finds NaN and infinite numbers: whether there is one, at almost no cost; and where, once there is.

    norm(tensors)       a tensor on the device that is NaN or infinite if any entry is, so that nothing waits for it
    first_bad(named)    which tensor has one, and how many; this waits for the device
    bad_number(state)   which plain number in dicts and lists is one

One NaN in a weight is in every weight two steps later. An infinite second moment makes every update zero, so that the
run stands still and looks healthy. So what the optimizer will read is checked before it does, and what a checkpoint or
an exported model will hold is checked before it is written.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """The norm of all tensors together; 0 for no tensors. Integer tensors are skipped, since they are always finite.
    Squares of entries beyond 1e19 overflow, but weights and moments of that size are as useless as infinite ones. (To
    find the largest entry instead takes a CPU twenty times as long.)"""
    return torch.nn.utils.get_total_norm([t for t in tensors if t.is_floating_point()])


def norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The norm of each tensor."""
    return [torch.linalg.vector_norm(t.detach(), dtype=torch.float32) for t in tensors]


def first_bad(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with NaN or infinite numbers, with their count and the first of them; or None."""
    for name, tensor in named:
        if math.isfinite(norm([tensor])):  # nearly always, and this takes no memory
            continue
        bad = tensor.detach()[~tensor.detach().isfinite()]
        if len(bad):
            count = f"{len(bad):,} of {tensor.numel():,} numbers, " if tensor.numel() > 1 else ""
            return f"{name} ({count}{bad[0].item()})"
    return None


def bad_number(state: object, name: str = "") -> str | None:
    """Where in nested dicts and lists the first such number is, as "a.1.b is nan"; or None."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        found = (bad_number(value, f"{name}.{key}" if name else str(key)) for key, value in items)
        return next(filter(None, found), None)
    return f"{name} is {state}" if isinstance(state, float) and not math.isfinite(state) else None
