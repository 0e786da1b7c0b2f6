"""Which visual rows a fast step keeps: the plugins, and the one door to all of them.

    index = pruning.select("divprune", features, keep=0.1)        # (B, N, D) -> (B, K) int64, ascending, unique

A plugin answers one question, "which K of these N rows?", from features, and from signals of the vision tower if it
declares that it needs some (`register`). It never touches the sequence, the
labels or the gradient: selection runs without grad and in fp32 (in bf16 DivPrune shares only half of its picks with
fp32), and `rows.py` does the cutting. `select` owns everything that must hold for every plugin: K = int(keep * N +
1e-6) and at least 1 (57 of 576, as DualSpeed's code has it; official DivPrune rounds to 58), ascending order,
masks, errors.

Images of different size share a batch through `mask`; then each has its own K, and the index rows are filled up with
-1, which no gather accepts silently.

One file a plugin; each is written from its paper's description.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserError, unknown
from .attended import cls_topk, vispruner
from .controls import grid, random
from .coverage import coverage
from .divprune import divprune, divprune_centred
from .dpp import dpp, dpp_centred
from .registry import PLUGINS as _PLUGINS
from .registry import names, needs, pairs, register, signals_of, works_with

__all__ = ["keep_count", "names", "needs", "pairs", "register", "select", "signals_of", "works_with"]
__all__ += ["cls_topk", "coverage", "divprune", "divprune_centred", "dpp", "dpp_centred", "grid", "random", "vispruner"]


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
    signals: Mapping[str, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The rows that plugin `name` keeps of each image: (B, K), or ((B, K), counts (B,)) when a mask is given.

    Give either `keep`, a share, or `count`, an exact number (one for all images, or one an image with `mask`).
    `mask` (B, N) marks the rows that may be kept. `seed` matters to plugins that draw. `signals`, each (B, N) or
    (B, N, C), are what some plugins need beside the features; those that this one does not look at are left alone.
    """
    if name not in _PLUGINS:
        raise unknown("pruning plugin", name, _PLUGINS)
    if features.dim() != 3 or not features.is_floating_point() or 0 in features.shape:
        raise UserError(f"features must be a float tensor (images, rows, width), got {tuple(features.shape)}")
    features = _checked(features.float())
    batch, n, _ = features.shape
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, n)):
        raise UserError(f"mask must be bool, ({batch}, {n}) as the features are; got {mask.dtype}, {tuple(mask.shape)}")
    heard = _heard(name, signals or {}, (batch, n))
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
            index = _PLUGINS[name](features, most=most, valid=valid, counts=counts_, seed=seed, **heard)
        late = torch.arange(most, device=index.device) >= counts_[:, None]
        index = index.masked_fill(late, n).sort(dim=1).values  # beyond an image's count: n sorts last ...
        index = index.masked_fill(late, -1)  # ... and -1 cannot be gathered by mistake
    return index if mask is None else (index, torch.tensor(counts, device=features.device))


def _heard(name: str, signals: Mapping[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """The signals that plugin `name` looks at, in fp32."""
    absent = [signal for signal in needs(name) if signal not in signals]
    if absent:
        raise UserError(
            f"the plugin {name!r} needs {' and '.join(absent)} beside the features; "
            f"without: {', '.join(works_with(signals))}"
        )
    heard = {signal: signals[signal].float() for signal in signals_of(name) if signal in signals}
    for signal, values in [*heard.items()]:
        if values.shape[:2] != shape or values.dim() > 3:
            raise UserError(f"{signal} must be {shape} as the features are, got {tuple(values.shape)}")
        heard[signal] = _checked(values.reshape(*shape, -1)).view_as(values)
    return heard


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
