"""Coverage: tokens that together represent all others. The vision-only half of MMTok (ICLR 2026)."""

import torch
from torch import Tensor

from .cosine import best, cosines
from .registry import register

TEMPERATURE = 0.2  # MMTok's, for the similarity of visual tokens


@register("coverage", pairs=8)
def coverage(features: Tensor, *, most: int, valid: Tensor, **_) -> Tensor:
    """Greedy maximum coverage: M_ij = softmax_j(cos(x_i, x_j) / 0.2) says how well token j represents token i, and the
    coverage of a set S is sum_i max_{s in S} M_is. Each pick adds the most to it, argmax_j sum_i max(0, M_ij - best_i).
    A greedy search reaches at least 1 - 1/e of the best coverage.

    DivPrune looks for outliers and this for representatives: a large sky gets a token or two, and never none. MMTok
    also represents the words of the question, but a training sample of many turns has more than one. And MMTok compares
    the tower's features, while this compares the projected ones.

    Cost: K passes over (B, N, N), O(K N^2) per image against DivPrune's O(K N): cheap on a GPU, expensive on a CPU. The
    gains max(0, M - best) are updated in place and never computed again.
    """
    similarity = cosines(features)
    similarity.diagonal(dim1=1, dim2=2).sign_()
    # Two tokens represent each other equally well, but the two halves of a product may be rounded differently.
    similarity = torch.maximum(similarity, similarity.mT).div_(TEMPERATURE)
    similarity.masked_fill_(~valid[:, None, :], -float("inf"))
    gain = similarity.softmax(2).masked_fill_(~valid[:, :, None], 0)  # tokens that may not be kept need none
    batch = torch.arange(len(features), device=features.device)
    taken = ~valid
    picks = []
    for _turn in range(most):
        pick = best(gain.sum(1).masked_fill_(taken, -1))
        picks.append(pick)
        taken = taken.scatter(1, pick[:, None], True)
        gain.sub_(gain[batch, :, pick][:, :, None]).clamp_(min=0)
    return torch.stack(picks, dim=1)
