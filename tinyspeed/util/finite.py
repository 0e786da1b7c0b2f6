"""Numbers that are NaN or infinite: that there is one, at nearly no cost; and which one, once there is.

    size(tensors)     the norm of all, on the device: NaN or infinite if any entry is; nobody waits for it
    first(named)      the name of the first tensor that has one, and what it has; waits
    number(state)     the same of plain numbers in dicts and lists

One NaN in a weight is in every weight two steps later; a second moment that is infinite makes every update zero, and
the run stands still and looks well. So what the optimizer will read is looked at before it does, and what a checkpoint
or an exported model will hold before it is written.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def norm(tensors: Iterable[Tensor]) -> Tensor:
    """Of nothing, 0. Whole numbers are finite, and left out. The squares of what is beyond 1e19 overflow: weights and
    moments of such a size are as lost as infinite ones. (To find the largest entry takes a CPU twenty times as long.)
    """
    return torch.nn.utils.get_total_norm([t for t in tensors if t.is_floating_point()])


def norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The size of each."""
    return [torch.linalg.vector_norm(t.detach(), dtype=torch.float32) for t in tensors]


def first_bad(named: Iterable[tuple[str, Tensor]]) -> str | None:
    for name, tensor in named:
        if math.isfinite(norm([tensor])):  # as nearly always, and this takes no memory
            continue
        bad = tensor.detach()[~tensor.detach().isfinite()]
        if len(bad):
            count = f"{len(bad):,} of {tensor.numel():,} numbers, " if tensor.numel() > 1 else ""
            return f"{name} ({count}{bad[0].item()})"
    return None


def bad_number(state: object, name: str = "") -> str | None:
    if isinstance(state, dict | list | tuple):
        inside = state.items() if isinstance(state, dict) else enumerate(state)
        return next(
            filter(None, (bad_number(value, f"{name}.{key}" if name else str(key)) for key, value in inside)),
            None,
        )
    return f"{name} is {state}" if isinstance(state, float) and not math.isfinite(state) else None
