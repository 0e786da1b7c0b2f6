"""DivPrune: tokens that are as far apart as a greedy search can make them. The default, and DualSpeed's own choice.

`divprune_centred` is the same search with the distances of Cen-Prune (`cosine.py`). It is a plugin and not a setting of
`divprune`, because such a setting would mean nothing to most other plugins.
"""

import torch
from torch import Tensor

from .cosine import best, centred, cosines, distinctive
from .registry import register

INF = float("inf")


@register("divprune")
def divprune(features: Tensor, *, most: int, valid: Tensor, **_) -> Tensor:
    """DivPrune (CVPR 2025): a subset of the tokens whose closest pair is as far apart as possible, found greedily.

    The distance is d(i, j) = 1 - cos(x_i, x_j). The first pick is the token whose nearest neighbour is farthest. Every
    other pick is the token that is farthest from all chosen ones, argmax_j min_{s in S} d(s, j). The code compares
    cosines, which gives the same order, and returns (B, most) picks among the tokens that are `valid` (B, N).

    What differs from the official code: a chosen token gets similarity +inf, so a duplicate cannot be picked twice (the
    official code returned 40 distinct tokens of 58 when tokens were repeated). A running maximum of similarities
    replaces a (K, N) block that is gathered again in each step: O(KN), not O(K^2 N). All images take a step at once.

    The trade-off: one (N, N) product per image and K steps. And it looks for what differs, so it may keep outliers.
    """
    similarity = cosines(features)
    pick = _loneliest(similarity, valid)
    batch = torch.arange(len(features), device=features.device)
    closest = torch.zeros_like(valid, dtype=features.dtype).fill_(-INF).masked_fill_(~valid, INF)
    picks = []
    for _turn in range(most):
        picks.append(pick)
        closest = torch.maximum(closest, similarity[batch, pick]).scatter_(1, pick[:, None], INF)
        pick = closest.argmin(1)  # not `best`: among 4,096 numbers, tokens that do differ can be that close
    return torch.stack(picks, dim=1)


@register("divprune_centred", pairs=12)
def divprune_centred(features: Tensor, *, most: int, valid: Tensor, **_) -> Tensor:
    """Cen-Prune on DivPrune: distances of centred tokens, weighted by how distinctive a token is.

    The first pick is DivPrune's. Then argmax_j g_j min_{s in S} (1 - cos(x_s - mean, x_j - mean)), see `cosine.py`.
    The least distinctive token has weight 0 and comes last. This costs one product per image more than DivPrune.
    """
    similarity = cosines(features)
    weight = distinctive(similarity, valid)
    pick = _loneliest(similarity, valid)
    distance = 1 - cosines(centred(features, valid))
    batch = torch.arange(len(features), device=features.device)
    nearest = torch.zeros_like(valid, dtype=features.dtype).fill_(INF).masked_fill_(~valid, -INF)
    picks = []
    for _turn in range(most):
        picks.append(pick)
        nearest = torch.minimum(nearest, distance[batch, pick]).scatter_(1, pick[:, None], -INF)
        # With a distance that rounding made negative, a larger weight would count for less.
        pick = best((weight * nearest.clamp(min=0)).masked_fill_(nearest == -INF, -INF))
    return torch.stack(picks, dim=1)


def _loneliest(similarity: Tensor, valid: Tensor) -> Tensor:
    """(B,): the token whose nearest neighbour is farthest. Sets the similarity of a token to itself, and of tokens that
    may not be kept, to -inf."""
    similarity.masked_fill_(~valid[:, :, None], -INF).masked_fill_(~valid[:, None, :], -INF)
    similarity.diagonal(dim1=1, dim2=2).fill_(-INF)
    # Two tokens that are each other's nearest must tie, but the two halves of a product may be rounded differently.
    nearest = torch.maximum(similarity.amax(2), similarity.amax(1))
    return best(-nearest.masked_fill_(~valid, INF))
