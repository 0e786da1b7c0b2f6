"""VisionZip (CVPR 2025): the patches that [CLS] attends to as they are, and the rest merged into a few."""

import torch
from torch import Tensor

from .cls_attention import ranked
from .cosine import cosines
from .registry import register

CONTEXTUAL, OF = 10, 64  # VisionZip's split of 64 tokens: 54 dominant, 10 contextual


@register("visionzip", needs=("cls_attention", "keys", "tower"), merges="tower", pairs=5)
def visionzip(
    features: Tensor, *, most: int, valid: Tensor, counts: Tensor, cls_attention: Tensor, keys: Tensor, **_
) -> tuple[Tensor, Tensor, None]:
    """K = dominant + contextual tokens, contextual = int(K * 10 / 64).

    The dominant tokens have the most attention of [CLS]. Of the R others, in raster order, every (R // contextual)-th
    is a target, and each of the rest goes to the target with the most similar key (the mean over heads):

        x_contextual = x_target + mean of the x that went to it

    This is a sum and not an average, as in the authors' code, so such a token is twice as long as others. It is made of
    the tower's features, before the projector. Their code also keeps [CLS], on which the projector was never trained;
    this does not. Below K = 7 there are no contextual tokens, and the plugin is `cls_topk`.
    """
    contextual = counts * CONTEXTUAL // OF
    place = ranked(cls_attention, valid).argsort(dim=1)
    dominant = place < (counts - contextual)[:, None]
    rest = valid & ~dominant
    step = (rest.sum(1) // contextual.clamp(min=1)).clamp(min=1)[:, None]
    rank = rest.cumsum(1) - 1
    target = rest & (rank % step == 0) & (rank // step < contextual[:, None])
    kept = dominant | target
    slot = (kept.cumsum(1) - 1).clamp(min=0)  # the place of a kept token among the kept ones
    nearest = cosines(keys).masked_fill_(~target[:, None, :], -2).argmax(2)
    merged = (rest & ~target & (contextual > 0)[:, None])[:, None, :]
    weight = keys.new_zeros(len(valid), most, valid.shape[1])
    weight.scatter_(1, slot.gather(1, nearest)[:, None, :], merged.to(weight.dtype))
    weight /= weight.sum(2, keepdim=True).clamp(min=1)
    index = kept.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return index, weight.scatter_add_(2, index[:, :, None], torch.ones_like(weight[:, :, :1])), None
