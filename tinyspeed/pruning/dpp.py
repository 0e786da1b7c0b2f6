"""Determinants: rows that span the largest volume. CDPruner (NeurIPS 2025) without its text, unless it is given.

`dpp_centred` is the same search with Cen-Prune's kernel (`cosine.py`).

Licence: CDPruner's code is Apache-2.0; this is written from its description.
"""

import torch
from torch import Tensor

from .cosine import ROUNDING, best, centred, cosines, distinctive
from .registry import register

# The square of a row's distance from the span of the chosen rows, below which it has nothing new: a hundredth of the
# row's length, about what bf16 leaves uncertain. (Far less, and fp32 rounding of small factors would pass for volume.)
NOTHING = 1e-4


@register("dpp", takes=("relevance",), pairs=8)
def dpp(features: Tensor, *, most: int, valid: Tensor, relevance: Tensor | None = None, **_) -> Tensor:
    """Greedy MAP of a determinantal point process: L = diag(r) S diag(r), S the cosines; pick after pick, the row that
    makes det(L of the chosen rows) largest. That is r_j times its distance from the span of the chosen rows, where
    DivPrune takes the distance from the nearest of them.

    r is the `relevance` of each row to the question, a signal (B, N) that need not be given and counts as 0 where it is
    negative: CDPruner takes it from CLIP's text tower, which is ill-defined for training samples of many turns. Without
    it r = 1, and the first pick, for which all rows are then equal, is the first row of the picture.

    Cost: O(K^2 N) an image, by an incremental Cholesky factor (the fast greedy MAP of Chen et al., 2018). Traps of the
    official code that are not here: beyond the rank of S it divides by zero and keeps 61 rows of 64 (here d^2 has a
    floor, and the rest come by relevance, else in raster order), and it stretches r
    over the whole batch, so that an image's picks depend on its neighbours (here an image's r is only ever compared
    with itself).
    """
    similarity = cosines(features)
    return _greedy(similarity, torch.ones_like(similarity[:, 0]) if relevance is None else relevance, most, valid)


@register("dpp_centred", takes=("relevance",), pairs=10)
def dpp_centred(features: Tensor, *, most: int, valid: Tensor, relevance: Tensor | None = None, **_) -> Tensor:
    """Cen-Prune on CDPruner: L = diag(r g) S' diag(r g), S' the cosines of centred rows and g how distinctive each row
    is, see `cosine.py`. The least distinctive row has weight 0 and comes last. Costs one more product an image."""
    weight = distinctive(cosines(features), valid)
    return _greedy(cosines(centred(features, valid)), weight if relevance is None else weight * relevance, most, valid)


def _greedy(similarity: Tensor, weight: Tensor, most: int, valid: Tensor) -> Tensor:
    """det(L) of a set is det(S) times its weights squared. So the Cholesky factor is of S: with c its rows so far and
    d^2_j what is left of S_jj, pick j = argmax weight^2 d^2; then e = (S_j - sum_t c_t[j] c_t) / d_j, d^2 -= e^2."""
    weight = weight.clamp(min=0).masked_fill(~valid, 0)
    weight = (weight / weight.amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)).square()
    left = similarity.diagonal(dim1=1, dim2=2).sign().clamp(min=NOTHING)  # cos(x, x) is 1, or 0 for a zero row
    factor = similarity.new_zeros(len(similarity), most, similarity.shape[1])
    batch = torch.arange(len(similarity), device=similarity.device)
    taken = ~valid
    picks = []
    for turn in range(most):
        # Rows without anything new differ by their weights alone, which are rounded as finely as they are small.
        uncertain = weight.sqrt() * ROUNDING * left.masked_fill(left > NOTHING, 1)
        pick = best((weight * left).masked_fill_(taken, -1), uncertain)
        picks.append(pick)
        taken = taken.scatter(1, pick[:, None], True)
        before, rest = factor[:, :turn], left[batch, pick][:, None]
        explained = (before[batch, :, pick][:, None] @ before)[:, 0]
        new = (similarity[batch, pick] - explained) / rest.sqrt()
        factor[:, turn] = new.masked_fill_(rest == NOTHING, 0)  # a row without anything new explains nothing
        left = (left - factor[:, turn].square()).clamp_(min=NOTHING)
    return torch.stack(picks, dim=1)
