"""What the plugins that compare rows share: all cosines of an image at once, and Cen-Prune's two changes to them.

Cosines of projected features measure, for a large part, what all rows of an image have in common. Cen-Prune (2026)
compares centred rows, x_i - mean(x), and weighs each row by how distinctive it is, g_i = -mean_{j != i} cos(x_i, x_j)
of the rows as they were, stretched to 0 .. 1 within the image. By its report centring alone makes DivPrune worse, so
the two go together here. No official code was found: `divprune_centred` and `dpp_centred` follow the description.

Equal rows are equally good, and their values differ by rounding, which depends on what else is in the batch. Where
such a difference could decide what is kept, `best` takes the first row in the picture. Rows that do differ, but by less
than `ROUNDING`, are then taken as equal too: so far and no further do plugins that use it follow their definitions.
"""

from torch import Tensor
from torch.nn.functional import threshold

ROUNDING = 5e-6  # what values may differ by that ought to be equal
NONE = 1e-4  # a distinctiveness below this is none: stretching stretches rounding too


def cosines(features: Tensor) -> Tensor:
    """(B, N, N). A zero row is at right angles to everything, itself included."""
    similarity = features @ features.mT
    norm = similarity.diagonal(dim1=1, dim2=2).sqrt()
    norm = norm.masked_fill(norm == 0, 1)
    # Dividing the (N, N) product costs less than normalising the wider (N, D) features first.
    return similarity.div_(norm[:, :, None]).div_(norm[:, None, :])


def best(values: Tensor, rounding: float | Tensor = ROUNDING) -> Tensor:
    """(B,): the first row of each image whose value is the largest, or as good as that."""
    return (values + rounding >= values.amax(1, keepdim=True)).int().argmax(1)


def centred(features: Tensor, valid: Tensor) -> Tensor:
    """Features less their image's mean, over the rows that may be kept."""
    features = features.masked_fill(~valid[:, :, None], 0)
    return features - features.sum(1, keepdim=True) / valid.sum(1)[:, None, None]


def distinctive(similarity: Tensor, valid: Tensor) -> Tensor:
    """(B, N) in 0 .. 1: how little a row has in common with the others of its image; 1 for all where all are alike."""
    others = valid[:, None, :].expand_as(similarity).clone()
    others.diagonal(dim1=1, dim2=2).fill_(False)
    score = -similarity.masked_fill(~others, 0).sum(2) / others.sum(2).clamp(min=1)
    least = score.masked_fill(~valid, float("inf")).amin(1, keepdim=True)
    span = score.masked_fill(~valid, -float("inf")).amax(1, keepdim=True) - least
    alike = span < ROUNDING  # which would be stretched to a ranking
    weight = threshold((score - least) / span.masked_fill(alike, 1), NONE, 0)
    return weight.masked_fill(alike, 1).masked_fill(~valid, 0)
