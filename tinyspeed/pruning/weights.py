"""How many of an image's N tokens each of the K that stay stands for: n_k, whose logarithm attention adds to a score.

    softmax_k (q k / sqrt(d) + log n_k)          n_k = 1 for text, isolator and whole pictures

So a kept token draws as much attention as n_k copies of it would. Without that, a tenth of the tokens gets about a
tenth of the attention that the picture had, and all layers learn to make up for it: in fast steps alone.

    uniform   n_k = N / K
    cells     n_k = the number of tokens whose most similar kept token is k, itself included, by cosine

A merging plugin has its own answer. Its weight map says what part of each token went into which sum, w_ki over the sum
of column i; the parts add up to the sizes, scaled to N in all. For `tome` that is the number of tokens in the cluster.
A selecting plugin may return sizes itself, which then stand in place of the cells.

ToMe calls this proportional attention, and uses it for merged tokens in a vision tower. That pruning in training should
use it is ours. The power in `DualSpeed(power=...)` makes it n_k ** power; 0 is what every pruning method does today.

The cost: one product of N x K cosines, a tenth of DivPrune's own (so plugins need not hand theirs out), and heads that
are wider by a column, or a mask on a CPU: about two percent of a step. The trade-off: weighted steps learn more slowly
at first, and with slow steps or few layers there is little left to repair.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .cosine import ROUNDING

WEIGHTS = ("none", "uniform", "cells")


def sizes(kind: str, features: Tensor, valid: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    """(B, K): how many of the `valid` (B, N) tokens each of `index` (B, K) stands for; 0 where that is -1."""
    stays, every = index >= 0, valid.sum(1, keepdim=True)
    if kind == "uniform":
        return (every / stays.sum(1, keepdim=True)).where(stays, 0)
    if weight is None:
        return torch.zeros_like(index, dtype=features.dtype).scatter_add_(1, cells(features, index), valid.float())
    parts = (weight / weight.sum(1, keepdim=True).masked_fill_(weight.sum(1, keepdim=True) == 0, 1)).sum(2)
    return parts * (every / parts.sum(1, keepdim=True))


def cells(features: Tensor, index: Tensor) -> Tensor:
    """(B, N): for each token, which of the kept ones (as a column of `index`) is the most similar. Of equally similar
    ones it is the first, but a kept token is always its own."""
    batch, n, width = features.shape
    unit = normalize(features, dim=2)
    kept = unit.gather(1, index.clamp(min=0)[:, :, None].expand(-1, -1, width))
    likeness = (unit @ kept.mT).masked_fill_(index[:, None, :] < 0, -torch.inf)
    nearest = (likeness + ROUNDING >= likeness.amax(2, keepdim=True)).int().argmax(2)
    itself = torch.arange(index.shape[1], device=index.device).expand_as(index)
    nearest = torch.cat([nearest, nearest.new_zeros(batch, 1)], 1)  # a column for what is no token
    return nearest.scatter_(1, index.where(index >= 0, n), itself)[:, :n]
