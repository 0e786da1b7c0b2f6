"""Which visual rows a fast step keeps: the plugins, and the one door to all of them.

    index = pruning.select("divprune", features, keep=0.1)        # (B, N, D) -> (B, K) int64, ascending, unique

A plugin answers one question, "which K of these N rows?", from features alone. It never touches the sequence, the
labels or the gradient: selection runs without grad and in fp32 (in bf16 DivPrune shares only half of its picks with
fp32), and `rows.py` does the cutting. `select` owns everything that must hold for every plugin: K = int(keep * N +
1e-6) and at least 1 (57 of 576, as DualSpeed's code has it; official DivPrune rounds to 58), ascending order,
masks, errors.

Images of different size share a batch through `mask`; then each has its own K, and the index rows are filled up with
-1, which no gather accepts silently.

Written from the papers' descriptions: DivPrune's own code is licensed for non-commercial use only.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .errors import UserError, unknown

# (features (B, N, D) fp32, most = largest count, valid (B, N) bool, counts (B,), seed) -> (B, most): the picks of image
# b in its first counts[b] columns, in any order; later columns are ignored.
Plugin = Callable[..., Tensor]
_PLUGINS: dict[str, Plugin] = {}


def register(name: str) -> Callable[[Plugin], Plugin]:
    """Add a plugin under `name`. A taken name is an error: the last one to import must not win in silence."""

    def add(plugin: Plugin) -> Plugin:
        if name in _PLUGINS:
            raise UserError(f"a pruning plugin named {name!r} is registered already; choose another name")
        _PLUGINS[name] = plugin
        return plugin

    return add


def names() -> list[str]:
    return sorted(_PLUGINS)


def keep_count(keep: float, n: int) -> int:
    """K for an image of n candidate rows. The 1e-6 undoes float dust: 0.1 * 30 must give 3."""
    return max(1, int(keep * n + 1e-6))


@torch.no_grad()
def select(
    name: str,
    features: Tensor,
    *,
    keep: float | None = None,
    count: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """The rows that plugin `name` keeps of each image: (B, K), or ((B, K), counts (B,)) when a mask is given.

    Give either `keep`, a share, or `count`, an exact number (one for all images, or one an image with `mask`).
    `mask` (B, N) marks the rows that may be kept. `seed` matters to plugins that draw.
    """
    if name not in _PLUGINS:
        raise unknown("pruning plugin", name, _PLUGINS)
    if features.dim() != 3 or not features.is_floating_point() or 0 in features.shape:
        raise UserError(f"features must be a float tensor (images, rows, width), got {tuple(features.shape)}")
    features = _checked(features.float())
    batch, n, _ = features.shape
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, n)):
        raise UserError(f"mask must be bool, ({batch}, {n}) as the features are; got {mask.dtype}, {tuple(mask.shape)}")
    candidates = [n] * batch if mask is None else mask.sum(1).tolist()
    counts = _counts(keep, count, candidates)
    if mask is None and len(set(counts)) > 1:
        raise UserError("images with different counts need a mask: their index rows have different lengths")
    most = max(counts)
    if counts == [n] * batch:
        index = torch.arange(n, device=features.device).expand(batch, n).contiguous()
    else:
        valid = features.new_ones(batch, n, dtype=torch.bool) if mask is None else mask
        counts_ = torch.tensor(counts, device=features.device)
        with torch.autocast(features.device.type, enabled=False):  # it would put the products back into half precision
            index = _PLUGINS[name](features, most=most, valid=valid, counts=counts_, seed=seed)
        late = torch.arange(most, device=index.device) >= counts_[:, None]
        index = index.masked_fill(late, n).sort(dim=1).values  # beyond an image's count: n sorts last ...
        index = index.masked_fill(late, -1)  # ... and -1 cannot be gathered by mistake
    return index if mask is None else (index, torch.tensor(counts, device=features.device))


def _checked(features: Tensor) -> Tensor:
    """Finite features, and none so large or small that its square leaves fp32: such an image is scaled by a power of
    two, which is exact and which no plugin can tell."""
    largest = torch.maximum(features.amax((1, 2)), -features.amin((1, 2)))  # NaN wins in both
    exponents = [math.frexp(x)[1] if math.isfinite(x) else None for x in largest.tolist()]
    if None in exponents:
        raise UserError("the image features hold NaN or infinite values: the vision tower or projector has diverged")
    if all(-30 <= e <= 30 for e in exponents):
        return features
    return torch.ldexp(features, -torch.tensor(exponents, device=features.device).clamp(-126, 126)[:, None, None])


def _counts(keep: float | None, count: int | Sequence[int] | None, candidates: list[int]) -> list[int]:
    if (keep is None) == (count is None):
        raise UserError("give either keep (a share) or count (a number of rows), not both")
    if 0 in candidates:
        raise UserError(f"image {candidates.index(0)} of the batch has no row that may be kept")
    if keep is not None:
        if not (math.isfinite(keep) and 0 < keep <= 1):
            raise UserError(f"keep = {keep}: the share of visual rows must be above 0 and at most 1")
        return [keep_count(keep, n) for n in candidates]
    counts = list(count) if isinstance(count, Sequence) else [count] * len(candidates)
    if not all(isinstance(c, int) for c in counts):
        raise UserError(f"count = {count}: must be a whole number, or one an image")
    if len(counts) != len(candidates):
        raise UserError(f"{len(counts)} counts for {len(candidates)} images")
    for wanted, n in zip(counts, candidates, strict=True):
        if not 1 <= wanted <= n:
            raise UserError(f"count = {wanted}: an image with {n} rows can keep 1 to {n} of them")
    return counts


@register("divprune")
def divprune(features: Tensor, *, most: int, valid: Tensor, **_) -> Tensor:
    """DivPrune (CVPR 2025): the subset whose closest pair is as far apart as greedy can make it.

    d(i, j) = 1 - cos(x_i, x_j). First the row whose nearest neighbour is farthest; then, again and again, the row
    farthest from all rows chosen so far: argmax_j min_{s in S} d(s, j). Comparing -cos orders rows as d does.

    Cost: one (N, N) product an image, then K steps over (B, N): a running maximum of similarities replaces the
    re-gathered (K, N) block of the official code, O(KN) instead of O(K^2 N), and all images step together.
    A chosen row gets similarity +inf, which no maximum undoes: duplicates can never be picked twice (the official
    code returned 40 distinct rows of 58 on repeated tokens).
    """
    similarity = features @ features.mT
    norm = similarity.diagonal(dim1=1, dim2=2).sqrt()
    norm = norm.masked_fill(norm == 0, 1)  # a zero row is at right angles to everything
    # Dividing the (N, N) product costs less than normalising the wider (N, D) features first.
    similarity.div_(norm[:, :, None]).div_(norm[:, None, :])
    inf = float("inf")
    if not valid.all():
        similarity.masked_fill_(~(valid[:, :, None] & valid[:, None, :]), -inf)  # nobody's neighbour
    similarity.diagonal(dim1=1, dim2=2).fill_(-inf)  # nor is a row its own
    batch = torch.arange(len(features), device=features.device)
    # Two rows that are each other's nearest must tie, though a product's two halves may round differently.
    nearest = torch.maximum(similarity.amax(2), similarity.amax(1))
    pick = nearest.masked_fill_(~valid, inf).argmin(1)
    closest = torch.zeros_like(valid, dtype=features.dtype).fill_(-inf).masked_fill_(~valid, inf)
    picks = []
    for _ in range(most):
        picks.append(pick)
        closest = torch.maximum(closest, similarity[batch, pick]).scatter_(1, pick[:, None], inf)
        pick = closest.argmin(1)
    return torch.stack(picks, dim=1)


@register("random")
def random(features: Tensor, *, most: int, valid: Tensor, seed: int, **_) -> Tensor:
    """K rows at random: the control that every cleverer plugin has to beat.

    A row's score is a hash of (seed, position), not a draw from a generator: the same on CPU and GPU, and independent
    of what else is in the batch. All images of one call keep the same positions; DualSpeed changes the seed each step.
    """
    score = _hash(torch.arange(features.shape[1], device=features.device), seed)
    return score.expand(valid.shape).masked_fill(~valid, -1).topk(most, dim=1).indices


def _hash(x: Tensor, seed: int) -> Tensor:
    """Non-negative int64 noise from int64 positions: multiply-xorshift rounds, wrapping around on purpose."""
    x = x + (seed * 0x9E3779B97F4A7C15) % 2**62 + 1
    for multiplier in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        x = x * multiplier
        x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    return x & 0x7FFFFFFFFFFFFFFF


@register("grid")
def grid(features: Tensor, *, most: int, valid: Tensor, counts: Tensor, **_) -> Tensor:
    """K rows spread evenly over the picture, whatever is in it: blind down-sampling, the other control."""
    sizes = zip(valid.sum(1).tolist(), counts.tolist(), strict=True)
    ranks = [[*_lattice(n, k), *(0 for _ in range(most - k))] for n, k in sizes]
    order = torch.argsort(~valid, dim=1, stable=True)  # the candidates' positions, in raster order
    return order.gather(1, torch.tensor(ranks, device=features.device))


@functools.cache
def _lattice(n: int, k: int) -> list[int]:
    """k of the numbers 0 .. n-1. A square n (24 x 24) is a picture: about sqrt(k) lines, evenly spaced, the k rows
    dealt evenly to the lines. Any other n (anyres) is sampled evenly along its raster order."""
    side = math.isqrt(n)
    if side * side != n:
        return [(2 * i + 1) * n // (2 * k) for i in range(k)]
    lines = max(1, round(math.sqrt(k)))
    picks = []
    for line in range(lines):
        row = (2 * line + 1) * side // (2 * lines)
        columns = (line + 1) * k // lines - line * k // lines
        picks += [row * side + (2 * column + 1) * side // (2 * columns) for column in range(columns)]
    return picks
