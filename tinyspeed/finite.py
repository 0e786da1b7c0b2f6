"""Numbers that are NaN or infinite: that there is one, at nearly no cost; and which one, once there is.

    largest(tensors)     the largest |entry| of all, on the device: NaN or infinite if any entry is; nobody waits for it
    first(named)         the name of the first tensor that has one, and what it has; waits, and reads them all again
    number(state)        the same of plain numbers in dicts and lists

One NaN in a weight is in every weight two steps later; a second moment that is infinite makes every update zero, and
the run stands still and looks well. So what the optimizer will read is looked at before it does, and what a checkpoint
or an exported model will hold before it is written.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def largest(tensors: Iterable[Tensor]) -> Tensor:
    """A scalar; 0 of nothing. Whole numbers are finite, and left out."""
    return torch.nn.utils.get_total_norm([t for t in tensors if t.is_floating_point() and t.numel()], math.inf)


def each(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The largest |entry| of each, as scalars."""
    return [torch.linalg.vector_norm(t.detach(), math.inf).float() for t in tensors]


def first(named: Iterable[tuple[str, Tensor]]) -> str | None:
    for name, tensor in named:
        if not math.isfinite(largest([tensor])):  # by its largest entry, which takes no memory beside it
            bad = tensor.detach()[~tensor.detach().isfinite()]
            count = f"{len(bad):,} of {tensor.numel():,} numbers, " if tensor.numel() > 1 else ""
            return f"{name} ({count}{bad[0].item()})"
    return None


def number(state: object, name: str = "") -> str | None:
    if isinstance(state, dict | list | tuple):
        inside = state.items() if isinstance(state, dict) else enumerate(state)
        return next(filter(None, (number(value, f"{name}.{key}" if name else str(key)) for key, value in inside)), None)
    return f"{name} is {state}" if isinstance(state, float) and not math.isfinite(state) else None
