"""What the plugins that compare tokens share: all cosines of an image, and Cen-Prune's two changes to them.

Cosines of projected features mostly measure what all tokens of an image have in common. Cen-Prune (2026) compares
centred tokens, x_i - mean(x), and weights each token by how distinctive it is: g_i = -mean_{j != i} cos(x_i, x_j) of
the original tokens, stretched to 0 .. 1 within the image. It reports that centring alone makes DivPrune worse, so the
two go together here. No official code was found: `divprune_centred` and `dpp_centred` follow the description.

Equal tokens are equally good, but their values differ by rounding, which depends on what else is in the batch. Where
such a difference could decide, `best` takes the first token in the image. It then also treats tokens as equal that do
differ, by less than `ROUNDING`. So plugins that use it follow their definitions only up to that.
"""

from torch import Tensor
from torch.nn.functional import threshold

ROUNDING = 5e-6  # by how much values may differ that should be equal
NONE = 1e-4  # a distinctiveness below this counts as 0, because stretching enlarges rounding errors too


def cosines(features: Tensor) -> Tensor:
    """(B, N, N). The cosine of a zero token is 0, also with itself."""
    similarity = features @ features.mT
    norm = similarity.diagonal(dim1=1, dim2=2).sqrt()
    norm = norm.masked_fill(norm == 0, 1)
    # Dividing the (N, N) product is cheaper than normalising the (N, D) features, which are wider.
    return similarity.div_(norm[:, :, None]).div_(norm[:, None, :])


def best(values: Tensor, rounding: float | Tensor = ROUNDING) -> Tensor:
    """(B,): the first token of each image whose value is the largest, up to rounding."""
    return (values + rounding >= values.amax(1, keepdim=True)).int().argmax(1)


def centred(features: Tensor, valid: Tensor) -> Tensor:
    """The features minus their image's mean over the tokens that may be kept."""
    features = features.masked_fill(~valid[:, :, None], 0)
    return features - features.sum(1, keepdim=True) / valid.sum(1)[:, None, None]


def distinctive(similarity: Tensor, valid: Tensor) -> Tensor:
    """(B, N) in 0 .. 1: how little a token has in common with the others of its image. If all are alike, 1 for all."""
    others = valid[:, None, :].expand_as(similarity).clone()
    others.diagonal(dim1=1, dim2=2).fill_(False)
    score = -similarity.masked_fill(~others, 0).sum(2) / others.sum(2).clamp(min=1)
    least = score.masked_fill(~valid, float("inf")).amin(1, keepdim=True)
    span = score.masked_fill(~valid, -float("inf")).amax(1, keepdim=True) - least
    alike = span < ROUNDING  # then stretching would turn rounding errors into a ranking
    weight = threshold((score - least) / span.masked_fill(alike, 1), NONE, 0)
    return weight.masked_fill(alike, 1).masked_fill(~valid, 0)
