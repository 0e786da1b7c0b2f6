"""DivPrune: rows that are as far apart as greedy can make them. The default, and DualSpeed's own choice.

Licence: written from the paper's description; the authors' code is for non-commercial use only.
"""

import torch
from torch import Tensor

from .registry import register


@register("divprune")
def divprune(features: Tensor, *, most: int, valid: Tensor, **_) -> Tensor:
    """DivPrune (CVPR 2025): the subset whose closest pair is as far apart as greedy can make it.

    d(i, j) = 1 - cos(x_i, x_j). First the row whose nearest neighbour is farthest; then, again and again, the row
    farthest from all rows chosen so far: argmax_j min_{s in S} d(s, j). Comparing -cos orders rows as d does.

    Cost: one (N, N) product an image, then K steps over (B, N): a running maximum of similarities replaces the
    re-gathered (K, N) block of the official code, O(KN) instead of O(K^2 N), and all images step together.
    A chosen row gets similarity +inf, which no maximum undoes: duplicates can never be picked twice (the official
    code returned 40 distinct rows of 58 on repeated tokens).
    """
    similarity = features @ features.mT
    norm = similarity.diagonal(dim1=1, dim2=2).sqrt()
    norm = norm.masked_fill(norm == 0, 1)  # a zero row is at right angles to everything
    # Dividing the (N, N) product costs less than normalising the wider (N, D) features first.
    similarity.div_(norm[:, :, None]).div_(norm[:, None, :])
    inf = float("inf")
    if not valid.all():
        similarity.masked_fill_(~(valid[:, :, None] & valid[:, None, :]), -inf)  # nobody's neighbour
    similarity.diagonal(dim1=1, dim2=2).fill_(-inf)  # nor is a row its own
    batch = torch.arange(len(features), device=features.device)
    # Two rows that are each other's nearest must tie, though a product's two halves may round differently.
    nearest = torch.maximum(similarity.amax(2), similarity.amax(1))
    pick = nearest.masked_fill_(~valid, inf).argmin(1)
    closest = torch.zeros_like(valid, dtype=features.dtype).fill_(-inf).masked_fill_(~valid, inf)
    picks = []
    for _ in range(most):
        picks.append(pick)
        closest = torch.maximum(closest, similarity[batch, pick]).scatter_(1, pick[:, None], inf)
        pick = closest.argmin(1)
    return torch.stack(picks, dim=1)
