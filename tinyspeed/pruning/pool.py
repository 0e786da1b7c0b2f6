"""Pooling: the picture at a lower resolution. The plain control of all that merge, as `grid` is of all that select.

The K windows are the cells of a K-cell picture laid over the N-cell one: about sqrt(K) lines of equal height, and in
each line an equal number of cells, as far as K allows (K = 57 has 7 or 8 in a line). LLaVA-NeXT's pooling has strides
instead, for which few K exist (24 x 24 gives 64, 36, 16).

pool           each row is the mean of its window; windows that divide a patch between them both have all of it
               (adaptive average pooling)
pool_bilinear  each row is read off between the four patches around its window's centre: the same at K = N / 4, but
               beyond that it looks at ever fewer of the patches, and at K = N / 9 it is one patch, as in `grid`

A square number of rows (24 x 24) is a picture. Any other, and LLaVA-NeXT's several pictures in one list, is pooled
along its raster order: neighbours in a line. Last and first patches of lines then share windows.

What the LLM sees are mixtures of patches, which a full step never shows it. That is what to weigh against seeing a bit
of everything.
"""

import functools
import math

import torch
from torch import Tensor

from .controls import lattice
from .registry import register


@register("pool", merges="features", pairs=2)
def pool(features: Tensor, *, most: int, valid: Tensor, **how) -> tuple[Tensor, Tensor, None]:
    """Means of K windows."""
    return _pooled(_covered, valid, most, **how)


@register("pool_bilinear", merges="features", pairs=2)
def pool_bilinear(features: Tensor, *, most: int, valid: Tensor, **how) -> tuple[Tensor, Tensor, None]:
    """Bilinear samples at the centres of K windows."""
    return _pooled(_between, valid, most, **how)


def _pooled(
    axis, valid: Tensor, most: int, sizes: list[tuple[int, int]], square: bool, **_
) -> tuple[Tensor, Tensor, None]:
    kinds = [*dict.fromkeys(sizes)]  # LLaVA-1.5's images are all of one
    maps = torch.zeros(len(kinds), most, valid.shape[1])
    for kind, (n, k) in zip(maps, kinds, strict=True):
        kind[:k, :n] = _windows(axis, n, k, square)
    ranks = torch.tensor(
        [[*lattice(n, k, square), *(0 for _ in range(most - k))] for n, k in sizes], device=valid.device
    )
    # The maps count candidates; `order` says where in the features each of them is.
    order = torch.argsort(~valid, dim=1, stable=True)
    maps = maps.to(valid.device)[[kinds.index(size) for size in sizes]]
    weight = torch.zeros_like(maps).scatter_(2, order[:, None, :].expand_as(maps), maps)
    return order.gather(1, ranks), weight, None


@functools.lru_cache(maxsize=64)
def _windows(axis, n: int, k: int, square: bool) -> Tensor:
    """(k, n) in the order of `lattice`."""
    side = math.isqrt(n)
    if not square or side * side != n:
        return axis(n, k)
    lines = max(1, round(math.sqrt(k)))
    down, across = axis(side, lines), []
    for line in range(lines):
        columns = (line + 1) * k // lines - line * k // lines
        across.append(torch.einsum("r,kc->krc", down[line], axis(side, columns)).flatten(1))
    return torch.cat(across)


def _covered(n: int, k: int) -> Tensor:
    """(k, n): window i is the mean of patches floor(i n / k) .. ceil((i + 1) n / k) - 1 of a line of n."""
    weight = torch.zeros(k, n)
    for i in range(k):
        first, end = i * n // k, -(-(i + 1) * n // k)
        weight[i, first:end] = 1 / (end - first)
    return weight


def _between(n: int, k: int) -> Tensor:
    """(k, n): sample i lies at (i + 1/2) n / k - 1/2, between two patches."""
    weight = torch.zeros(k, n)
    for i in range(k):
        at = min(max((i + 0.5) * n / k - 0.5, 0), n - 1)
        low = min(int(at), max(n - 2, 0))
        weight[i, low] += 1 - (at - low)
        weight[i, min(low + 1, n - 1)] += at - low
    return weight
