"""What [CLS] attends to: FasterVLM keeps only that, VisPruner half of that and half of what differs from it.

Both need the attention of [CLS] in the tower layer whose output the projector reads (`signals.py`). A tower without
[CLS], such as SigLIP, does not have it.
"""

import torch
from torch import Tensor

from ..util.sending import to_device
from .cosine import cosines
from .registry import register

IMPORTANT = 0.5  # VisPruner's share of tokens that are kept for their attention; with 1 it would be FasterVLM
ROUND = 8  # how many tokens VisPruner drops at a time
DIGITS = 12  # of VisPruner's cosines: more would part equal tokens, and with 9 some of 2,880 that differ would tie


@register("cls_topk", needs=("cls_attention",), pairs=0)
def cls_topk(features: Tensor, *, most: int, valid: Tensor, cls_attention: Tensor, **_) -> Tensor:
    """FasterVLM: the K tokens with the most attention of [CLS], argtop_K mean_heads softmax(q_cls k^T / sqrt(d)).

    This is the cheapest plugin that looks at the image: one sort. It keeps the main object, and some tokens without
    content, because attention gathers in a few of these. Nothing stands for the background.
    """
    return ranked(cls_attention, valid)[:, :most]


@register("vispruner", needs=("cls_attention", "tower"), pairs=10)
def vispruner(
    features: Tensor, *, most: int, valid: Tensor, sizes: list[tuple[int, int]], cls_attention: Tensor, tower: Tensor,
    **_,
) -> Tensor:  # fmt: skip
    """VisPruner (ICCV 2025): int(K / 2) tokens by the attention of [CLS], and of the others those that differ most.

    The others, in order of attention, are thinned out in rounds until K - int(K / 2) are left. A round splits them into
    even and odd places, finds for each even token its cosine to the most similar odd one, and drops the (at most) 8
    even tokens where that is highest. In the next round the remaining even tokens come first, the most similar in
    front, and the odd ones behind them. The cosines are of the features before the projector.

    Two traps: the places are those of the attention ranking, not of the image; and the order changes with every round,
    so one cosine out of place changes all later ones. In fp32 most images of 576 patches have such a cosine. So these
    are float64, rounded so that equal tokens tie.
    Cost: one (N, N) product per image, and about (N - K) / 8 rounds, each with a sort and N^2 / 4 cosines to look up.
    """
    similarity = cosines(tower.double()).round_(decimals=DIGITS)
    order, n = ranked(cls_attention, valid), valid.shape[1]
    columns, batch = torch.arange(n, device=valid.device), torch.arange(len(valid), device=valid.device)[:, None, None]
    left, wanted = torch.tensor(sizes).T  # on the CPU: the shapes of all rounds are then known without waiting
    most_attended = (IMPORTANT * wanted).long()
    left, wanted = left - most_attended, wanted - most_attended
    important = to_device(most_attended[:, None], valid.device)
    rest = order.gather(1, (columns + important) % n)
    while (left > wanted).any():
        longest, evens, odds = int(left.max()), (left + 1) // 2, left // 2
        dropped = (left - wanted).clamp(max=ROUND).minimum(evens)
        left = left - dropped
        evens, odds, dropped = (to_device(count[:, None], rest.device) for count in (evens, odds, dropped))
        even, odd = rest[:, :longest:2], rest[:, 1:longest:2]
        likeness = similarity[batch, even[:, :, None], odd[:, None, :]]
        likeness = likeness.masked_fill_((columns[: odd.shape[1]] >= odds)[:, None, :], -2).amax(2)
        likeness = likeness.masked_fill_(columns[: even.shape[1]] >= evens, -3)  # beyond the image's last token
        even = even.gather(1, likeness.argsort(dim=1, descending=True, stable=True))
        stays = (columns[: even.shape[1]] >= dropped) & (columns[: even.shape[1]] < evens)
        stays = torch.cat([stays, columns[: odd.shape[1]] < odds], dim=1)
        rest = torch.cat([even, odd], dim=1).gather(1, stays.int().argsort(dim=1, descending=True, stable=True))
    columns = columns[:most]
    diverse = rest.gather(1, (columns - important).clamp(0, rest.shape[1] - 1))
    return torch.where(columns < important, order[:, :most], diverse)


def ranked(attention: Tensor, valid: Tensor) -> Tensor:
    """(B, N): tokens by falling attention, equal ones in raster order, and tokens that may not be kept last."""
    return attention.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
