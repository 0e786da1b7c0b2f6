"""DivPrune: rows that are as far apart as greedy can make them. The default, and DualSpeed's own choice.

`divprune_centred` is the same search with Cen-Prune's distances (`cosine.py`). It is a plugin of its own and not a
setting: a recipe then names it like any other, and there is no switch that means nothing to most plugins.

Licence: written from the paper's description; the authors' code is for non-commercial use only.
"""

import torch
from torch import Tensor

from .cosine import best, centred, cosines, distinctive
from .registry import register

INF = float("inf")


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
    similarity = cosines(features)
    pick = _loneliest(similarity, valid)
    batch = torch.arange(len(features), device=features.device)
    closest = torch.zeros_like(valid, dtype=features.dtype).fill_(-INF).masked_fill_(~valid, INF)
    picks = []
    for _ in range(most):
        picks.append(pick)
        closest = torch.maximum(closest, similarity[batch, pick]).scatter_(1, pick[:, None], INF)
        pick = closest.argmin(1)  # not `best`: of 4,096 numbers, rows that do differ can be that close
    return torch.stack(picks, dim=1)


@register("divprune_centred", pairs=12)
def divprune_centred(features: Tensor, *, most: int, valid: Tensor, **_) -> Tensor:
    """Cen-Prune on DivPrune: distances of centred rows, weighed by how distinctive a row is.

    DivPrune's own first row; then argmax_j g_j min_{s in S} (1 - cos(x_s - mean, x_j - mean)), see `cosine.py`.
    The least distinctive row has weight 0 and comes last. Costs one more product an image than DivPrune.
    """
    similarity = cosines(features)
    weight = distinctive(similarity, valid)
    pick = _loneliest(similarity, valid)
    distance = 1 - cosines(centred(features, valid))
    batch = torch.arange(len(features), device=features.device)
    farthest = torch.zeros_like(valid, dtype=features.dtype).fill_(INF).masked_fill_(~valid, -INF)
    picks = []
    for _ in range(most):
        picks.append(pick)
        farthest = torch.minimum(farthest, distance[batch, pick]).scatter_(1, pick[:, None], -INF)
        # A distance that rounding has made negative would turn the order of the weights around.
        pick = best((weight * farthest.clamp(min=0)).masked_fill_(farthest == -INF, -INF))
    return torch.stack(picks, dim=1)


def _loneliest(similarity: Tensor, valid: Tensor) -> Tensor:
    """(B,): the row whose nearest neighbour is farthest. Marks the diagonal and rows that may not be kept with -inf."""
    if not valid.all():
        similarity.masked_fill_(~(valid[:, :, None] & valid[:, None, :]), -INF)  # nobody's neighbour
    similarity.diagonal(dim1=1, dim2=2).fill_(-INF)  # nor is a row its own
    # Two rows that are each other's nearest must tie, though a product's two halves may round differently.
    nearest = torch.maximum(similarity.amax(2), similarity.amax(1))
    return best(-nearest.masked_fill_(~valid, INF))
