"""TokenLearner (NeurIPS 2021): K learned averages of the whole image ("glances") instead of K of its patches."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..util import require
from .random_and_grid import grid
from .registry import register

HIDDEN = 64  # as in the authors' code


@register("tokenlearner", merges="features", learned=True, pairs=0)
class TokenLearner(nn.Module):
    """Version 1.1, which its authors prefer: map k is a softmax over the tokens, and new token k their weighted mean,

        A = softmax over tokens of MLP(norm(x)),    token k = sum_i A_ik x_i

    MLP: width -> 64 -> K. Like the isolator, it exists in training only. Slow steps and inference see every token as it
    is, and what the LLM learns from glances has to carry over.

    A glance has no place of its own. The K new tokens take the places that `grid` would keep. An image that keeps
    fewer uses the first maps, so the last maps learn only from large images. At first all are nearly the image's mean.

    What differs from the original: it sits between the blocks of a ViT. The norm here is the token's length, without
    parameters, so scaling the features changes nothing. And the maps learn from the loss, but the projector learns only
    from the tokens and not from how they steer the maps.
    """

    def __init__(self, width: int, most: int):
        super().__init__()
        self.hidden, self.glances = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, most)

    def forward(self, features: Tensor, *, most: int, valid: Tensor, **how) -> tuple[Tensor, Tensor, None]:
        made, why = self.glances.out_features, "which is the share that the model's largest image keeps"
        what = f"tokenlearner was made for {made} tokens per image, {why}, and this one keeps {most}"
        require(most <= made, f"{what}: videos need another plugin")
        x = F.normalize(features, dim=2) * features.shape[2] ** 0.5
        maps = self.glances(F.gelu(self.hidden(x)))[:, :, :most].mT.masked_fill(~valid[:, None, :], -torch.inf)
        return grid(features, most=most, valid=valid, **how), maps.softmax(2), None
