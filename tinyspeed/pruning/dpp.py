"""Determinants: tokens that span the largest volume. CDPruner (NeurIPS 2025), by default without its text.

`dpp_centred` is the same search with Cen-Prune's kernel (`cosine.py`).
"""

import torch
from torch import Tensor

from .cosine import ROUNDING, best, centred, cosines, distinctive
from .registry import register

# A token whose squared distance from the span of the chosen ones is below this adds nothing new. It is a hundredth of
# its length, about the uncertainty of bf16. (With a much smaller value, fp32 rounding errors would count as volume.)
NOTHING = 1e-4


@register("dpp", takes=("relevance",), pairs=8)
def dpp(features: Tensor, *, most: int, valid: Tensor, relevance: Tensor | None = None, **_) -> Tensor:
    """Greedy MAP of a determinantal point process: L = diag(r) S diag(r) with S the cosines, and each pick is the token
    that makes det(L of the chosen tokens) largest. That is the one with the largest r_j times distance from the span of
    the chosen tokens, where DivPrune takes the distance from the nearest of them.

    r is the `relevance` of each token to the question, an optional signal (B, N) whose negative values count as 0.
    CDPruner takes it from CLIP's text tower, which is not well defined for training samples of many turns. Without it
    r = 1; then all tokens are equal at the first pick, which is the first token of the image.

    Cost: O(K^2 N) per image, with an incremental Cholesky factor (the fast greedy MAP of Chen et al., 2018).

    What differs from the official code: beyond the rank of S it divides by zero and keeps 61 tokens of 64. Here d^2 has
    a floor, and the rest come by relevance or in raster order. It also stretches r over the whole batch, so that an
    image's picks depend on the other images. Here an image's r is only compared with itself.
    """
    similarity = cosines(features)
    return _greedy(similarity, torch.ones_like(similarity[:, 0]) if relevance is None else relevance, most, valid)


@register("dpp_centred", takes=("relevance",), pairs=10)
def dpp_centred(features: Tensor, *, most: int, valid: Tensor, relevance: Tensor | None = None, **_) -> Tensor:
    """Cen-Prune on CDPruner: L = diag(r g) S' diag(r g), with S' the cosines of centred tokens and g how distinctive
    each token is (`cosine.py`). The least distinctive one has weight 0 and comes last. One more product per image."""
    weight = distinctive(cosines(features), valid)
    return _greedy(cosines(centred(features, valid)), weight if relevance is None else weight * relevance, most, valid)


def _greedy(similarity: Tensor, weight: Tensor, most: int, valid: Tensor) -> Tensor:
    """det(L) of a set is det(S) times its squared weights, so a Cholesky factor of S is enough. With c its rows so far
    and d^2_j what is left of S_jj: pick j = argmax weight^2 d^2; then e = (S_j - sum_t c_t[j] c_t) / d_j, d^2 -= e^2.
    """
    weight = weight.clamp(min=0).masked_fill(~valid, 0)
    weight = (weight / weight.amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)).square()
    left = similarity.diagonal(dim1=1, dim2=2).sign().clamp(min=NOTHING)  # cos(x, x) is 1, or 0 for a zero token
    factor = similarity.new_zeros(len(similarity), most, similarity.shape[1])
    batch = torch.arange(len(similarity), device=similarity.device)
    taken = ~valid
    picks = []
    for turn in range(most):
        # Tokens that add nothing new differ only by their weights, whose rounding errors are as small as they are.
        uncertain = weight.sqrt() * ROUNDING * left.masked_fill(left > NOTHING, 1)
        pick = best((weight * left).masked_fill_(taken, -1), uncertain)
        picks.append(pick)
        taken = taken.scatter(1, pick[:, None], True)
        before, rest = factor[:, :turn], left[batch, pick][:, None]
        explained = (before[batch, :, pick][:, None] @ before)[:, 0]
        new = (similarity[batch, pick] - explained) / rest.sqrt()
        factor[:, turn] = new.masked_fill_(rest == NOTHING, 0)  # a token that adds nothing new explains nothing
        left = (left - factor[:, turn].square()).clamp_(min=NOTHING)
    return torch.stack(picks, dim=1)
