"""Token merging: like goes to like until K are left. ToMe (ICLR 2023), once, in front of the LLM.

Licence: the authors' code is non-commercial; this is written from the paper's description.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .registry import register


@register("tome", pairs=5)
def tome(features: Tensor, *, most: int, valid: Tensor, counts: Tensor, **_) -> tuple[Tensor, Tensor, None]:
    """Bipartite soft matching, in rounds: split the rows that are left into A and B, every other one; find for each of
    A the most similar of B; merge the (at most N - K) most similar pairs, each into the mean of all rows in it, so that

        row k = mean of its cluster,  and the clusters divide the picture between them

    A row of B stands for its cluster, and its place is the cluster's. A round halves at most, so a tenth takes four.

    What differs from the paper: it merges inside every block of the tower, by keys, and tells attention how large the
    clusters are. In front of the LLM there is one place to merge, one metric (the features) and no such attention. And
    rows go back into raster order between the rounds, so that A and B always alternate in the picture. For the
    original in LLaVA others report 88 % of the accuracy at a third of the rows and 70 % at a ninth, far below
    selection.

    Cost: the first round compares N / 2 rows with N / 2 others, and each later one a quarter of that. It sums no more
    than it compares: together about two thirds of DivPrune's one product.
    """
    order = valid.int().argsort(dim=1, descending=True, stable=True)
    place, slot = order, order.argsort(dim=1).where(valid, 0)  # of each row left its place; of each row its cluster
    sums = features.masked_fill(~valid[:, :, None], 0)
    sums = sums.gather(1, order[:, :, None].expand_as(sums))
    left, wanted = torch.stack([valid.sum(1), counts]).cpu()
    while (left > wanted).any():  # on the host, which then knows the shapes of all rounds without asking a GPU again
        merges, longest = (left - wanted).minimum((left + 1) // 2), int(left.max())
        here = torch.arange(longest, device=valid.device) < left[:, None].to(valid.device)
        left = left - merges
        a, b = sums[:, :longest:2], sums[:, 1:longest:2]
        likeness = F.normalize(a, dim=2) @ F.normalize(b, dim=2).mT  # a mean and a sum point the same way
        best, match = likeness.masked_fill_(~here[:, None, 1::2], -2).max(2)
        rank = best.masked_fill(~here[:, ::2], -3).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        gone = rank < merges[:, None].to(rank.device)
        joins = F.one_hot(match, b.shape[1]).masked_fill_(~gone[:, :, None], 0).to(sums.dtype)
        sums = sums[:, :longest].clone()
        sums[:, 1::2] += joins.mT @ a

        stays, joined = here.clone(), torch.arange(longest, device=valid.device).repeat(len(valid), 1)
        stays[:, ::2] &= ~gone
        joined[:, ::2] = torch.where(gone, 2 * match + 1, joined[:, ::2])
        slot = (stays.cumsum(1) - 1).gather(1, joined.gather(1, slot))
        order = stays.int().argsort(dim=1, descending=True, stable=True)
        place, sums = place.gather(1, order), sums.gather(1, order[:, :, None].expand_as(sums))
    weight = (slot[:, None, :] == torch.arange(most, device=valid.device)[:, None]) & valid[:, None, :]
    weight = weight.to(features.dtype)
    return place[:, :most], weight / weight.sum(2, keepdim=True).clamp(min=1), None
