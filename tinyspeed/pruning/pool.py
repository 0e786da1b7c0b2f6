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

import torch
from torch import Tensor

from .controls import Axis, Cells
from .registry import register


@register("pool", merges="features", pairs=0)
def pool(features: Tensor, *, most: int, valid: Tensor, **how) -> tuple[Tensor, Tensor, None]:
    """Means of K windows."""
    return _pooled(_covered, valid, most, **how)


@register("pool_bilinear", merges="features", pairs=0)
def pool_bilinear(features: Tensor, *, most: int, valid: Tensor, **how) -> tuple[Tensor, Tensor, None]:
    """Bilinear samples at the centres of K windows."""
    return _pooled(_between, valid, most, **how)


def _pooled(
    weigh, valid: Tensor, most: int, sizes: list[tuple[int, int]], square: bool, **_
) -> tuple[Tensor, Tensor, None]:
    cells = Cells(sizes, most, square, valid.device)
    place = (valid.cumsum(1) - 1).clamp(min=0)[:, None, :]  # of each row among those that may be kept
    width = cells.width[:, :, None]
    weight = weigh(cells.down, place // width) * weigh(cells.across, place % width)
    order = torch.argsort(~valid, dim=1, stable=True)
    return order.gather(1, cells.centres), weight.masked_fill_(~valid[:, None, :], 0), None


def _covered(axis: Axis, at: Tensor) -> Tensor:
    """(B, K, N): window i is the mean of floor(i n / k) .. ceil((i + 1) n / k) - 1 of a line of n."""
    first, end = axis.i * axis.n // axis.k, -(-(axis.i + 1) * axis.n // axis.k)
    within = (at >= first[:, :, None]) & (at < end[:, :, None])
    return within / (end - first)[:, :, None]


def _between(axis: Axis, at: Tensor) -> Tensor:
    """(B, K, N): sample i lies at (i + 1/2) n / k - 1/2, between two of a line of n."""
    centre = ((axis.i + 0.5) * axis.n / axis.k - 0.5).clamp(min=0).minimum(axis.n - 1)
    return (1 - (at - centre[:, :, None]).abs()).clamp(min=0)
