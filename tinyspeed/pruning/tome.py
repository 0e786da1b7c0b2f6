"""Token merging: like goes to like until K are left. ToMe (ICLR 2023), once, in front of the LLM."""

import torch
from torch import Tensor

from ..util.sending import to_device
from .registry import register

DIGITS = 5  # of its cosines, so that equal tokens tie, and pairs that are nearly as similar


@register("tome", merges="features", pairs=9)
def tome(
    features: Tensor, *, most: int, valid: Tensor, sizes: list[tuple[int, int]], **_
) -> tuple[Tensor, Tensor, None]:
    """Bipartite soft matching, in rounds: split the tokens that are left alternately into A and B; find for each token
    of A the most similar one of B; merge the (at most N - K) most similar pairs. So

        token k = mean of its cluster,  and each token of the image is in one cluster

    A cluster takes the place of its token of B. A round merges at most half of the tokens, so a tenth takes four.

    What differs from the paper: there, every block of the tower merges, by keys, and attention takes the clusters'
    sizes into account. In front of the LLM there is one place to merge, one metric (the features) and no such
    attention. Of an odd number t of tokens, a round merges up to ceil(t / 2) here and floor(t / 2) in the official
    code. And tokens go back into raster order between the rounds, so A and B always alternate in the image. For the
    original in LLaVA, others report 88 % of the accuracy with a third of the tokens and 70 % with a ninth, far below
    selection.

    Cost: DivPrune's product, once. Products of sums are sums of products, so the rounds work on that (N, N) matrix and
    do not need the wide features again.
    """
    order = valid.int().argsort(dim=1, descending=True, stable=True)
    place, slot = order, order.argsort(dim=1).where(valid, 0)  # where each cluster is, and the cluster of each token
    left, wanted = torch.tensor(sizes).T  # on the CPU, where the shapes of all rounds are then known
    features = features.gather(1, order[:, : int(left.max()), None].expand(-1, -1, features.shape[2]))
    gram = features @ features.mT  # x_i x_j; from the first round on, of clusters' sums
    while (left > wanted).any():
        merges, longest = (left - wanted).minimum((left + 1) // 2), int(left.max())
        here = torch.arange(longest, device=valid.device) < to_device(left[:, None], valid.device)
        left = left - merges
        norm = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()  # tokens may cancel out: about 0
        norm = norm.masked_fill(norm == 0, 1)
        likeness = gram[:, ::2, 1::2] / norm[:, ::2, None] / norm[:, None, 1::2]
        likeness = likeness.round(decimals=DIGITS)
        best, match = likeness.masked_fill_(~here[:, None, 1::2], -2).max(2)
        rank = best.masked_fill(~here[:, ::2], -3).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        gone = rank < to_device(merges[:, None], rank.device)
        joins = torch.zeros_like(likeness).scatter_(2, match[:, :, None], gone[:, :, None].to(likeness.dtype))
        gram[:, 1::2] += joins.mT @ gram[:, ::2]
        gram[:, :, 1::2] += gram[:, :, ::2] @ joins

        stays, joined = here.clone(), torch.arange(longest, device=valid.device).repeat(len(valid), 1)
        stays[:, ::2] &= ~gone
        joined[:, ::2] = torch.where(gone, 2 * match + 1, joined[:, ::2])
        slot = (stays.cumsum(1) - 1).gather(1, joined.gather(1, slot))
        order = stays.int().argsort(dim=1, descending=True, stable=True)[:, : int(left.max())]
        place, gram = place.gather(1, order), gram.gather(1, order[:, :, None].expand(-1, -1, longest))
        gram = gram.gather(2, order[:, None, :].expand(-1, order.shape[1], -1))
    weight = (slot[:, None, :] == torch.arange(most, device=valid.device)[:, None]) & valid[:, None, :]
    weight = weight.to(features.dtype)
    return place[:, :most], weight / weight.sum(2, keepdim=True).clamp(min=1), None
