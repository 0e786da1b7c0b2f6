"""TokenLearner (NeurIPS 2021): K learned glances over the whole picture instead of K of its patches.

Licence: the authors' code is Apache-2.0; this is written from its description.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..util.errors import UserError
from .controls import grid
from .registry import register

HIDDEN = 64  # the authors'


@register("tokenlearner", merges="features", learned=True, pairs=0)
class TokenLearner(nn.Module):
    """Version 1.1, the one its authors prefer: glance k is a softmax over the rows, and its row their weighted mean,

        A = softmax over rows of MLP(norm(x)),    row k = sum_i A_ik x_i

    MLP: width -> 64 -> K. All of it is there in training only, as the isolator is: slow steps and inference see every
    row as it is, and what the LLM learns from glances has to carry over.

    A glance has no place of its own. The K rows take the places that `grid` would keep. A picture of fewer rows has the
    first glances, so the last ones learn from large pictures alone.

    What differs: the norm is the row's length, without parameters, so that scaling the features changes nothing; and
    the maps learn from the loss, but the projector learns only from the rows, not from how they steer the maps. The
    original sits between the blocks of a ViT. At the start all glances are nearly the mean of the picture.
    """

    def __init__(self, width: int, most: int):
        super().__init__()
        self.hidden, self.glances = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, most)

    def forward(self, features: Tensor, *, most: int, valid: Tensor, **how) -> tuple[Tensor, Tensor, None]:
        if most > self.glances.out_features:
            raise UserError(
                f"tokenlearner was made for {self.glances.out_features} rows of an image, which is the share of its "
                f"largest picture, and {most} are asked for: videos have more, and need another plugin"
            )
        x = F.normalize(features, dim=2) * features.shape[2] ** 0.5
        maps = self.glances(F.gelu(self.hidden(x)))[:, :, :most].mT
        return (
            grid(features, most=most, valid=valid, **how),
            maps.masked_fill(~valid[:, None, :], -torch.inf).softmax(2),
            None,
        )
