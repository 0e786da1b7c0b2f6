"""Coverage: rows that between them stand for all the others. The vision-only half of MMTok (ICLR 2026).

Licence: MMTok's code is Apache-2.0; this is written from its description.
"""

import torch
from torch import Tensor

from .cosine import best, cosines
from .registry import register

TEMPERATURE = 0.2  # MMTok's, for likeness of picture rows


@register("coverage", pairs=8)
def coverage(features: Tensor, *, most: int, valid: Tensor, **_) -> Tensor:
    """Greedy maximum coverage: M_ij = softmax_j(cos(x_i, x_j) / 0.2) says how well row j stands for row i, and a set S
    covers sum_i max_{s in S} M_is. Each pick adds the most to that, argmax_j sum_i max(0, M_ij - best_i); greedy is
    within 1 - 1/e of the best set there is.

    Where DivPrune looks for outliers, this looks for representatives: a large sky gets a row or two, and never none.
    MMTok adds rows for the words of the question, which multi-turn training does not have one of, and compares the
    tower's features; this compares those it is given, which are the projected ones.

    Cost: K passes over (B, N, N), O(K N^2) an image against DivPrune's O(K N): cheap on a GPU, dear on a CPU. What is
    left to gain is updated in place, since max(0, M - best) never has to be made anew.
    """
    similarity = cosines(features)
    similarity.diagonal(dim1=1, dim2=2).sign_()  # two rows stand for each other equally well: rounding must not decide
    similarity = torch.maximum(similarity, similarity.mT).div_(TEMPERATURE)
    similarity.masked_fill_(~valid[:, None, :], -float("inf"))
    gain = similarity.softmax(2).masked_fill_(~valid[:, :, None], 0)  # rows that may not be kept need nobody, too
    batch = torch.arange(len(features), device=features.device)
    taken = ~valid
    picks = []
    for _ in range(most):
        pick = best(gain.sum(1).masked_fill_(taken, -1))
        picks.append(pick)
        taken = taken.scatter(1, pick[:, None], True)
        gain.sub_(gain[batch, :, pick][:, :, None]).clamp_(min=0)
    return torch.stack(picks, dim=1)
