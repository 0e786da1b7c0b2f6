"""The controls: random tokens and evenly spread tokens. A plugin that does not beat them is not worth its cost."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..util.sending import to_device
from .registry import register


@register("random", draws=True, pairs=0)
def random(features: Tensor, *, most: int, valid: Tensor, seed: int, **_) -> Tensor:
    """K random tokens: the control that every cleverer plugin has to beat.

    A token's score is a hash of (seed, position) and not drawn from a generator. So it is the same on CPU and GPU, and
    whatever else is in the batch. All images of one call keep the same positions; DualSpeed changes the seed each step.
    """
    score = noise(torch.arange(features.shape[1], device=features.device), seed)
    return score.expand(valid.shape).masked_fill(~valid, -1).topk(most, dim=1).indices


def noise(x: Tensor, seed: int) -> Tensor:
    """Non-negative int64 noise from int64 positions: multiply-xorshift rounds, which overflow on purpose."""
    x = x + (seed * 0x9E3779B97F4A7C15) % 2**62 + 1
    for multiplier in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        x = x * multiplier
        x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return x & 0x7FFFFFFFFFFFFFFF


@register("grid", pairs=0)
def grid(features: Tensor, *, most: int, valid: Tensor, sizes: list[tuple[int, int]], square: bool, **_) -> Tensor:
    """K tokens spread evenly over the image, whatever is in it: blind down-sampling, the other control."""
    order = torch.argsort(~valid, dim=1, stable=True)  # the candidates' positions, in raster order
    return order.gather(1, Cells(sizes, most, square, valid.device).centres)


class Cells:
    """A picture of K cells laid over one of N tokens, for each image of a batch, from its `sizes` = (N, K).

    A square N (24 x 24) is a picture. It gets about sqrt(K) evenly spaced lines, with the K cells spread evenly over
    them. Any other N, and several pictures in one list (anyres), is a single line in raster order. Cells beyond an
    image's K lie where its last one does.
    """

    def __init__(self, sizes: list[tuple[int, int]], most: int, square: bool, device: torch.device):
        n, k = torch.tensor(sizes).T[:, :, None]  # on the CPU, so that nothing waits for the GPU
        side = n.float().sqrt().round().long()
        picture = (side * side == n) & square
        lines = k.float().sqrt().round().long().where(picture, 1)
        i = torch.arange(most).minimum(k - 1)
        line = -(-(i + 1) * lines // k) - 1  # its cells are line * k // lines .. (line + 1) * k // lines - 1
        first = line * k // lines
        columns, height, width = (line + 1) * k // lines - first, side.where(picture, 1), side.where(picture, n)
        moved = lambda *axis: Axis(*(to_device(x, device) for x in axis))
        self.down, self.across = moved(line, lines, height), moved(i - first, columns, width)
        self.width = self.across.n

    @property
    def centres(self) -> Tensor:
        """(B, K): the token in the middle of each cell."""
        return self.down.centre * self.width + self.across.centre


@dataclass
class Axis:
    """Cell i of k along a line of n tokens; all three (B, K) or (B, 1)."""

    i: Tensor
    k: Tensor
    n: Tensor

    @property
    def centre(self) -> Tensor:
        return (2 * self.i + 1) * self.n // (2 * self.k)
