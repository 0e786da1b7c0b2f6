"""The controls: random rows and evenly spread rows. A plugin that does not beat them is not worth its price."""

import functools
import math

import torch
from torch import Tensor

from .registry import register


@register("random", pairs=0)
def random(features: Tensor, *, most: int, valid: Tensor, seed: int, **_) -> Tensor:
    """K rows at random: the control that every cleverer plugin has to beat.

    A row's score is a hash of (seed, position), not a draw from a generator: the same on CPU and GPU, and independent
    of what else is in the batch. All images of one call keep the same positions; DualSpeed changes the seed each step.
    """
    score = noise(torch.arange(features.shape[1], device=features.device), seed)
    return score.expand(valid.shape).masked_fill(~valid, -1).topk(most, dim=1).indices


def noise(x: Tensor, seed: int) -> Tensor:
    """Non-negative int64 noise from int64 positions: multiply-xorshift rounds, wrapping around on purpose."""
    x = x + (seed * 0x9E3779B97F4A7C15) % 2**62 + 1
    for multiplier in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        x = x * multiplier
        x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return x & 0x7FFFFFFFFFFFFFFF


@register("grid", pairs=0)
def grid(features: Tensor, *, most: int, valid: Tensor, sizes: list[tuple[int, int]], square: bool, **_) -> Tensor:
    """K rows spread evenly over the picture, whatever is in it: blind down-sampling, the other control."""
    ranks = [[*lattice(n, k, square), *(0 for _ in range(most - k))] for n, k in sizes]
    order = torch.argsort(~valid, dim=1, stable=True)  # the candidates' positions, in raster order
    return order.gather(1, torch.tensor(ranks, device=features.device))


@functools.cache
def lattice(n: int, k: int, square: bool) -> list[int]:
    """k of the numbers 0 .. n-1. A square n (24 x 24) is a picture: about sqrt(k) lines, evenly spaced, the k rows
    dealt evenly to the lines. Any other n, and several pictures in one list (anyres), is sampled evenly along its
    raster order."""
    side = math.isqrt(n)
    if not square or side * side != n:
        return [(2 * i + 1) * n // (2 * k) for i in range(k)]
    lines = max(1, round(math.sqrt(k)))
    picks = []
    for line in range(lines):
        row = (2 * line + 1) * side // (2 * lines)
        columns = (line + 1) * k // lines - line * k // lines
        picks += [row * side + (2 * column + 1) * side // (2 * columns) for column in range(columns)]
    return picks
