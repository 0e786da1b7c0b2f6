"""What [CLS] looks at: FasterVLM keeps just that, VisPruner half of that and half of what differs from it.

Both need the attention of [CLS] in the tower layer whose output the projector reads; `signals.py` hears it there. A
tower without [CLS] (SigLIP) has none.

Licence: the authors' codes of both are Apache-2.0; this is written from their description.
"""

import torch
from torch import Tensor

from .cosine import cosines
from .registry import register

IMPORTANT = 0.5  # VisPruner's share of rows that are kept for their attention; at 1 it would be FasterVLM
ROUND = 8  # rows that VisPruner drops at a time
DIGITS = 9  # of its cosines


@register("cls_topk", needs=("cls_attention",), pairs=0)
def cls_topk(features: Tensor, *, most: int, valid: Tensor, cls_attention: Tensor, **_) -> Tensor:
    """FasterVLM: the K rows with the most attention of [CLS], argtop_K mean_heads softmax(q_cls k^T / sqrt(d)).

    The cheapest plugin that looks at the picture, one sort. What it keeps is the main object and, since attention
    gathers in a few rows without content, some of those; nothing stands for the background.
    """
    return ranked(cls_attention, valid)[:, :most]


@register("vispruner", needs=("cls_attention", "tower"), pairs=10)
def vispruner(
    features: Tensor, *, most: int, valid: Tensor, counts: Tensor, cls_attention: Tensor, tower: Tensor, **_
) -> Tensor:
    """VisPruner (ICCV 2025): int(K / 2) rows by the attention of [CLS]; for the others, duplicates of each other go.

    The rest in order of attention, in rounds: split into even and odd places, find for each even row its cosine to the
    most similar odd one, and drop the (at most) 8 even rows where that is highest, until K - int(K / 2) are left. Even
    rows that survive come first in the next round, the most similar first, the odd ones behind them. Cosines are of
    the features before the projector.

    Traps: the places are those of the attention ranking, not of the picture; and the order changes with every round,
    so that one cosine out of place changes all later ones. In fp32 most pictures of 576 patches have such a one: these
    are float64, of which so many digits are compared that equal rows tie.
    Cost: one (N, N) product an image, and about (N - K) / 8 rounds, each a sort and N^2 / 4 cosines looked up.
    """
    similarity = cosines(tower.double()).round_(decimals=DIGITS)
    order, n = ranked(cls_attention, valid), valid.shape[1]
    columns, batch = torch.arange(n, device=valid.device), torch.arange(len(valid), device=valid.device)[:, None, None]
    important = (IMPORTANT * counts).long()[:, None]
    rest = order.gather(1, (columns + important) % n)
    left, wanted = torch.cat([valid.sum(1, keepdim=True) - important, counts[:, None] - important], dim=1).cpu().T
    while (left > wanted).any():  # on the host, which then knows the shapes of all rounds without asking a GPU again
        longest, evens, odds = int(left.max()), (left + 1) // 2, left // 2
        dropped = (left - wanted).clamp(max=ROUND).minimum(evens)
        left = left - dropped
        evens, odds, dropped = (count[:, None].to(rest.device, non_blocking=True) for count in (evens, odds, dropped))
        even, odd = rest[:, :longest:2], rest[:, 1:longest:2]
        likeness = similarity[batch, even[:, :, None], odd[:, None, :]]
        likeness = likeness.masked_fill_((columns[: odd.shape[1]] >= odds)[:, None, :], -2).amax(2)
        likeness = likeness.masked_fill_(columns[: even.shape[1]] >= evens, -3)  # a place behind the image's last row
        even = even.gather(1, likeness.argsort(dim=1, descending=True, stable=True))
        stays = (columns[: even.shape[1]] >= dropped) & (columns[: even.shape[1]] < evens)
        stays = torch.cat([stays, columns[: odd.shape[1]] < odds], dim=1)
        rest = torch.cat([even, odd], dim=1).gather(1, stays.int().argsort(dim=1, descending=True, stable=True))
    columns = columns[:most]
    diverse = rest.gather(1, (columns - important).clamp(0, rest.shape[1] - 1))
    return torch.where(columns < important, order[:, :most], diverse)


def ranked(attention: Tensor, valid: Tensor) -> Tensor:
    """(B, N) row numbers by falling attention, in raster order among equals; rows that may not be kept come last."""
    return attention.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
