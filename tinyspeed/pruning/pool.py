"""Pooling: the image at a lower resolution. The control for plugins that merge, as `grid` is for those that select.

The K windows are the cells of a picture of K cells laid over the N patches: about sqrt(K) lines of equal height, each
with the same number of cells, as far as K allows (K = 57 has 7 or 8 in a line). LLaVA-NeXT's pooling uses strides
instead, which allow few K (24 x 24 gives 64, 36, 16).

pool           each token is the mean of its window. A patch that two windows share counts fully in both (adaptive
               average pooling).
pool_bilinear  each token is interpolated between the four patches around its window's centre. At K = N / 4 that is the
               same as `pool`. With smaller K it uses ever fewer of the patches, and at K = N / 9 one patch, as `grid`.

A square number of tokens (24 x 24) is a picture. Any other number, and the several pictures of LLaVA-NeXT in one list,
is pooled along the raster order, so the last patches of a line share a window with the first ones of the next.

The trade-off: the LLM sees a bit of everything, but as mixtures of patches, which it never sees in a full step.
"""

import torch
from torch import Tensor

from .random_and_grid import Axis, Cells
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
    place = (valid.cumsum(1) - 1).clamp(min=0)[:, None, :]  # of each token among those that may be kept
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
